"""Parts of an axis: Split, SplitV, Slice, StridedSlice. Their bounds are written anew when channels before them go."""

from __future__ import annotations

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.channels.ids import live
from tfopt.channels.spread import Kept, Spread, Unknown
from tfopt.graph import make_node
from tfopt.rules.constants import attr


def _split(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 1)
    axis, parts = int(s.integers(node, 0)) % len(x), attr(node, "num_split").i
    if not x[axis].ndim:
        raise Unknown("the size of the axis is not known")
    pieces = np.split(x[axis], parts)
    for port, piece in enumerate(pieces):
        s.result(node, (*x[:axis], piece, *x[axis + 1 :]), port)

    def cut(kept: Kept) -> None:
        sizes = np.array([kept(piece).sum() for piece in pieces], np.int32)
        if len(set(sizes)) > 1:
            data, control = s.inputs(s.graph.nodes[node.name]), s.graph.control_inputs(node)
            where = s.graph.add_constant(f"{node.name}/sizes", sizes)
            refs = [data[1], where, data[0], *(f"^{name}" for name in control)]
            new = make_node(node.name, "SplitV", refs, num_split=parts)
            new.attr["T"].CopyFrom(node.attr["T"])
            new.attr["Tlen"].type = 3  # DT_INT32
            s.graph.replace(new)

    s.cuts.append(cut)


def _split_sizes(s: Spread, node: NodeDef) -> None:
    x, sizes = s.operand(node, 0), np.array(s.integers(node, 1))
    axis = int(s.integers(node, 2)) % len(x)
    if not x[axis].ndim:
        raise Unknown("the size of the axis is not known")
    sizes[sizes < 0] = len(x[axis]) - sizes[sizes >= 0].sum()
    pieces = np.split(x[axis], np.cumsum(sizes)[:-1])
    for port, piece in enumerate(pieces):
        s.result(node, (*x[:axis], piece, *x[axis + 1 :]), port)

    def cut(kept: Kept) -> None:
        left = np.array([kept(piece).sum() for piece in pieces], sizes.dtype)
        if (left != sizes).any():
            s.graph.set_input(node.name, 1, s.graph.add_constant(f"{node.name}/sizes", left))

    s.cuts.append(cut)


def _slice(s: Spread, node: NodeDef) -> None:
    x, shape = s.operand(node, 0), s.shape(node.name)
    begin, size = (s.graph.constant(ref) for ref in s.inputs(node)[1:3])
    if shape is None:
        raise Unknown("its shape is not known")
    if begin is None or size is None:
        if any(live(axis) for axis in x):
            raise Unknown("its bounds are computed")
        s.fixed(node, f"the bounds of {node.op} {node.name!r} are computed")
        return
    ends = [None if n < 0 else int(b + n) for b, n in zip(begin, size, strict=True)]
    axes = []
    for ids, low, high in zip(x, begin, ends, strict=True):
        axes.append(ids[int(low) : high] if ids.ndim else ids)
    s.result(node, tuple(axes))

    def cut(kept: Kept) -> None:
        new_begin, new_size = np.array(begin), np.array(size)
        for axis, ids in enumerate(x):
            if ids.ndim and not kept(ids).all():
                new_begin[axis] = kept(ids)[: int(begin[axis])].sum()
                new_size[axis] = size[axis] if size[axis] < 0 else kept(axes[axis]).sum()
        if (new_begin != begin).any() or (new_size != size).any():
            s.graph.set_input(node.name, 1, s.graph.add_constant(f"{node.name}/begin", new_begin))
            s.graph.set_input(node.name, 2, s.graph.add_constant(f"{node.name}/size", new_size))

    s.cuts.append(cut)


def _strided(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    bounds = [s.graph.constant(ref) for ref in s.inputs(node)[1:4]]
    spec = _entries(node, len(x), s.shape(s.inputs(node)[1]))
    axes: list[np.ndarray] = []
    edges: list[tuple[int, int, int, int]] = []  # entry of the bounds, axis, from, to
    for kind, entry, axis in spec:
        if kind == "new":
            axes.append(s.ids.fixed(1, "it was inserted"))
            continue
        ids = x[axis]
        if kind == "all":
            axes.append(ids)
            continue
        if kind == "one":
            s.ids.pin(ids, f"{node.op} {node.name!r} takes one of them")
            continue
        begin, end, stride = (None if bound is None else int(bound[entry]) for bound in bounds)
        begin = None if _bit(node, "begin_mask", entry) else _known(begin, live(ids))
        end = None if _bit(node, "end_mask", entry) else _known(end, live(ids))
        if stride != 1 or not ids.ndim:
            if stride is None or live(ids):
                raise Unknown("it takes every second of them, or its bounds are computed")
            axes.append(s.ids.fixed(None, "their number is not known"))
            continue
        low, high, _ = slice(begin, end).indices(len(ids))
        axes.append(ids[low:high])
        edges.append((entry, axis, low, high))
    shape = s.shape(node.name)
    if shape is not None:
        axes = [np.full(n, ids) if n is not None and not ids.ndim else ids for n, ids in zip(shape, axes, strict=True)]
    s.result(node, tuple(axes))

    def cut(kept: Kept) -> None:
        begin, end = bounds[:2]
        if begin is None or end is None:
            return
        new_begin, new_end = np.array(begin), np.array(end)
        for entry, axis, low, high in edges:
            if not kept(x[axis]).all():
                new_begin[entry] = kept(x[axis])[:low].sum()
                new_end[entry] = kept(x[axis])[:high].sum()
        if (new_begin != begin).any() or (new_end != end).any():
            s.graph.set_input(node.name, 1, s.graph.add_constant(f"{node.name}/begin", new_begin))
            s.graph.set_input(node.name, 2, s.graph.add_constant(f"{node.name}/end", new_end))

    s.cuts.append(cut)


def _known(bound: int | None, needed: bool) -> int | None:
    if bound is None:
        raise Unknown("its bounds are computed")
    return bound


def _bit(node: NodeDef, mask: str, entry: int) -> bool:
    return bool(attr(node, mask).i >> entry & 1)


def _entries(node: NodeDef, rank: int, bounds: tuple[int | None, ...] | None) -> list[tuple[str, int, int]]:
    """What the entries of the bounds say: (kind, entry, axis) with kinds "new", "one", "part" and "all"."""
    if not bounds or bounds[0] is None:
        raise Unknown("the rank of its bounds is not known")
    count = bounds[0]
    used = sum(not _bit(node, "new_axis_mask", i) and not _bit(node, "ellipsis_mask", i) for i in range(count))
    found, axis = [], 0
    for entry in range(count):
        if _bit(node, "ellipsis_mask", entry):
            for _ in range(rank - used):
                found.append(("all", entry, axis))
                axis += 1
        elif _bit(node, "new_axis_mask", entry):
            found.append(("new", entry, -1))
        else:
            found.append(("one" if _bit(node, "shrink_axis_mask", entry) else "part", entry, axis))
            axis += 1
    return found + [("all", -1, rest) for rest in range(axis, rank)]


HANDLERS = {"Split": _split, "SplitV": _split_sizes, "Slice": _slice, "StridedSlice": _strided}
