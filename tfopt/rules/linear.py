"""Linear ops with constant weights, which absorb an affine on either side.

    k_out * W(x / k_in) = W'(x)     with W'[.., i, o] = W[.., i, o] * k_out[o] / k_in[i]
    W(x + t) = W(x) + W(t)          W(t) is the same at every position only where no zero padding is in reach

Convolutions name their channels by position (`_CHANNELS`); MatMul and its kin are all written as an einsum.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Shape, join, split
from tfopt.rewrite import Refused
from tfopt.rules.affine import FLOATS
from tfopt.rules.coefficients import along, canonical, divide, times, varying, vector_of
from tfopt.rules.constants import attr
from tfopt.rules.labels import product_labels, relabelled
from tfopt.rules.view import View

CONVOLUTIONS = frozenset(("Conv2D", "Conv3D", "DepthwiseConv2dNative"))
TRANSPOSED = frozenset(("Conv2DBackpropInput", "Conv3DBackpropInputV2"))
PRODUCTS = frozenset(("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum"))
GATHERS = frozenset(("GatherV2", "Gather"))
LINEAR_OPS = CONVOLUTIONS | TRANSPOSED | PRODUCTS | GATHERS

# Larger weights are left alone: folding would hold several float64 copies of them.
MAX_ELEMENTS = 1 << 27


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear node.

    Attributes:
      x: index of its varying operand; None where it only looks its weights up.
      w: index of its constant operand.
      widen_in, widen_out: from the coefficient of x (of the result) to an array that broadcasts over the weights.
      of_shift: from (weights, t) to the coefficient W(t) of the result.
      channel: the axis of the result to which a bias belongs; None where any axis of the weights will do.
    """

    x: int | None
    w: int
    widen_in: Callable[[np.ndarray], np.ndarray]
    widen_out: Callable[[np.ndarray], np.ndarray]
    of_shift: Callable[[np.ndarray, np.ndarray], np.ndarray]
    channel: int | None


def linear(view: View, node: NodeDef) -> Linear | None:
    """The node as a linear op with constant weights; None if it is not one."""
    if node.op not in LINEAR_OPS:
        return None
    refs = view.graph.data_inputs(node)
    if node.op in PRODUCTS:
        constant = [view.value(ref) is not None for ref in refs]
        if len(refs) != 2 or constant[0] == constant[1]:
            return None
        x, w = (0, 1) if constant[1] else (1, 0)
    elif node.op in GATHERS:
        x, w = None, 0
    else:
        x, w = (2, 1) if node.op in TRANSPOSED else (0, 1)
    weights = view.value(refs[w])
    if weights is None or attr(node, "Tparams" if node.op in GATHERS else "T").type not in FLOATS:
        return None
    if weights.size > MAX_ELEMENTS:
        return None
    if node.op in GATHERS:
        return _gather(view, node, weights)
    if node.op in PRODUCTS:
        assert x is not None
        return _product(view, node, x, w, weights)
    return _convolution(view, node, weights)


def refine_shapes(view: View) -> None:
    """Fills in the channels of matrices whose shape is computed at run time: the weights that they meet tell."""
    for node in view.graph.nodes.values():
        if node.op == "MatMul" and len(node.input) >= 2:
            weights, shape = view.shape(node.input[1]), view.shape(node.input[0])
            if weights is None or shape is None or len(weights) != 2 or len(shape) != 2:
                continue
            axis = 0 if attr(node, "transpose_a").b else 1
            if shape[axis] is None:
                size = weights[1 if attr(node, "transpose_b").b else 0]
                view.shapes[join(*split(node.input[0]))] = (*shape[:axis], size, *shape[axis + 1 :])


def new_weights(form: Linear, old: np.ndarray, k_in: np.ndarray | None, k_out: np.ndarray | None) -> np.ndarray:
    """Weights, in float64, under which the node takes k_in * x and gives k_out * y."""
    new = old.astype(np.float64)
    if k_out is not None:
        new = times(new, form.widen_out(k_out))
    if k_in is not None:
        # 1 / inf is 0 (a dead channel), and a weight of 0 stays 0 whatever it is divided by.
        new = times(new, divide(np.ones(()), form.widen_in(k_in)))
    return new


# -- convolutions ----------------------------------------------------------------------------------------------------


