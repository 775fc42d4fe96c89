"""Which ops work row by row: row i of what they give depends on row i of the inputs that they carry, and on no other.

    f(x)[i] = g(x[i])  =>  f(tile(x, N)) = tile(f(x), N)

So what is the same for all rows can be computed on one row, and repeated later. An op that is not listed here, or is
used in a way that is not, gets its rows repeated before it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Shape
from tfopt.rules.constants import attr

ONCE = "once"  # one row, where the original has N equal ones
BATCH = "batch"  # what the original has, and its first dimension is N
EXACT = "exact"  # what the original has; nothing is known of its dimensions


@dataclasses.dataclass(frozen=True)
class View:
    """A node as the rules see it.

    Attributes:
      node: the node.
      kinds: ONCE, BATCH or EXACT, of each data input.
      shapes: the static shape of each data input, as it is in the rewritten graph.
      constant: the value of a data input, by its number; None where it varies.
    """

    node: NodeDef
    kinds: list[str]
    shapes: list[Shape]
    constant: Callable[[int], np.ndarray | None]

    def rank(self, index: int) -> int | None:
        """The rank of a data input."""
        shape = self.shapes[index]
        return None if shape is None else len(shape)

    def axis(self, index: int, rank: int | None) -> int | None:
        """The one constant axis that a data input holds, counted from the front; None where it is not known."""
        value = self.constant(index)
        if value is None or value.size != 1 or rank is None:
            return None
        return int(value.reshape(-1)[0]) % rank if rank else None


@dataclasses.dataclass(frozen=True)
class Form:
    """How an op works row by row.

    Attributes:
      carries: the data inputs whose rows become the rows of the result; the others are read as a whole by each row.
      native: whether one row of a carried input is taken for all rows where another has N.
    """

    carries: tuple[int, ...]
    native: bool = False


ELEMENTWISE = frozenset(
    """
    Abs Acos Acosh Asin Asinh Atan Atanh Cast Ceil CheckNumerics Cos Cosh Digamma Elu Erf Erfc Exp Expm1 Floor
    Identity Inv Invert IsFinite IsInf IsNan LeakyRelu Lgamma Log Log1p LogicalNot Neg OnesLike PreventGradient
    Reciprocal Relu Relu6 Rint Round Rsqrt Selu Sigmoid Sign Sin Sinh Snapshot Softplus Softsign Sqrt Square
    StopGradient Tan Tanh ZerosLike Bucketize AsString StringLength StringLower StringStrip StringToHashBucket
    StringToHashBucketFast StringToHashBucketStrong StringToNumber StringUpper StaticRegexReplace StaticRegexFullMatch
    """.split()  # noqa: SIM905
)
BINARY = frozenset(
    """
    Add AddV2 Sub Mul Div DivNoNan RealDiv FloorDiv FloorMod Mod TruncateDiv TruncateMod Maximum Minimum MulNoNan Pow
    SquaredDifference Atan2 Xdivy Xlogy Xlog1py Equal NotEqual Less LessEqual Greater GreaterEqual LogicalAnd
    LogicalOr BitwiseAnd BitwiseOr BitwiseXor LeftShift RightShift SelectV2
    """.split()  # noqa: SIM905
)
# The first input is carried, the others are parameters: images, kernels, biases.
_FIRST = frozenset(
    """
    AvgPool AvgPool3D BiasAdd Conv2D Conv3D DepthwiseConv2dNative FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars LRN
    MaxPool MaxPool3D ResizeBicubic ResizeBilinear ResizeNearestNeighbor
    """.split()  # noqa: SIM905
)
_REDUCTIONS = frozenset(
    """
    Sum Mean Max Min Prod All Any EuclideanNorm ArgMax ArgMin Cumsum Cumprod ReverseV2
    """.split()  # noqa: SIM905
)


def form(view: View) -> Form | None:
    """How a node works row by row, or None where that is not known."""
    op = view.node.op
    if op in ELEMENTWISE or op in _FIRST:
        return Form((0,))
    if op in BINARY:
        return _binary(view)
    rule = _RULES.get(op)
    if rule is not None:
        return rule(view)
    if op in _REDUCTIONS:
        axes, rank = view.constant(1), view.rank(0)
        fine = axes is not None and rank and all(int(a) % rank for a in axes.reshape(-1))
        return Form((0,)) if fine else None
    return None


def _binary(view: View) -> Form | None:
    """NumPy's broadcasting: the rows are where the rank is highest, and a lower rank has none."""
    ranks = [view.rank(index) for index in range(len(view.kinds))]
    if None in ranks:
        return None
    highest = max(rank for rank in ranks if rank is not None)
    carried = []
    for index, kind in enumerate(view.kinds):
        shape = view.shapes[index]
        assert shape is not None
        if kind == EXACT and (len(shape) < highest or shape[:1] == (1,)):
            continue
        if len(shape) < highest:
            return None
        carried.append(index)
    return Form(tuple(carried), native=True)


def _matmul(view: View) -> Form | None:
    return None if attr(view.node, "transpose_a").b else Form((0,))


def _batch_matmul(view: View) -> Form | None:
    left, right = view.rank(0), view.rank(1)
    if left is None or right is None or left < right:
        return None
    if left == 2:
        return None if attr(view.node, "adj_x").b else Form((0,))
    shape = view.shapes[1]
    assert shape is not None
    if right < left or (view.kinds[1] == EXACT and shape[0] == 1):
        return Form((0,))
    return Form((0, 1), native=True)


