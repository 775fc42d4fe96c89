"""Products and convolutions: they read the channels of one axis of their weights, and make those of another.

    y[o] = sum_i W[i, o] x[i]      depthwise: y[c m] = W[c, m] x[c]      groups: y[g, o] = sum_i W[i, (g, o)] x[g, i]

Of a grouped convolution whole groups go where they are narrow, or the same channels of every group.
"""

from __future__ import annotations

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.channels.sizes import resize, writable
from tfopt.channels.spread import Spread, Unknown
from tfopt.rules.constants import attr
from tfopt.rules.labels import product_labels
from tfopt.rules.view import View

# Groups narrower than this go as a whole.
_NARROW = 8


def _product(s: Spread, node: NodeDef) -> None:
    labels = product_labels(View(s.graph, {ref: s.shape(ref) for ref in (*node.input, node.name)}), node)
    if labels is None:
        raise Unknown("its equation is not understood")
    operands = [s.operand(node, 0), s.operand(node, 1)]
    shapes = [s.shape(ref) for ref in s.inputs(node)]
    *sides, result = labels
    if any(len(side) != len(axes) for side, axes in zip(sides, operands, strict=True)):
        raise Unknown("its equation does not fit its operands")
    joined: dict[str, np.ndarray] = {}
    sizes: dict[str, int | None] = {}
    for side, axes, shape in zip(sides, operands, shapes, strict=True):
        for label, axis, size in zip(side, axes, shape or (), strict=True):
            if label in joined and axis.ndim and joined[label].ndim and axis.shape != joined[label].shape:
                raise Unknown("it broadcasts")
            joined[label] = s.ids.join(joined[label], axis) if label in joined else axis
            sizes[label] = size
            if label not in result and not any(label in other for other in sides if other is not side):
                s.ids.pin(axis, f"{node.op} {node.name!r} sums over them, or broadcasts them")
    makes = None
    for index, ref in enumerate(s.inputs(node)):
        other = sides[1 - index]
        for position, label in enumerate(sides[index]):
            if s.constant_name(ref) is None:
                continue
            if label in result and label not in other:
                s.role(ref, position, "makes")
                makes = joined[label]
            else:
                s.role(ref, position, "scales" if label in result else "reads")
    s.result(node, tuple(joined[label] if label in joined else s.ids.fixed(1, "broadcast") for label in result))
    summed = [label for label in sides[0] if label in sides[1] and label not in result]
    reads = None
    if len(summed) == 1:
        constant = 0 if s.constant_name(s.inputs(node)[0]) else 1
        places = [side.index(summed[0]) for side in sides]
        reads = s.inputs(node)[1 - constant], places[1 - constant], s.inputs(node)[constant], places[constant]
    s.product(node, list(sizes.values()), list(joined.values()), makes, reads)


def channel_axis(node: NodeDef, rank: int) -> int:
    """Which axis of the input of a convolution, or of a pool, holds its channels."""
    default = "NHWC" if rank == 4 else "NDHWC"
    return 1 if (attr(node, "data_format").s.decode() or default).startswith("NC") else rank - 1


def _convolution(s: Spread, node: NodeDef) -> None:
    x, w = s.operand(node, 0), s.operand(node, 1)
    channel = channel_axis(node, len(x))
    window, reads, makes = w[:-2], w[-2], w[-1]
    if not x[channel].ndim:
        raise Unknown("the number of its channels is not known")
    groups = len(x[channel]) // len(reads)
    if groups == 1:
        s.ids.join(x[channel], reads)
    else:
        inner, outer = x[channel].reshape(groups, -1), makes.reshape(groups, -1)
        if min(inner.shape[1], outer.shape[1]) < _NARROW:
            s.ids.join(inner, inner[:, :1])
            s.ids.join(outer, inner[:, :1])
            s.ids.pin(reads, f"{node.op} {node.name!r} has groups, which go as a whole")
        else:
            s.ids.join(inner, reads[None, :])
            s.ids.join(outer, outer[:1])
    for axis in window:
        s.ids.pin(axis, "they are positions of a window")
    s.role(node.input[1], -2, "reads")
    s.role(node.input[1], -1, "makes")
    _finish(s, node, x, channel, makes)
    sizes = [*_positions(s, node.name, channel), *(len(axis) for axis in w)]
    place = (node.input[0], channel, node.input[1], len(w) - 2) if groups == 1 else None
    s.product(node, sizes, [reads, makes], makes, place)


