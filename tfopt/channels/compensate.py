"""What channels that go meant to their readers, put on the channels that stay.

    x ~ M x',  M = E[x x''] (E[x' x''] + r I)^-1        x whole, x' what is left of it in the cut model, x'' transposed
    W x ~ (W M) x'

the least-squares answer of a linear layer, over rows and positions (compare He, Zhang and Sun 2017, which solves it for
whole windows). One layer after the other is fitted, so that each makes up for what those before it left: no training,
and two runs of the rows for each layer. Sparse and clustered kernels stay as they are.
"""

from __future__ import annotations

import dataclasses
import math
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
_RIDGE = 1e-4  # r over the mean of the diagonal
_FLOPS = 2e13  # of all runs together, some minutes on a few cores
_ELEMENTS = 1 << 26  # of a tensor that is held
_LEAST_ROWS = 16
_MAX_CHANNELS = 2048


@dataclasses.dataclass(frozen=True)
class Reader:
    """A layer: reference of x and its axis of channels, name of W and its axis."""

    x: str
    x_axis: int
    weights: str
    axis: int


Moments = Mapping[Reader, np.ndarray]


def compensate(
    channels: Channels, whole: Model, cut: Model, moments: Moments, signature: str, rows: Dataset, kept: np.ndarray
) -> list[str]:
    """Fits the kernels of a cut model to the whole one, in place, in the order of the computation.

    Args:
      channels: of the whole model.
      whole: the model before the cut.
      cut: the same after it.
      moments: which layers to fit, see `second_moments`.
      signature: that of the rows.
      rows: inputs; at most 256 of them are used, fewer for large models.
      kept: mask over the classes.

    Returns:
      The names of the kernels that changed.
    """
    changed = []
    runs = 2 * max(1, len(moments)) * max(2 * channels.macs(channels.everything()), 1)
    for reader in moments:
        value = whole.graph.constant(reader.weights)
        assert value is not None
        if is_sparse(value) or clusters(value) is not None:
            continue
        size = math.prod(n or 1 for n in channels.spread.shape(reader.x) or ())
        count = int(np.clip(min(_FLOPS / runs, _ELEMENTS / size), _LEAST_ROWS, _ROWS))
        before, after = (_read(model, signature, reader, rows.take(slice(0, count))) for model in (whole, cut))
        if before.shape == after.shape and np.allclose(before, after, rtol=1e-4, atol=1e-5 * np.abs(before).max()):
            continue  # nothing that it depends on has changed
        front = np.moveaxis(value, reader.axis, 0).astype(np.float64)
        fitted = np.moveaxis(np.tensordot(_blend(before, after), front, axes=(0, 0)), 0, reader.axis)
        for axis in range(value.ndim):
            if axis != reader.axis:
                fitted = np.compress(kept[channels.axis(reader.weights, axis)], fitted, axis=axis)
        cut.graph.set_constant(reader.weights, fitted.astype(value.dtype))
        changed.append(reader.weights)
    return changed


def _read(model: Model, signature: str, reader: Reader, rows: Dataset) -> np.ndarray:
    """What a layer reads, (rows x positions, channels) float32."""
    parts = []
    for _, tensors in values(model, signature, [reader.x], rows):
        table = np.moveaxis(tensors[reader.x], reader.x_axis, -1)
        parts.append(table.reshape(-1, table.shape[-1]).astype(np.float32))
    return np.concatenate(parts)


def _blend(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """M, (channels before, channels after) float64."""
    inner = (after.T @ after).astype(np.float64)
    ridge = _RIDGE * max(float(np.trace(inner)) / len(inner), 1e-30)
    return np.linalg.solve(inner + ridge * np.eye(len(inner)), (after.T @ before).astype(np.float64)).T


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
