"""Ops that move whole axes, add to them, join tensors along one, or reduce some."""

from __future__ import annotations

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.channels.ids import live
from tfopt.channels.sizes import resize, writable
from tfopt.channels.spread import Kept, Spread, Unknown
from tfopt.rules.constants import attr


def _transpose(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    s.result(node, tuple(x[axis] for axis in s.integers(node, 1)))


def _expand(s: Spread, node: NodeDef) -> None:
    x = list(s.operand(node, 0))
    axis = int(s.integers(node, 1).ravel()[0])
    x.insert(axis if axis >= 0 else axis + len(x) + 1, s.ids.fixed(1, "it was inserted"))
    s.result(node, tuple(x))


def _squeeze(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    gone = {axis % len(x) for axis in attr(node, "squeeze_dims").list.i}
    gone = gone or {axis for axis, ids in enumerate(x) if ids.shape == (1,)}
    for axis in gone:
        s.ids.pin(x[axis], "it is squeezed")
    s.result(node, tuple(ids for axis, ids in enumerate(x) if axis not in gone))


def _pad(s: Spread, node: NodeDef) -> None:
    axes = []
    paddings = s.integers(node, 1)
    added: dict[tuple[int, int], np.ndarray] = {}
    for axis, (ids, widths) in enumerate(zip(s.operand(node, 0), paddings, strict=True)):
        if widths.any() and node.op == "MirrorPad":
            ids = s.ids.pin(ids, "they are mirrored")
        if ids.ndim and widths.any():
            for side, size in enumerate(widths.tolist()):  # padding is channels too, where it meets some
                added[axis, side] = s.ids.new(size) if live(ids) else s.ids.fixed(size, "they are padding")
            ids = np.concatenate([added[axis, 0], ids, added[axis, 1]])
        axes.append(ids)
    s.result(node, tuple(axes))

    def cut(kept: Kept) -> None:
        left = np.array(paddings)
        for place, ids in added.items():
            left[place] = kept(ids).sum()
        if (left != paddings).any():
            s.graph.set_input(node.name, 1, s.graph.add_constant(f"{node.name}/paddings", left))

    s.cuts.append(cut)


def _concat(s: Spread, node: NodeDef) -> None:
    count = len(s.inputs(node)) - 1
    first = 1 if node.op == "Concat" else 0
    operands = [s.operand(node, first + index) for index in range(count)]
    axis = int(s.integers(node, 0 if first else count)) % len(operands[0])
    axes = []
    for position, parts in enumerate(zip(*operands, strict=True)):
        if position != axis:
            axes.append(s.ids.join(*parts))
        elif all(part.ndim for part in parts):
            axes.append(np.concatenate(parts))
        else:
            raise Unknown("the size of one of its parts is not known")
    s.result(node, tuple(axes))


def _pack(s: Spread, node: NodeDef) -> None:
    operands = [s.operand(node, index) for index in range(len(s.inputs(node)))]
    axes = [s.ids.join(*parts) for parts in zip(*operands, strict=True)]
    axes.insert(attr(node, "axis").i % (len(axes) + 1), s.ids.fixed(len(operands), "they were stacked"))
    s.result(node, tuple(axes))


def _unpack(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    axis = attr(node, "axis").i % len(x)
    s.ids.pin(x[axis], f"{node.op} {node.name!r} takes them apart")
    for port in range(attr(node, "num").i):
        s.result(node, (*x[:axis], *x[axis + 1 :]), port)


def _reduce(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    gone = {int(axis) % len(x) for axis in s.integers(node, 1).ravel()}
    for axis in gone:
        if live(x[axis]) and node.op not in ("Mean", "Sum"):
            s.ids.pin(x[axis], f"{node.op} {node.name!r} chooses among them")
    if attr(node, "keep_dims").b:
        axes = [s.ids.fixed(1, "it is reduced") if axis in gone else ids for axis, ids in enumerate(x)]
    else:
        axes = [ids for axis, ids in enumerate(x) if axis not in gone]
    s.result(node, tuple(axes))


def _softmax(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    s.ids.pin(x[-1], f"{node.op} {node.name!r} normalises over them")
    s.result(node, x)


def _scan(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    for axis in s.integers(node, 1).ravel():
        s.ids.pin(x[int(axis) % len(x)], f"{node.op} {node.name!r} depends on their order")
    s.result(node, x)


def _tile(s: Spread, node: NodeDef) -> None:
    axes = []
    for ids, times in zip(s.operand(node, 0), s.integers(node, 1), strict=True):
        if times != 1 and not ids.ndim:
            raise Unknown("the size of an axis that it repeats is not known")
        axes.append(ids if times == 1 else np.tile(ids, times))
    s.result(node, tuple(axes))


def _broadcast_to(s: Spread, node: NodeDef) -> None:
    x, shape = s.operand(node, 0), s.shape(node.name)
    if shape is None:
        raise Unknown("its shape is not known")
    axes = [s.ids.fixed(size, "they are broadcast") for size in shape]
    for axis in range(-len(x), 0):
        if x[axis].shape != (1,):
            axes[axis] = x[axis]
            if live(x[axis]) and not writable(s.graph, s.inputs(node)[1], len(axes) + axis):
                axes[axis] = s.ids.pin(x[axis], f"the shape of {node.op} {node.name!r} is computed")
    resize(s, node, 1, {axis: ids for axis, ids in enumerate(axes) if live(ids)})
    s.result(node, tuple(axes))


def _identities(s: Spread, node: NodeDef) -> None:
    for port, ref in enumerate(s.inputs(node)):
        axes = s.axes(ref)
        if axes is None:
            s.fixed(node, "their rank is not known")
        else:
            s.result(node, axes, port)


_REDUCTIONS = ("Mean", "Sum", "Max", "Min", "Prod", "All", "Any", "ArgMax", "ArgMin")

HANDLERS = {
    "Transpose": _transpose,
    "ExpandDims": _expand,
    "Squeeze": _squeeze,
    **dict.fromkeys(("Pad", "PadV2", "MirrorPad"), _pad),
    **dict.fromkeys(("Concat", "ConcatV2"), _concat),
    "Pack": _pack,
    "Unpack": _unpack,
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("ReverseV2", "Cumsum", "Cumprod"), _scan),
    "Tile": _tile,
    "BroadcastTo": _broadcast_to,
    "IdentityN": _identities,
}
