"""Where the TFLite int8 specification quantizes a graph: which tensors have a scale, which share one, which have none.

A tensor has a scale of its own where an integer kernel ends: after convolution + bias + activation, after an
elementwise op, a mean, a composite activation. Reshape, Transpose, pooling and the like hand the scale of their input
on; Concat and its kin want one scale for everything they touch. Weights are symmetric: per output channel in
convolutions and dense layers, per tensor elsewhere. What has no integer kernel stays in float, with its reason.

Source: the TensorFlow Lite 8-bit quantization specification.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Shape, infer_tensors, join, split
from tfopt.model import Model
from tfopt.rules import composites

LAST, DEPTHWISE, TENSOR = "last axis", "depthwise", "tensor"  # the channel that a weight has a scale for

PRODUCTS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3")
_LINEAR = ("Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", *PRODUCTS)
_SUMS = ("BiasAdd", "AddV2", "Add", "Sub")
_BINARY = ("AddV2", "Add", "Sub", "Mul")
# Kernels that read and write int8 with scales of their own.
_KERNELS = frozenset(
    [
        *("Conv2D", "DepthwiseConv2dNative", "Conv2DBackpropInput", *PRODUCTS, "Einsum"),
        *("BiasAdd", "AddV2", "Add", "Sub", "Mul", "Mean", "Sum", "Abs"),
        *("Relu", "Relu6", "LeakyRelu", "Softmax", "LogSoftmax", "Sigmoid", "Tanh"),
    ]
)
# Kernels whose result has the scale of what they read; with several inputs, all of them share it.
_KEEPS = frozenset(
    [
        *("Reshape", "Squeeze", "ExpandDims", "Transpose", "StridedSlice", "Slice", "Split", "SplitV", "Unpack"),
        *("Pad", "MirrorPad", "Tile", "BroadcastTo", "Identity", "MaxPool", "ResizeNearestNeighbor", "ReverseV2"),
        *("DepthToSpace", "SpaceToDepth", "SpaceToBatchND", "BatchToSpaceND"),
    ]
)
_ROUNDS = frozenset(("AvgPool", "ResizeBilinear"))  # the same, but they compute
_SHARES = frozenset(("ConcatV2", "Pack", "Maximum", "Minimum"))
BODIES = ("While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase")
# Fixed by the specification: scale 1/256 from 0, 1/128 around 0, 16/256 up to 0.
FIXED = {
    **dict.fromkeys(("Softmax", "Sigmoid"), (0.0, 255 / 256)),
    "Tanh": (-1.0, 127 / 128),
    "LogSoftmax": (-255 / 16, 0.0),
}


@dataclasses.dataclass(frozen=True)
class Weight:
    """A constant that an integer kernel reads.

    Attributes:
      node, index: the op, and which of its operands.
      ref: the constant.
      layout: LAST, DEPTHWISE or TENSOR.
      linear: whether the op is a convolution or a product: its weights are symmetric.
      low: whether its kernel takes 4 bits too.
    """

    node: str
    index: int
    ref: str
    layout: str
    linear: bool
    low: bool = True


@dataclasses.dataclass(frozen=True)
class Sites:
    """Where to quantize.

    Attributes:
      weights: constants, in the order of the computation.
      activations: reference of a tensor -> the range that the specification gives it, or None where data decide.
      tied: sets of activations with one range.
      left: node -> why it computes in float.
      shapes: of every tensor, as far as known.
    """

    weights: tuple[Weight, ...]
    activations: dict[str, tuple[float, float] | None]
    tied: tuple[frozenset[str], ...]
    left: dict[str, str]
    shapes: dict[str, Shape]


def sites(model: Model, integer_outputs: bool = False, signature: str | None = None) -> Sites:
    """Finds where a model is quantized; the model should have gone through the lossless recipe.

    Args:
      model: left as it is. Functions (branches, loop bodies) stay in float.
      integer_outputs: whether the results are to be integers. Otherwise a softmax that comes last stays in float, which
        is exact, and several times faster than the integer kernel.
      signature: the one that is quantized, with what others share with it; None for all.
    """
    return _Finder(model, integer_outputs, signature).find()


class _Finder:
    def __init__(self, model: Model, integer_outputs: bool, signature: str | None):
        self.graph = model.graph
        self.integer_outputs = integer_outputs
        prefix = "" if signature is None else f"{signature}:"
        outputs = [ref for label, ref in self.graph.outputs.items() if label.startswith(prefix)]
        self.live = self.graph.reachable(split(ref)[0] for ref in outputs)
        self.order = [node for node in self.graph.topological() if node.name in self.live]
        tensors = infer_tensors(self.graph, model.library())
        self.dtypes = {ref: dtype for ref, (dtype, _) in tensors.items()}
        self.shapes = {ref: shape for ref, (_, shape) in tensors.items()}
        self.composite: dict[str, set[str]] = {}  # the node that gives y -> the inside
        for node in self.order:
            # Not a hard swish: its integer kernel is thirty times slower than those of its parts.
            if node.op in ("Erf", "Erfc", "Tanh") and (found := composites.region(self.graph, node.name)):
                self.composite[found[0]] = found[1]
        self.inside = set().union(*self.composite.values()) if self.composite else set()
        self.norms = composites.layer_norms(self.graph) & self.live

    def find(self) -> Sites:
        weights: list[Weight] = []
        activations: dict[str, tuple[float, float] | None] = {}
        left: dict[str, str] = {}
        parents: dict[str, str] = {}
        scale: dict[str, str] = {}  # tensor -> the tensor whose scale it has
        for node in self.order:
            reason = self._float_reason(node)
            if reason:
                left[node.name] = reason
                weights += self._of_body(node)
                continue
            if node.name in self.inside or not self._is_float(node):
                continue
            weights += self._weights(node)
            ref = join(node.name)
            if node.op in _KEEPS:
                origin = self._origin(node, scale)
                for port in range(len(self._outputs(node.name))):
                    scale[join(node.name, port)] = origin
                continue
            if self._fused_into_next(node):
                continue
            if node.op in _ROUNDS or node.op in _SHARES:
                activations[ref] = None
                for other in self._varying(node):
                    _tie(parents, ref, scale.get(other, other))
            elif self._has_kernel(node):
                activations[ref] = FIXED.get(node.op)
            scale[ref] = ref
        # What a kernel reads must have a scale, though it comes out of a float op or a layer norm.
        for node in self.order:
            integer = self._is_float(node) and node.name not in left and node.op not in _KEEPS
            if not integer and node.name not in self.inside:
                continue
            for other in self._varying(node):
                origin = scale.get(other, other)
                producer = self.graph.producer(origin)
                if producer.name not in self.inside and not self._fused_into_next(producer):
                    activations.setdefault(origin, None)
        fixed = {ref for ref, limits in activations.items() if limits}
        groups: dict[str, set[str]] = {}
        for ref in parents:
            if ref in activations and ref not in fixed:
                groups.setdefault(_root(parents, ref), set()).add(ref)
        tied = tuple(frozenset(group) for group in groups.values() if len(group) > 1)
        return Sites(tuple(weights), activations, tied, left, self.shapes)

    def _is_float(self, node: NodeDef) -> bool:
        return self.dtypes.get(join(node.name)) == tf.float32 and node.name not in self.graph.weights

    def _outputs(self, name: str) -> list[str]:
        port, found = 0, []
        while join(name, port) in self.dtypes:
            found.append(join(name, port))
            port += 1
        return found

    def _varying(self, node: NodeDef) -> list[str]:
        """The float tensors that a node reads, weights and constants aside."""
        refs = [join(*split(ref)) for ref in self.graph.data_inputs(node)]
        return [r for r in refs if self.dtypes.get(r) == tf.float32 and self.graph.constant(r) is None]

    def _origin(self, node: NodeDef, scale: dict[str, str]) -> str:
        refs = self._varying(node)
        return scale.get(refs[0], refs[0]) if refs else join(node.name)

    def _has_kernel(self, node: NodeDef) -> bool:
        return node.op in _KERNELS or node.op == "Placeholder" or node.name in self.composite

    def _of_body(self, node: NodeDef) -> Iterable[Weight]:
        """The matrices that a loop or a branch is given: it computes in float, and holds them with 8 or 4 bits."""
        for index, ref in enumerate(self.graph.data_inputs(node) if node.op in BODIES else []):
            value = self.graph.constant(ref)
            if value is not None and value.dtype == np.float32 and value.ndim == 2 and min(value.shape) > 1:
                yield Weight(node.name, index, ref, LAST, True)

    def _float_reason(self, node: NodeDef) -> str | None:
        if node.op in BODIES:
            return f"{node.op} computes in float; the matrices that it reads have fewer bits"
        if not self._is_float(node) or node.op in ("Const", "Placeholder"):
            return None
        last = not self.graph.users(node.name) and not self.integer_outputs
        if last and node.op in ("Softmax", "LogSoftmax"):
            return "the last softmax is exact and faster in float"
        if node.name in self.norms:
            return "part of a layer norm, whose variance spans too many magnitudes for 8 bits"
        if node.name in self.inside or self._has_kernel(node) or node.op in _KEEPS | _ROUNDS | _SHARES:
            return None
        if node.op in ("GatherV2", "Gather") and self.graph.constant(node.input[0]) is not None:
            return None
        return f"{node.op} has no int8 kernel that tfopt uses"

    def _weights(self, node: NodeDef) -> Iterable[Weight]:
        refs = self.graph.data_inputs(node)
        if node.op in ("Conv2D", "DepthwiseConv2dNative") and self.graph.constant(refs[1]) is not None:
            yield Weight(node.name, 1, refs[1], LAST if node.op == "Conv2D" else DEPTHWISE, True)
        elif node.op == "Conv2DBackpropInput" and self.graph.constant(refs[1]) is not None:
            yield Weight(node.name, 1, refs[1], TENSOR, True, low=False)
        elif node.op in ("GatherV2", "Gather"):
            yield Weight(node.name, 0, refs[0], TENSOR, False)
        elif node.op in (*PRODUCTS, "Einsum"):  # the converter makes products of one scale out of Einsum
            for index, ref in enumerate(refs):
                value = self.graph.constant(ref)
                if value is not None:
                    flipped = any(key in node.attr and node.attr[key].b for key in ("transpose_b", "adj_y"))
                    per_channel = node.op != "Einsum" and index == 1 and value.ndim == 2 and not flipped
                    low = index == 1 and (node.op == "MatMul" or value.ndim == 2 or _unbatched(node))
                    yield Weight(node.name, index, ref, LAST if per_channel else TENSOR, True, low)
        elif node.op in (*_BINARY, *_SHARES) and not self._is_bias(node) and node.name not in self.composite:
            for index, ref in enumerate(refs):
                value = self.graph.constant(ref)
                if value is not None and value.dtype == np.float32:
                    yield Weight(node.name, index, ref, TENSOR, False)

    def _is_bias(self, node: NodeDef) -> bool:
        """Whether a node adds a constant along the last axis to a linear op that nothing else reads."""
        if node.op not in _SUMS:
            return False
        refs = self.graph.data_inputs(node)
        values = [self.graph.constant(ref) for ref in refs]
        if node.op == "BiasAdd":
            values = [None, values[1]]
        varying = [ref for ref, value in zip(refs, values, strict=True) if value is None]
        constants = [value for value in values if value is not None]
        if len(varying) != 1 or len(constants) != 1 or (node.op == "Sub" and values[0] is not None):
            return False
        source = self.graph.producer(varying[0])
        vector = constants[0].size in (1, constants[0].shape[-1] if constants[0].ndim else 1)
        return source.op in _LINEAR and vector and self._single(source)

    def _single(self, node: NodeDef) -> bool:
        return len(self.graph.uses(node.name)) == 1 and not self.graph.output_labels(node.name)

    def _fused_into_next(self, node: NodeDef) -> bool:
        """Whether the one op that reads a node becomes part of the same kernel."""
        if not self._single(node):
            return False
        (user,) = (self.graph.nodes[name] for name in self.graph.users(node.name))
        if node.op in _LINEAR:
            source_has_weights = any(self.graph.constant(ref) is not None for ref in self.graph.data_inputs(node))
            if self._is_bias(user) and source_has_weights:
                return True
        fuses = node.op in (*_LINEAR, *_BINARY, "BiasAdd") and node.op != "Conv2DBackpropInput"
        if node.name in self.composite or node.name in self.norms or user.name in self.inside:
            return False
        return fuses and user.op in ("Relu", "Relu6") and not self._after_transposed(node)

    def _after_transposed(self, node: NodeDef) -> bool:
        return self._is_bias(node) and self.graph.producer(node.input[0]).op == "Conv2DBackpropInput"


def _unbatched(node: NodeDef) -> bool:
    """Whether an Einsum becomes FULLY_CONNECTED; BATCH_MATMUL takes no weights of 4 bits."""
    if node.op != "Einsum":
        return False
    operands, _, result = node.attr["equation"].s.decode().partition("->")
    return not set.intersection(*map(set, operands.split(",")), set(result))


def _root(parents: dict[str, str], ref: str) -> str:
    while parents.setdefault(ref, ref) != ref:
        ref = parents[ref]
    return ref


def _tie(parents: dict[str, str], one: str, other: str) -> None:
    parents[_root(parents, other)] = _root(parents, one)