def _gather(view: View) -> Form | None:
    """Rows of ids, looked up in a table; columns of rows."""
    batch_dims = attr(view.node, "batch_dims").i
    axis = view.axis(2, view.rank(0)) if view.node.op == "GatherV2" else 0
    if axis is None or batch_dims < 0 or (view.node.op == "ResourceGather" and batch_dims):
        return None
    if batch_dims:
        return Form((0, 1))
    if axis == 0:
        return Form((1,)) if view.rank(1) else None
    return Form((0,))


def _gather_nd(view: View) -> Form | None:
    return Form((1,)) if (view.rank(1) or 0) >= 2 and not attr(view.node, "batch_dims").i else None


def _transpose(view: View) -> Form | None:
    order = view.constant(1)
    return Form((0,)) if order is not None and order.size and int(order.reshape(-1)[0]) == 0 else None


def _expand(view: View) -> Form | None:
    rank = view.rank(0)
    return Form((0,)) if view.axis(1, None if rank is None else rank + 1) else None


def _squeeze(view: View) -> Form | None:
    axes, rank = attr(view.node, "squeeze_dims").list.i, view.rank(0)
    return Form((0,)) if axes and rank and all(axis % rank for axis in axes) else None


def _last_axis(view: View) -> Form | None:
    return Form((0,)) if (view.rank(0) or 0) >= 2 else None


def _one_hot(view: View) -> Form | None:
    rank = view.rank(0)
    axis = attr(view.node, "axis").i
    return Form((0,)) if rank and (axis == -1 or axis > 0) else None


def _joined(view: View) -> Form | None:
    """Concat and Pack along any axis but the first."""
    if view.node.op == "Pack":
        values = range(len(view.kinds))
        rank = view.rank(0)
        axis = None if not rank else attr(view.node, "axis").i % (rank + 1)
    elif view.node.op == "ConcatV2":
        values = range(len(view.kinds) - 1)
        axis = view.axis(len(view.kinds) - 1, view.rank(0))
    else:
        values = range(1, len(view.kinds))
        axis = view.axis(0, view.rank(1))
    return Form(tuple(values)) if axis else None


def _divided(view: View) -> Form | None:
    """Split, SplitV and Unpack along any axis but the first."""
    if view.node.op == "Unpack":
        rank = view.rank(0)
        return Form((0,)) if rank and attr(view.node, "axis").i % rank else None
    value, axis = (1, 0) if view.node.op == "Split" else (0, 2)
    return Form((value,)) if view.axis(axis, view.rank(value)) else None


def _padded(view: View) -> Form | None:
    paddings = view.constant(1)
    return Form((0,)) if paddings is not None and paddings.size and not paddings[0].any() else None


def _strided_slice(view: View) -> Form | None:
    strides, rank = view.constant(3), view.rank(0)
    if strides is None or rank is None:
        return None
    begin, end, ellipsis, new, shrink = (
        attr(view.node, f"{name}_mask").i for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    )
    if not strides.size:
        return Form((0,))
    if ellipsis & 1:  # stands for all dimensions that no other entry is for
        return Form((0,)) if strides.size - 1 - new.bit_count() < rank else None
    whole = begin & 1 and end & 1 and not new & 1 and not shrink & 1 and int(strides[0]) == 1
    return Form((0,)) if whole else None


def _batch_norm(view: View) -> Form | None:
    return None if attr(view.node, "is_training").b else Form((0,))


def einsum_labels(node: NodeDef) -> tuple[list[str], str]:
    """The labels of each operand and of the result."""
    left, _, right = attr(node, "equation").s.decode().replace(" ", "").partition("->")
    return left.split(","), right


def _einsum(view: View) -> Form | None:
    """The first label of the result is that of the rows."""
    operands, result = einsum_labels(view.node)
    if not result or any("." in labels for labels in (*operands, result)):
        return None
    rows = result[0]
    carried = [index for index, labels in enumerate(operands) if rows in labels]
    if any(operands[index].count(rows) > 1 or operands[index][0] != rows for index in carried):
        return None
    return Form(tuple(carried), native=all(len(operands[index]) > 1 for index in carried))


def _clip(view: View) -> Form | None:
    return Form((0,)) if view.rank(1) == 0 and view.rank(2) == 0 else None


def _select(view: View) -> Form | None:
    """TF 1's Select: three equal shapes, or a condition for each row."""
    ranks = [view.rank(index) for index in range(3)]
    if None in ranks or ranks[1] != ranks[2] or not ranks[1]:
        return None
    if ranks[0] == 0:
        return Form((1, 2))
    return Form((0, 1, 2)) if ranks[0] in (1, ranks[1]) else None


_RULES: dict[str, Callable[[View], Form | None]] = {
    **{"MatMul": _matmul, "BatchMatMulV2": _batch_matmul, "BatchMatMul": _batch_matmul},
    **{"GatherV2": _gather, "Gather": _gather, "ResourceGather": _gather, "GatherNd": _gather_nd},
    **{"Transpose": _transpose, "ExpandDims": _expand, "Squeeze": _squeeze},
    **{"Softmax": _last_axis, "LogSoftmax": _last_axis, "TopKV2": _last_axis, "OneHot": _one_hot},
    **{"ConcatV2": _joined, "Concat": _joined, "Pack": _joined},
    **{"Split": _divided, "SplitV": _divided, "Unpack": _divided},
    **{"Pad": _padded, "PadV2": _padded, "MirrorPad": _padded, "StridedSlice": _strided_slice},
    **{"FusedBatchNorm": _batch_norm, "FusedBatchNormV2": _batch_norm, "FusedBatchNormV3": _batch_norm},
    **{"Select": _select, "AddN": lambda view: Form(tuple(range(len(view.kinds))))},
    **{"ClipByValue": _clip, "Einsum": _einsum},
    "LookupTableFindV2": lambda view: Form((1,)),
}
