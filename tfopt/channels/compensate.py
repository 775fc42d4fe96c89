"""What channels that go meant to their readers, put on the channels that stay.

    x_R ~ M x_K,  M = S_RK (S_KK + r I)^-1        S = E[x x'] over rows and positions, K kept, R removed
    W x = W_K x_K + W_R x_R ~ (W_K + W_R M) x_K

the least-squares answer of a linear layer (compare He, Zhang and Sun 2017, which solves it for whole windows): one
product of C x C matrices for each layer, and no training. It changes weights only where all of a reader's input
channels meet its kernel alike; sparse and clustered kernels stay as they are.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tfopt.calibration import values
from tfopt.channels.groups import Channels
from tfopt.data import Dataset
from tfopt.graph import split
from tfopt.inline import label, tensor_names
from tfopt.invariants import clusters, is_sparse
from tfopt.model import Model

_ROWS = 256
_RIDGE = 1e-4  # r over the mean of the diagonal of S_KK
_MAX_CHANNELS = 2048


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A layer: reference of x and its axis of channels, name of W and its axis."""

    x: str
    x_axis: int
    weights: str
    axis: int


def compensate(channels: Channels, model: Model, signature: str, rows: Dataset, kept: np.ndarray) -> int:
    """Changes the kernels that read channels that go, in place, before these are cut.

    Args:
      channels: the model's.
      model: the model.
      signature: that of the rows.
      rows: inputs; at most 256 of them are used.
      kept: mask over the classes.

    Returns:
      How many kernels changed.
    """
    readers = [
        reader
        for reader in _readers(channels, model, signature)
        if not kept[channels.axis(reader.weights, reader.axis)].all()
    ]
    moments: dict[tuple[str, int], np.ndarray] = {}
    refs = list(dict.fromkeys(reader.x for reader in readers))
    for _, tensors in values(model, signature, refs, rows.take(slice(0, _ROWS))) if refs else ():
        for x, axis in dict.fromkeys((reader.x, reader.x_axis) for reader in readers):
            flat = np.moveaxis(tensors[x], axis, -1).reshape(-1, tensors[x].shape[axis])
            moments[x, axis] = moments.get((x, axis), 0) + flat.T @ flat
    for reader in readers:
        mask = kept[channels.axis(reader.weights, reader.axis)]
        value = model.graph.constant(reader.weights)
        assert value is not None
        front = np.moveaxis(value, reader.axis, 0).astype(np.float64)
        blend = _blend(moments[reader.x, reader.x_axis].astype(np.float64), mask)
        front[mask] += np.tensordot(blend, front[~mask], axes=(0, 0))
        model.graph.set_constant(reader.weights, np.moveaxis(front, 0, reader.axis).astype(value.dtype))
    return len(readers)


def _blend(moments: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """M, (removed, kept)."""
    inner = moments[np.ix_(kept, kept)]
    ridge = _RIDGE * max(float(np.trace(inner)) / len(inner), 1e-30)
    return np.linalg.solve(inner + ridge * np.eye(len(inner)), moments[np.ix_(kept, ~kept)]).T


def _readers(channels: Channels, model: Model, signature: str) -> list[_Reader]:
    """The layers of a signature that read one axis of channels with a kernel of their own."""
    graph = model.graph
    outputs = model.signatures[signature].outputs
    labels = [label(signature, name, part) for name, info in outputs.items() for part, _ in tensor_names(info)]
    live = graph.reachable(split(graph.outputs[each])[0] for each in labels)
    found = []
    for product in channels.spread.products:
        if product.reads is None or product.node not in live:
            continue
        reader = _Reader(*product.reads)
        value = graph.constant(reader.weights)
        shape = channels.spread.shape(reader.x)
        if value is None or shape is None or value.shape[reader.axis] > _MAX_CHANNELS:
            continue
        alone = sum(other.reads is not None and other.reads[2] == reader.weights for other in channels.spread.products)
        if shape[reader.x_axis] != value.shape[reader.axis] or alone > 1 or len(graph.uses(reader.weights)) > 1:
            continue
        if not is_sparse(value) and clusters(value) is None:
            found.append(reader)
    return found