def _convolution(view: View, node: NodeDef, weights: np.ndarray) -> Linear | None:
    rank = weights.ndim
    default = "NHWC" if rank == 4 else "NDHWC"
    channels_first = (attr(node, "data_format").s.decode() or default).startswith("NC")
    channel = 1 if channels_first else rank - 1
    fan_in, fan_out = weights.shape[-2:]
    transposed = node.op in TRANSPOSED
    depthwise = node.op == "DepthwiseConv2dNative"
    inputs, outputs, groups = fan_in, fan_out, 1
    if depthwise:
        outputs = fan_in * fan_out
    elif transposed:
        inputs, outputs = fan_out, fan_in
    else:
        shape = view.shape(node.input[0])
        known = shape[channel] if shape is not None and len(shape) == rank else None
        if known is not None and known != fan_in:
            if not fan_in or known % fan_in or fan_out % (known // fan_in):
                return None
            inputs, groups = known, known // fan_in
    tail = (1,) * (rank - 2)

    def widen_in(k: np.ndarray) -> np.ndarray:
        vector = vector_of(_of_rank(k, rank), channel, inputs)
        if transposed:
            return vector.reshape(*tail, 1, inputs)
        if depthwise:
            return vector.reshape(*tail, inputs, 1)
        return np.repeat(vector.reshape(groups, fan_in).T, fan_out // groups, axis=1).reshape(*tail, fan_in, fan_out)

    def widen_out(k: np.ndarray) -> np.ndarray:
        vector = vector_of(_of_rank(k, rank), channel, outputs)
        if transposed:
            return vector.reshape(*tail, outputs, 1)
        return vector.reshape(*tail, *((fan_in, fan_out) if depthwise else (1, outputs)))

    def of_shift(w: np.ndarray, t: np.ndarray) -> np.ndarray:
        if not _unpadded(view, node, w.shape[:-2], channels_first):
            raise Refused("zero padding: the shift would not reach the border")
        product = w.astype(np.float64) * widen_in(t)
        spatial = tuple(range(rank - 2))
        if transposed:
            vector = product.sum(axis=(*spatial, rank - 1))
        elif depthwise:
            vector = product.sum(axis=spatial).reshape(-1)
        else:
            vector = product.sum(axis=(*spatial, rank - 2))
        return along(vector, channel, rank)

    return Linear(2 if transposed else 0, 1, widen_in, widen_out, of_shift, channel)


def _of_rank(k: np.ndarray, rank: int) -> np.ndarray:
    if k.ndim not in (0, rank):
        raise Refused("its rank is not that of a convolution")
    return k


def _unpadded(view: View, node: NodeDef, kernel: tuple[int, ...], channels_first: bool) -> bool:
    """Whether a convolution reads no zeros from outside its input (and a transposed one sums a fixed set of taps)."""
    first = 2 if channels_first else 1
    strides = list(attr(node, "strides").list.i)[first : first + len(kernel)]
    if node.op in TRANSPOSED:
        return all(k == 1 for k in kernel) and all(s == 1 for s in strides)
    padding = attr(node, "padding").s.decode()
    if padding == "VALID":
        return True
    if padding == "EXPLICIT":
        return not any(attr(node, "explicit_paddings").list.i)
    if all(k == 1 for k in kernel):
        return True
    dilations = list(attr(node, "dilations").list.i)[first : first + len(kernel)] or [1] * len(kernel)
    sizes: Shape = view.shape(node.input[0])
    if sizes is None:
        return False
    for k, s, d, size in zip(kernel, strides, dilations, sizes[first : first + len(kernel)], strict=True):
        # SAME pads so that ceil(size / stride) windows fit: possibly by nothing at all.
        if size is None or (-(-size // s) - 1) * s + (k - 1) * d + 1 > size:
            return False
    return True


# -- matrix products and lookups -------------------------------------------------------------------------------------


def _product(view: View, node: NodeDef, x: int, w: int, weights: np.ndarray) -> Linear | None:
    labels = product_labels(view, node)
    if labels is None:
        return None
    of_x, of_w, of_out = labels[x], labels[w], labels[2]
    if len(of_w) != weights.ndim:
        return None

    def of_shift(values: np.ndarray, t: np.ndarray) -> np.ndarray:
        shape = view.shape(node.input[x])
        summed = [axis for axis, label in enumerate(of_x) if label not in of_w and label not in of_out]
        if any(shape is None or shape[axis] != 1 for axis in summed):
            raise Refused("it sums over an axis that the weights do not have")
        if t.ndim not in (0, len(of_x)):
            raise Refused("its rank is not that of the operand")
        spread = t.reshape((1,) * len(of_x)) if t.ndim == 0 else t
        sizes = dict(zip(of_w, values.shape, strict=True))
        # Axes that are summed over must have their full size; the others stay at 1 where t does not vary.
        full = [sizes.get(label, n) for label, n in zip(of_x, spread.shape, strict=True)]
        operands = (np.broadcast_to(spread, full), values.astype(np.float64))
        present = [label for label in of_out if label in of_x or label in of_w]
        return canonical(np.einsum(f"{of_x},{of_w}->{''.join(present)}", *operands))

    return Linear(
        x,
        w,
        lambda k: relabelled(k, of_x, of_w),
        lambda k: relabelled(k, of_out, of_w),
        of_shift,
        None,
    )


def _gather(view: View, node: NodeDef, weights: np.ndarray) -> Linear | None:
    """A lookup of rows: y = W[ids], so k_out * y = (k_out * W)[ids] and y + t = (W + t)[ids]."""
    axis = view.value(node.input[2]) if node.op == "GatherV2" else np.zeros(())
    if axis is None or int(axis) != 0 or attr(node, "batch_dims").i:
        return None

    def widen_out(k: np.ndarray) -> np.ndarray:
        own = weights.ndim - 1
        if k.ndim == 0:
            return k
        if any(a < k.ndim - own for a in varying(k)):
            raise Refused("it varies from lookup to lookup")
        return k.reshape((1, *k.shape[k.ndim - own :]))

    def of_shift(_: np.ndarray, __: np.ndarray) -> np.ndarray:
        raise Refused("indices cannot be shifted")

    return Linear(None, 0, widen_out, widen_out, of_shift, None)
