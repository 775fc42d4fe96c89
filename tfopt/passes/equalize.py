"""equalize: scales the channels between layers so that the steps of one quantization serve all of them alike.

    W2 relu(W1 x + b) = (W2 / k) relu(k W1 x + k b)     k_i = sqrt(r2_i / r1_i)

by="weights": r1_i = max_j |W1_ij|, r2_i = max_j |W2_ji|, in turns until nothing moves, after which a channel has the
same range on both sides (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV
2019, section 4.1). It serves weights that have one scale for all channels.

by="activations": r1_i = max |x_i|, x the channel as layers read it on representative rows, and r2_i its largest weight
as a part of the scale of that output channel, max_j |W2_ji| / max_i |W2_ji| (after Xiao et al., "SmoothQuant", ICML
2023). It serves weights with a scale per output channel, which W1 / k then has for nothing: what counts is how the
channels share the one scale of the activation, and the scales of W2.

Both trade weights for something else, which 8 bits of them can afford and 4 mostly cannot.

ReLU6 lets no scale through. With relu6="rows" it does for channels that stay below 6 on the representative rows by a
margin, before and after: exact on these rows, and on others while they keep to that margin.
"""

from __future__ import annotations

import numpy as np

from tfopt.calibration import values
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.graph import infer_shapes
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.rewrite import Log, Refused
from tfopt.rules import scale_groups
from tfopt.rules.activations import protected
from tfopt.rules.commit import commit
from tfopt.rules.linear import CONVOLUTIONS, TRANSPOSED, refine_shapes
from tfopt.rules.scale_groups import Edge, Group
from tfopt.rules.view import View

BY = ("activations", "weights")
RELU6 = ("keep", "rows")

# Beyond this, a channel that hardly does anything would set the range of the tensors around it.
_MOST = 2.0**8

# A channel counts as no smaller than this part of the largest: rows that were not seen may move it.
_LEAST = 1 / 64

# How much higher rows that were not seen may go under a ReLU6.
_HEADROOM = 2.0

_MAX_TURNS = 30
_SETTLED = 1e-2


def run(model: Model, log: Log, data: Data, by: str = "activations", relu6: str = "keep") -> None:
    """Equalizes the layers of the main body, in place."""
    for option, value, known in (("by", by, BY), ("relu6", relu6, RELU6)):
        if value not in known:
            raise TfoptError(f"equalize: option {option} is one of {', '.join(known)}; received {value!r}")
    graph, library = model.graph, model.library()
    view = View(graph, infer_shapes(graph, library), protected(graph), library)
    refine_shapes(view)
    handlers = scale_groups.THROUGH_RELU6 if relu6 == "rows" else scale_groups.HANDLERS
    groups = scale_groups.find(view, log, "equalize", handlers)
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if by == "activations" or any(group.clipped for group in groups):
        seen = _extremes(model, data, groups, by == "activations")
    most = [_room(group, seen) for group in groups]
    if any(group.clipped for group in groups):
        held, total = sum(int(np.sum(limit <= 1)) for limit in most), sum(group.size for group in groups)
        log.notes.append(
            "relu6=rows: outputs stay the same while no scaled channel reaches twice what it did on "
            f"{len(_rows(data))} rows; {held} of {total} channels came near the 6 and stay as they are"
        )
    if by == "weights":
        scales = _by_weights(view, groups, most)
    else:
        scales = [_by_activations(view, group, limit, seen) for group, limit in zip(groups, most, strict=True)]
    for group, k in zip(groups, scales, strict=True):
        _scale(view, group, k, log)
    graph.sweep()


def _scale(view: View, group: Group, k: np.ndarray, log: Log) -> None:
    if np.abs(np.log(k)).max() < _SETTLED:
        log.refused["equalize", group.layer] = (
            "its channels are equal already, or none may be scaled, or no layer reads them"
        )
        return
    try:
        plan = group.plan(view, k)
        commit([plan], same_count=True)
    except Refused as refusal:
        log.refused["equalize", group.layer] = str(refusal)
        return
    ops = " + ".join(sorted({view.graph.nodes[name].op for name in plan.linears}))
    log.applied[f"channels between {ops}"] += 1


# -- what was seen ---------------------------------------------------------------------------------------------------


def _rows(data: Data) -> Dataset:
    return data.need_rows("equalize")


