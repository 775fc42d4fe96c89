"""Ops with one operand that let an affine through: f(k * x) = k' * f(x), or f(x + k) = f(x) + k'.

Relu, MaxPool      k * f(x) = f(k * x) for k >= 0        Pad with zeros     scales only
AvgPool, Mean, Resize*, MirrorPad, Slice                 k may not vary along the axes that they mix
Reshape, Transpose, Squeeze, ExpandDims, DepthToSpace    k is re-indexed as x is
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.rewrite import Refused
from tfopt.rules.coefficients import canonical, dropped, lifted, regrouped, same, varying
from tfopt.rules.constants import attr
from tfopt.rules.plan import SCALE, SHIFT, Handler, Plan
from tfopt.rules.slices import slice_backward, slice_forward
from tfopt.rules.view import View

IDENTITIES = frozenset(("Identity", "Snapshot", "StopGradient", "PreventGradient"))

Map = Callable[[Plan, NodeDef, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Unary:
    """How a coefficient passes through an op with one varying operand.

    Attributes:
      forward: from the coefficient of the operand to that of the result.
      backward: from the coefficient of the result to that of the operand.
      kinds: the kinds of plan that pass.
      positive: whether a scale must not be negative.
      index: which operand.
      why: what to tell where a kind does not pass.
    """

    forward: Map
    backward: Map
    kinds: tuple[str, ...] = (SCALE, SHIFT)
    positive: bool = False
    index: int = 0
    why: str = "a shift does not pass"

    def __call__(self, plan: Plan, node: NodeDef) -> None:
        """Asks what follows for the operand from the result, or for the result from the operand."""
        if plan.kind not in self.kinds:
            raise Refused(self.why)
        k_in, k_out = plan.operand(node, self.index), plan.result(node)
        for k in (k_in, k_out):
            if self.positive and plan.kind == SCALE and k is not None and (k < 0).any():
                raise Refused(f"the scale is negative in {int((k < 0).sum())} of {k.size} channels")
        if k_in is not None:
            plan.give_result(node, self.forward(plan, node, k_in))
        elif k_out is not None:
            back = self.backward(plan, node, k_out)
            if not same(self.forward(plan, node, back), k_out):
                raise Refused("it varies along an axis that the op mixes")
            plan.give_operand(node, self.index, back)


def _keep(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
    return k


def _outside(affected: Callable[[View, NodeDef], list[int] | None]) -> Map:
    """The coefficient stays as it is, and may vary only along axes that the op leaves alone."""

    def through(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
        if k.ndim == 0:
            return k
        axes = affected(plan.view, node)
        if axes is None or any(axis in axes for axis in varying(k)):
            raise Refused("it varies along an axis that the op mixes")
        return k

    return through


def ints(view: View, ref: str) -> list[int] | None:
    """A constant operand as a list of integers; None if it is not constant."""
    value = view.value(ref)
    return None if value is None else [int(v) for v in np.ravel(value)]


def _window(view: View, node: NodeDef) -> list[int]:
    sizes, strides = attr(node, "ksize").list.i, attr(node, "strides").list.i
    return [axis for axis, (k, s) in enumerate(zip(sizes, strides, strict=True)) if k != 1 or s != 1]


def _paddings(view: View, node: NodeDef) -> list[int] | None:
    value = view.value(node.input[1])
    return None if value is None else [axis for axis, pads in enumerate(value) if pads.any()]


def _blocks(view: View, node: NodeDef) -> list[int] | None:
    blocks = ints(view, node.input[1])
    return None if blocks is None else list(range(len(blocks) + 1))


def _tiles(view: View, node: NodeDef) -> list[int] | None:
    counts = ints(view, node.input[1])
    return None if counts is None else [axis for axis, count in enumerate(counts) if count != 1]


def _reversed(view: View, node: NodeDef) -> list[int] | None:
    axes = ints(view, node.input[1])
    rank = view.rank(node.input[0])
    return None if axes is None or rank is None else [axis % rank for axis in axes]


# -- shapes ----------------------------------------------------------------------------------------------------------


def _reshape_forward(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
    return regrouped(k, plan.view.shape(node.input[0]), plan.view.shape(node.name))


def _reshape_backward(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
    return regrouped(k, plan.view.shape(node.name), plan.view.shape(node.input[0]))


def _transposed(invert: bool) -> Map:
    def through(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
        if k.ndim == 0:
            return k
        order = ints(plan.view, node.input[1])
        if order is None or len(order) != k.ndim:
            raise Refused("the order of its axes is not known")
        return np.transpose(k, np.argsort(order) if invert else order)

    return through


def _reduced(view: View, node: NodeDef) -> list[int]:
    axes = ints(view, node.input[1])
    rank = view.rank(node.input[0])
    if axes is None or rank is None:
        raise Refused("the axes that it reduces are not known")
    return [axis % rank for axis in axes]


def _reduce_forward(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
    if k.ndim == 0:
        return k
    axes = _reduced(plan.view, node)
    if any(axis in axes for axis in varying(k)):
        raise Refused("it varies along an axis that the op mixes")
    return k if attr(node, "keep_dims").b else canonical(np.squeeze(k, tuple(axes)))


def _reduce_backward(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
    if k.ndim == 0 or attr(node, "keep_dims").b:
        return k
    return np.expand_dims(k, tuple(_reduced(plan.view, node)))


def _block_tiled(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
    """From the small side of DepthToSpace (few channels) to the large one: channels repeat per position in a block."""
    _check_blocks(node, k)
    return k if k.ndim == 0 else np.tile(k, (1, 1, 1, attr(node, "block_size").i ** 2))


def _block_first(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
    _check_blocks(node, k)
    if k.ndim == 0:
        return k
    repeats = attr(node, "block_size").i ** 2
    first = k[..., : k.shape[-1] // repeats]
    if not same(np.tile(first, (1, 1, 1, repeats)), k):
        raise Refused("it varies along an axis that the op mixes")
    return first


def _check_blocks(node: NodeDef, k: np.ndarray) -> None:
    if k.ndim and ((attr(node, "data_format").s or b"NHWC") != b"NHWC" or any(axis != 3 for axis in varying(k))):
        raise Refused("it varies along an axis that the op mixes")


# -- powers ----------------------------------------------------------------------------------------------------------


def _power(exponent: float) -> Unary:
    """(k * x)^p = k^p * x^p: for k >= 0, but a square may also take a negative k."""

    def forward(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
        return _raised_to(k, exponent)

    def backward(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
        return _raised_to(k, 1 / exponent)

    return Unary(forward, backward, (SCALE,), why="a shift does not pass a power")


def _raised_to(k: np.ndarray, exponent: float) -> np.ndarray:
    if exponent not in (2, -1) and (k < 0).any():
        raise Refused(f"the scale is negative in {int((k < 0).sum())} of {k.size} channels")
    with np.errstate(all="ignore"):
        return np.power(k, exponent)


# -- the table -------------------------------------------------------------------------------------------------------


def _indifferent(plan: Plan, node: NodeDef) -> None:
    """Ops that look only at the shape of their operand; what they compute from it is fixed."""
    if plan.result(node) is not None and not (plan.kind == SCALE and node.op == "ZerosLike"):
        raise Refused(f"a {plan.kind} does not pass back")


def _pad(plan: Plan, node: NodeDef) -> None:
    """Zeros stay zeros under a scale; a shift would not reach them."""
    fill = plan.view.value(node.input[2]) if node.op == "PadV2" else np.zeros(())
    if plan.kind == SHIFT:
        raise Refused("zero padding: the shift would not reach the border")
    if fill is None or (fill.any() and not np.isinf(fill).all()):
        raise Refused("it pads with a value that would need a scale of its own")
    Unary(_outside(_paddings), _outside(_paddings), (SCALE,), bool(fill.any()))(plan, node)


def _space_to_batch(plan: Plan, node: NodeDef) -> None:
    paddings = plan.view.value(node.input[2])
    if plan.kind == SHIFT and (paddings is None or paddings.any()):
        raise Refused("zero padding: the shift would not reach the border")
    Unary(_outside(_blocks), _outside(_blocks))(plan, node)


def _softmax(plan: Plan, node: NodeDef) -> None:
    """softmax(x + t) = softmax(x) where t is the same for all classes."""
    t = plan.operand(node, 0)
    if plan.kind == SCALE or plan.result(node) is not None:
        raise Refused(f"a {plan.kind} does not pass")
    if t is not None and t.ndim and t.shape[-1] > 1:
        raise Refused("a shift that varies along its axis does not pass")


def _window_of(*kinds: str, positive: bool = False) -> Unary:
    return Unary(_outside(_window), _outside(_window), kinds, positive)


_pixels = _outside(lambda view, node: [1, 2])
_reduction = (_reduce_forward, _reduce_backward)
_broadcast: Map = lambda plan, node, k: lifted(k, plan.view.rank(node.name))  # noqa: E731
_unbroadcast: Map = lambda plan, node, k: dropped(k, plan.view.shape(node.input[0]))  # noqa: E731

UNARY: dict[str, Handler] = {
    **dict.fromkeys(("Shape", "ShapeN", "Size", "Rank", "ZerosLike", "OnesLike"), _indifferent),
    **dict.fromkeys(IDENTITIES, Unary(_keep, _keep)),
    **dict.fromkeys(
        ("Relu", "LeakyRelu", "Abs"),
        Unary(_keep, _keep, (SCALE,), positive=True, why="a shift does not pass a non-linearity"),
    ),
    **dict.fromkeys(("Reshape", "Squeeze", "ExpandDims"), Unary(_reshape_forward, _reshape_backward)),
    "Square": _power(2),
    "Sqrt": _power(0.5),
    "Rsqrt": _power(-0.5),
    "Reciprocal": _power(-1),
    "Transpose": Unary(_transposed(False), _transposed(True)),
    **dict.fromkeys(("AvgPool", "AvgPool3D"), _window_of(SCALE, SHIFT)),
    **dict.fromkeys(("MaxPool", "MaxPool3D"), _window_of(SCALE, SHIFT, positive=True)),
    "Mean": Unary(*_reduction),
    "Sum": Unary(*_reduction, (SCALE,), why="a shift would be counted"),
    **dict.fromkeys(("Max", "Min"), Unary(*_reduction, positive=True)),
    **dict.fromkeys(("Pad", "PadV2"), _pad),
    "MirrorPad": Unary(_outside(_paddings), _outside(_paddings)),
    "BatchToSpaceND": Unary(_outside(_blocks), _outside(_blocks)),
    "SpaceToBatchND": _space_to_batch,
    "DepthToSpace": Unary(_block_first, _block_tiled),
    "SpaceToDepth": Unary(_block_tiled, _block_first),
    **dict.fromkeys(("ResizeBilinear", "ResizeNearestNeighbor", "ResizeBicubic"), Unary(_pixels, _pixels)),
    **dict.fromkeys(("Slice", "StridedSlice"), Unary(slice_forward, slice_backward)),
    "Tile": Unary(_outside(_tiles), _outside(_tiles)),
    "ReverseV2": Unary(_outside(_reversed), _outside(_reversed)),
    "BroadcastTo": Unary(_broadcast, _unbroadcast),
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
}

# Ops after which a bias still counts as the bias of the linear op before them.
BIAS_PASSES = frozenset(("Reshape", "Squeeze", "ExpandDims", "Transpose", "BatchToSpaceND")) | IDENTITIES
