"""What channels that go meant to their readers, put on the channels that stay.

    x_R ~ M x_K,  M = S_RK (S_KK + r I)^-1        S = E[x x'] over rows and positions, K kept, R removed
    W x = W_K x_K + W_R x_R ~ (W_K + W_R M) x_K

the least-squares answer of a linear layer (compare He, Zhang and Sun 2017, which solves it for whole windows): one
product of C x C matrices for each layer, and no training. It changes weights only where all of a reader's input
channels meet its kernel alike; sparse and clustered kernels stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

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
class Reader:
    """A layer: reference of x and its axis of channels, name of W and its axis."""

    x: str
    x_axis: int
    weights: str
    axis: int


Moments = Mapping[Reader, np.ndarray]


def compensate(channels: Channels, model: Model, moments: Moments, kept: np.ndarray) -> list[str]:
    """Changes the kernels that read channels that go, in place, before these are cut.

    Args:
      channels: the model's.
      model: the model.
      moments: of what its layers read, see `second_moments`.
      kept: mask over the classes.

    Returns:
      The names of the kernels that changed.
    """
    changed = []
    for reader, moment in moments.items():
        mask = kept[channels.axis(reader.weights, reader.axis)]
        value = model.graph.constant(reader.weights)
        assert value is not None
        if mask.all() or is_sparse(value) or clusters(value) is not None:
            continue
        front = np.moveaxis(value, reader.axis, 0).astype(np.float64)
        front[mask] += np.tensordot(_blend(moment, mask), front[~mask], axes=(0, 0))
        model.graph.set_constant(reader.weights, np.moveaxis(front, 0, reader.axis).astype(value.dtype))
        changed.append(reader.weights)
    return changed


def second_moments(channels: Channels, model: Model, signature: str, rows: Dataset) -> Moments:
    """E[x x'] over rows and positions, (channels, channels) float64, of what each layer of a signature reads.

    Args:
      channels: the model's.
      model: the model.
      signature: that of the rows.
      rows: inputs; at most 256 of them are used.
    """
    free = channels.classes.free
    readers = [
        reader
        for reader in _readers(channels, model, signature)
        if free[channels.axis(reader.weights, reader.axis)].any()
    ]
    refs = list(dict.fromkeys(reader.x for reader in readers))
    places = dict.fromkeys((reader.x, reader.x_axis) for reader in readers)
    sums: dict[tuple[str, int], np.ndarray] = {}
    for _, tensors in values(model, signature, refs, rows.take(slice(0, _ROWS))) if refs else ():
        for x, axis in places:
            flat = np.moveaxis(tensors[x], axis, -1).reshape(-1, tensors[x].shape[axis]).astype(np.float32)
            sums[x, axis] = sums.get((x, axis), 0) + (flat.T @ flat).astype(np.float64)
    return {reader: sums[reader.x, reader.x_axis] for reader in readers}


def redundancy(channels: Channels, moments: Moments, worth: np.ndarray) -> np.ndarray:
    """Worth with compensation: that of a channel in the order in which channels of a group would go, the least first.

        worth_c / (R_cc [R^-1]_cc)      R the moments, normalised, of the channels that are still there

    the part of a channel that the others cannot stand in for (Hassibi and Stork 1992, Optimal Brain Surgeon, on
    channels); R is the mean over the layers that read the group. It never falls from one to the next.
    """
    worth = worth.copy()
    for group in channels.groups:
        tables = []
        for reader, moment in moments.items():
            classes = channels.axis(reader.weights, reader.axis)
            place = {one: index for index, one in enumerate(classes.tolist())}
            if len(place) == len(classes) and all(one in place for one in group.classes.tolist()):
                chosen = moment[np.ix_([place[one] for one in group.classes], [place[one] for one in group.classes])]
                scale = np.sqrt(np.maximum(np.diag(chosen), 1e-30))
                tables.append(chosen / scale / scale[:, None])
        if tables and np.isfinite(worth[group.classes]).all():
            worth[group.classes] = _in_order(np.mean(tables, axis=0), worth[group.classes])
    return worth


def _in_order(table: np.ndarray, worth: np.ndarray) -> np.ndarray:
    inverse = np.linalg.inv(table + _RIDGE * np.eye(len(table)))
    left = np.arange(len(worth))
    found = np.zeros(len(worth))
    highest = 0.0
    while len(left):
        costs = worth[left] / np.maximum(np.diag(inverse) * (1 + _RIDGE), 1.0)
        least = int(np.argmin(costs))
        highest = max(highest * (1 + 1e-9), float(costs[least]))
        found[left[least]] = highest
        rest = np.delete(np.arange(len(left)), least)
        column = inverse[rest, least]
        inverse = inverse[np.ix_(rest, rest)] - np.outer(column, column) / inverse[least, least]
        left = left[rest]
    return found


def _blend(moments: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """M, (removed, kept)."""
    inner = moments[np.ix_(kept, kept)]
    ridge = _RIDGE * max(float(np.trace(inner)) / len(inner), 1e-30)
    return np.linalg.solve(inner + ridge * np.eye(len(inner)), moments[np.ix_(kept, ~kept)]).T


def _readers(channels: Channels, model: Model, signature: str) -> list[Reader]:
    """The layers of a signature that read one axis of channels with a kernel of their own."""
    graph = model.graph
    outputs = model.signatures[signature].outputs
    labels = [label(signature, name, part) for name, info in outputs.items() for part, _ in tensor_names(info)]
    live = graph.reachable(split(graph.outputs[each])[0] for each in labels)
    found = []
    for product in channels.spread.products:
        if product.reads is None or product.node not in live:
            continue
        reader = Reader(*product.reads)
        value = graph.constant(reader.weights)
        shape = channels.spread.shape(reader.x)
        if value is None or shape is None or value.shape[reader.axis] > _MAX_CHANNELS:
            continue
        alone = sum(other.reads is not None and other.reads[2] == reader.weights for other in channels.spread.products)
        if shape[reader.x_axis] != value.shape[reader.axis] or alone > 1 or len(graph.uses(reader.weights)) > 1:
            continue
        found.append(reader)
    return found