def _extremes(model: Model, data: Data, groups: list[Group], read: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The least and the largest value of every channel of the tensors that matter, over the rows."""
    edges = {edge.name: edge for group in groups for edge in [*group.clipped, *(group.read if read else ())]}
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for _, tensors in values(model, data.signature, list(edges), _rows(data)) if edges else ():
        for ref, array in tensors.items():
            axes = tuple(a for a in range(array.ndim) if edges[ref].index.shape[a] == 1)
            low, high = array.min(axis=axes, keepdims=True), array.max(axis=axes, keepdims=True)
            before = seen.get(ref, (low, high))
            seen[ref] = np.minimum(before[0], low), np.maximum(before[1], high)
    return seen


def _room(group: Group, seen: dict[str, tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """How large the scale of each channel may be; 1 where it may not change."""
    most = np.full(group.size, _MOST)
    for edge in group.clipped:
        highest = edge.largest(seen[edge.name][1], group.size)
        most = np.minimum(most, 6 / (_HEADROOM * np.maximum(highest, 6 / _MOST)))
    return np.maximum(most, 1)


def _allowed(k: np.ndarray, most: np.ndarray) -> np.ndarray:
    return np.where(most > 1, np.clip(k, 1 / _MOST, most), 1)


# -- the scales ------------------------------------------------------------------------------------------------------


def _by_activations(
    view: View, group: Group, most: np.ndarray, seen: dict[str, tuple[np.ndarray, np.ndarray]]
) -> np.ndarray:
    ranges = np.zeros(group.size)
    for edge in group.read:
        low, high = seen[edge.name]
        ranges = np.maximum(ranges, edge.largest(np.maximum(-low, high), group.size))
    if not ranges.any():
        return np.ones(group.size)
    ranges = np.maximum(ranges, _LEAST * ranges.max())
    parts = np.zeros(group.size)
    for edge in group.weights:
        if not edge.grows:
            parts = np.maximum(parts, edge.largest(_parts(view, edge), group.size))
    k = np.sqrt(np.maximum(parts, _LEAST) / ranges)
    # The range of the activation stays what it was, so that only channels below it move.
    return _allowed(k * ranges.max() / (k * ranges).max(), most)


def _parts(view: View, edge: Edge) -> np.ndarray:
    """|w| over the largest |w| of its output channel."""
    weights = view.value(scale_groups.source_of(view, edge.name))
    assert weights is not None
    op, rank = view.graph.nodes[edge.name].op, weights.ndim
    if op == "DepthwiseConv2dNative":
        outputs = {rank - 2, rank - 1}
    elif op in CONVOLUTIONS | TRANSPOSED:
        outputs = {rank - 2 if op in TRANSPOSED else rank - 1}
    else:
        outputs = {axis for axis in range(rank) if edge.index.shape[axis] == 1}
    size = np.abs(weights)
    largest = size.max(axis=tuple(a for a in range(rank) if a not in outputs), keepdims=True, initial=0)
    return np.divide(size, largest, out=np.zeros_like(size), where=largest > 0)


def _by_weights(view: View, groups: list[Group], most: list[np.ndarray]) -> list[np.ndarray]:
    tables = _tables(view, groups)
    scales = [np.ones(group.size) for group in groups]
    for _ in range(_MAX_TURNS):
        moved = 0.0
        for position, group in enumerate(groups):
            up, down = np.zeros(group.size), np.zeros(group.size)
            for edge in group.weights:
                side = up if edge.grows else down
                np.maximum(side, edge.largest(tables[edge.name], group.size), out=side)
            live = (up > 0) & (down > 0)
            step = np.sqrt(np.divide(down, up, out=np.ones_like(up), where=live))
            k = _allowed(scales[position] * step, most[position])
            step, scales[position] = k / scales[position], k
            wide = np.append(step, 1)
            for edge in group.weights:
                tables[edge.name] *= wide[edge.index] if edge.grows else 1 / wide[edge.index]
            moved = max(moved, float(np.abs(np.log(step)).max()))
        if moved < _SETTLED:
            break
    return scales


def _tables(view: View, groups: list[Group]) -> dict[str, np.ndarray]:
    """The largest |w| of every layer, over the axes on which no scale varies."""
    edges = [edge for group in groups for edge in group.weights]
    tables = {}
    for name in dict.fromkeys(edge.name for edge in edges):
        weights = view.value(scale_groups.source_of(view, name))
        assert weights is not None
        shape = np.broadcast_shapes(*(edge.index.shape for edge in edges if edge.name == name))
        axes = tuple(a for a, size in enumerate(shape) if size == 1)
        tables[name] = np.abs(weights).max(axis=axes, keepdims=True)
    return tables


PASS = Pass(
    "equalize",
    run,
    options={"by": "activations", "relu6": "keep"},
    needs=("fold_affine",),
    learns=True,
    keeps=("sparsity",),
)
