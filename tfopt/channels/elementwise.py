"""Ops that work on each element by itself, and those that see each channel alone: pools, norms, windows.

y[c] = f(x[c], k[c])
"""

from __future__ import annotations

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.channels.linear import channel_axis
from tfopt.channels.spread import Spread, Unknown

_UNARY = (
    *("Relu", "Relu6", "Elu", "Selu", "LeakyRelu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Exp", "Expm1", "Log"),
    *("Log1p", "Neg", "Abs", "Sqrt", "Rsqrt", "Square", "Reciprocal", "Inv", "Erf", "Erfc", "Sin", "Cos", "Tan"),
    *("Sign", "Floor", "Ceil", "Round", "Rint", "Identity", "StopGradient", "PreventGradient", "Snapshot", "Cast"),
    *("CheckNumerics", "IsNan", "IsInf", "IsFinite", "LogicalNot", "ZerosLike", "OnesLike", "Atan", "Sinh", "Cosh"),
    *("FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars"),
)
_BROADCAST = (
    *("Add", "AddV2", "Sub", "Mul", "RealDiv", "Div", "DivNoNan", "FloorDiv", "FloorMod", "Maximum", "Minimum"),
    *("Pow", "SquaredDifference", "AddN", "SelectV2", "Xdivy", "Xlogy", "MulNoNan", "Atan2", "ClipByValue"),
    *("Greater", "GreaterEqual", "Less", "LessEqual", "Equal", "NotEqual", "LogicalAnd", "LogicalOr"),
)
_POOLS = ("MaxPool", "AvgPool", "MaxPool3D", "AvgPool3D")
_RESIZES = ("ResizeBilinear", "ResizeNearestNeighbor", "ResizeBicubic", "ResizeArea")
_NORMS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")


def _unary(s: Spread, node: NodeDef) -> None:
    s.result(node, s.operand(node, 0))


def _broadcast(s: Spread, node: NodeDef) -> None:
    operands = [s.operand(node, index) for index in range(len(s.inputs(node)))]
    axes = []
    for axis in range(-max(map(len, operands)), 0):
        parts = [operand[axis] for operand in operands if len(operand) >= -axis]
        wide = [part for part in parts if part.shape != (1,)] or parts
        if len({part.shape for part in wide if part.ndim}) > 1:
            raise Unknown("its operands do not broadcast")
        if wide is not parts:
            for part in parts:
                if part.shape == (1,):
                    s.ids.pin(part, f"{node.op} {node.name!r} broadcasts it")
        axes.append(s.ids.join(*wide))
    s.result(node, tuple(axes))
    if node.op == "Mul":
        _gamma(s, node)


def _gamma(s: Spread, node: NodeDef) -> None:
    """gamma / sqrt(variance + epsilon), as Keras 3 writes a batch norm."""
    refs = s.inputs(node)
    for ref, other in (refs, refs[::-1]):
        if s.graph.producer(ref).op == "Rsqrt" and s.constant_name(other) and len(s.operand(node, 0)) == 1:
            s.role(other, 0, "gamma")


def _select(s: Spread, node: NodeDef) -> None:
    condition, x, y = (s.operand(node, index) for index in range(3))
    if len(condition) == len(x):
        axes = tuple(s.ids.join(*parts) for parts in zip(condition, x, y, strict=True))
    else:  # a vector chooses rows
        axes = tuple(s.ids.join(*parts) for parts in zip(x, y, strict=True))
        s.pin(condition, "they choose rows")
    s.result(node, axes)


def _bias(s: Spread, node: NodeDef) -> None:
    x, (bias,) = s.operand(node, 0), s.operand(node, 1)
    channel = 1 if node.attr["data_format"].s.startswith(b"NC") else len(x) - 1
    s.result(node, (*x[:channel], s.ids.join(x[channel], bias), *x[channel + 1 :]))


def _window(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    channel = channel_axis(node, len(x))
    window = node.attr["ksize"].list.i
    if len(window) == len(x) and (window[channel] != 1 or node.attr["strides"].list.i[channel] != 1):
        raise Unknown("it pools over channels")
    _keep_channels(s, node, x, channel)


def _resize(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    _keep_channels(s, node, x, len(x) - 1)


def _blocks(s: Spread, node: NodeDef) -> None:
    """SpaceToBatchND and BatchToSpaceND: a dilated convolution on the axes that the block counts."""
    x, block = s.operand(node, 0), s.integers(node, 1)
    shape = s.shape(node.name)
    if shape is None:
        raise Unknown("its shape is not known")
    for axis in x[: 1 + block.size]:
        s.ids.pin(axis, "they are positions")
    positions = [s.ids.fixed(size, "they are positions") for size in shape[: 1 + block.size]]
    s.result(node, (*positions, *x[1 + block.size :]))


def _keep_channels(s: Spread, node: NodeDef, x: tuple[np.ndarray, ...], channel: int) -> None:
    shape = s.shape(node.name)
    if shape is None:
        raise Unknown("its shape is not known")
    for axis, ids in enumerate(x):
        if axis not in (0, channel):
            s.ids.pin(ids, "they are positions")
    axes = [s.ids.fixed(size, "they are positions") for size in shape]
    axes[0], axes[channel] = x[0], x[channel]
    s.result(node, tuple(axes))


def _norm(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    channel = channel_axis(node, len(x))
    ids = x[channel]
    for index in range(1, 5):
        (vector,) = s.operand(node, index)
        if vector.shape != (0,):
            ids = s.ids.join(ids, vector)
    s.role(node.input[1], 0, "gamma")
    s.fixed(node, f"they are statistics of {node.op} {node.name!r}")
    s.result(node, (*x[:channel], ids, *x[channel + 1 :]))
    for port in (1, 2):
        s.result(node, (ids,), port)


def _per_channel_range(s: Spread, node: NodeDef) -> None:
    x, (low,), (high,) = (s.operand(node, index) for index in range(3))
    s.result(node, (*x[:-1], s.ids.join(x[-1], low, high)))


HANDLERS = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(_BROADCAST, _broadcast),
    **dict.fromkeys(_POOLS, _window),
    **dict.fromkeys(_RESIZES, _resize),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(("SpaceToBatchND", "BatchToSpaceND"), _blocks),
    **dict.fromkeys(("BiasAdd", "BiasAddV1"), _bias),
    "Select": _select,
    "FakeQuantWithMinMaxVarsPerChannel": _per_channel_range,
}