def _depthwise(s: Spread, node: NodeDef) -> None:
    x, w = s.operand(node, 0), s.operand(node, 1)
    channel = channel_axis(node, len(x))
    through = s.ids.join(x[channel], w[-2])
    for axis in w[:-2]:
        s.ids.pin(axis, "they are positions of a window")
    if len(w[-1]) > 1:
        s.ids.pin(w[-1], f"{node.op} {node.name!r} makes them of each of its channels")
    s.role(node.input[1], -2, "scales")
    _finish(s, node, x, channel, np.repeat(through, len(w[-1])))
    s.product(node, [*_positions(s, node.name, channel), *(len(axis) for axis in w)], [w[-2]], None)


def _transposed(s: Spread, node: NodeDef) -> None:
    w, x = s.operand(node, 1), s.operand(node, 2)
    channel = channel_axis(node, len(x))
    if x[channel].shape != w[-1].shape:
        raise Unknown("it has groups")
    sizes = s.inputs(node)[0]
    if not writable(s.graph, sizes, channel):
        raise Unknown("its sizes are computed")
    s.ids.join(x[channel], w[-1])
    for axis in w[:-2]:
        s.ids.pin(axis, "they are positions of a window")
    s.role(node.input[1], -1, "reads")
    s.role(node.input[1], -2, "makes")
    _finish(s, node, x, channel, w[-2])
    resize(s, node, 0, {channel: w[-2]})
    sizes_of = [*_positions(s, node.input[2], channel), *(len(axis) for axis in w)]
    place = (node.input[2], channel, node.input[1], len(w) - 1)
    s.product(node, sizes_of, [w[-1], w[-2]], w[-2], place)


def _positions(s: Spread, ref: str, channel: int) -> list[int | None]:
    """The sizes of all axes but that of the channels."""
    shape = s.shape(ref) or ()
    return [size for axis, size in enumerate(shape) if axis != channel]


def _finish(s: Spread, node: NodeDef, x: tuple[np.ndarray, ...], channel: int, makes: np.ndarray) -> None:
    """The result of a convolution: its channels, the batch, and positions, which stay."""
    for axis, ids in enumerate(x):
        if axis not in (0, channel):
            s.ids.pin(ids, f"{node.op} {node.name!r} moves a window over them")
    shape = s.shape(node.name)
    if shape is None:
        raise Unknown("the rank of its result is not known")
    axes = [s.ids.fixed(size, "they are positions") for size in shape]
    axes[0], axes[channel] = x[0], makes
    s.result(node, tuple(axes))


def _lookup(s: Spread, node: NodeDef) -> None:
    params, indices = s.operand(node, 0), s.shape(s.inputs(node)[1])
    axis = int(s.integers(node, 2)) if node.op == "GatherV2" else 0
    if indices is None or attr(node, "batch_dims").i:
        raise Unknown("what it looks up is not known")
    axis %= len(params)
    s.ids.pin(params[axis], f"{node.op} {node.name!r} looks them up")
    for position in range(len(params)):
        if position != axis:
            s.role(node.input[0], position, "makes")
    found = [s.ids.fixed(size, "they are what was looked up") for size in indices]
    s.result(node, (*params[:axis], *found, *params[axis + 1 :]))


HANDLERS = {
    **dict.fromkeys(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"), _product),
    **dict.fromkeys(("Conv2D", "Conv3D"), _convolution),
    "DepthwiseConv2dNative": _depthwise,
    **dict.fromkeys(("Conv2DBackpropInput", "Conv3DBackpropInputV2"), _transposed),
    **dict.fromkeys(("Gather", "GatherV2"), _lookup),
}
