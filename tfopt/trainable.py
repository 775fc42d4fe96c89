"""Which constants of a signature can be trained: kernels, embeddings, and the vectors that scale and shift.

A constant is trainable where it meets what varies with the inputs in one of

    W * x (matrix products and convolutions)    E[i] (lookups)    s x, x + t, x - t (scales and shifts)

directly, or through ops that only move or sum constants: a folded batch norm, a reshape, a fake quantization. It is
found in branches and loop bodies too, where it comes to them as an argument. Not trainable are scalars (epsilons,
constants of an activation), what goes through a function that is not linear (variances), and masks (huge values).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.fake_quant import OPS
from tfopt.graph import WEIGHT_ELEMENTS, Graph, function_body, make_node, split
from tfopt.inline import label, tensor_names
from tfopt.model import Model
from tfopt.rewrite import has_effect

_LINEAR = (
    *("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum", "_FusedMatMul"),
    *("Conv2D", "Conv3D", "Conv", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2"),
)
_LOOKUPS = (
    *("Gather", "GatherV2", "GatherNd", "SparseSegmentSum", "SparseSegmentMean", "SparseSegmentSqrtN"),
    *("SparseSegmentSumWithNumSegments", "SparseSegmentMeanWithNumSegments", "SparseSegmentSqrtNWithNumSegments"),
)
_AFFINE = ("Mul", "Add", "AddV2", "Sub", "BiasAdd", "BiasAddV1", "AddN")
_NORMALISATIONS = ("FusedBatchNorm", "FusedBatchNormV2", "FusedBatchNormV3")
# What gives its first operand in another order or place; of these ops the further operands are no constants of ours.
_MOVES = ("Identity", "Reshape", "Transpose", "Squeeze", "ExpandDims", "StridedSlice", "Slice", "Tile", "BroadcastTo")
_JOINS = ("ConcatV2", "Pack", "Split", "SplitV", "Unpack")  # the same for any operand
_LOOPS = ("While", "StatelessWhile")

_MASK = 1e4  # a constant with a larger value is a mask or a limit


def promote(model: Model, signature: str, *, ranges: bool = False) -> list[str]:
    """Makes every trainable float32 constant of a signature a weight, whatever its size.

    A constant whose values are all equal (a bias of zeros), and that several nodes use, gets a copy for each: that it
    was one constant says that it was equal, not that it was shared.

    Args:
      model: edited in place.
      signature: which signature.
      ranges: also the minima and maxima of fake quantization, scalars too.

    Returns:
      The names of all trainable weights, sorted; those that were weights already included.
    """
    return sorted(_Search(model, signature, ranges).promoted())


def demote(model: Model, names: Iterable[str]) -> None:
    """Makes constants of the graph again of those weights that are small: the inverse of `promote`, in place."""
    for name in names:
        value = model.weights.get(name)
        if value is not None and value.size < WEIGHT_ELEMENTS:
            model.graph.set_constant(name, value)


def symmetric(
    model: Model, names: Iterable[str]
) -> tuple[list[str], Callable[[Mapping[str, tf.Variable]], dict[str, tf.Tensor]]]:
    """Keeps the ranges of fake-quantized weights (those of narrow range) around zero: trained apart, the ends drift.

    Args:
      model: with fake-quant ops.
      names: what is to be trained, as `promote` with `ranges` gives it.

    Returns:
      The names without the minima that follow from maxima, and the transform for `fine_tune` that makes them.
    """
    names = list(names)
    lows: dict[str, str] = {}
    for node in model.graph.nodes.values():
        if node.op in OPS and node.attr["narrow_range"].b:
            low, high = (split(ref)[0] for ref in node.input[1:3])
            if low in names and high in names:
                lows[low] = high

    def transform(variables: Mapping[str, tf.Variable]) -> dict[str, tf.Tensor]:
        return {low: -variables[high] for low, high in lows.items()}

    return [name for name in names if name not in lows], transform


class _Search:
    """The trainable constants of one signature."""

    def __init__(self, model: Model, signature: str, ranges: bool):
        self._model = model
        self._ranges = ranges
        definition = model.signatures[signature]
        outputs = [label(signature, n, c) for n, info in definition.outputs.items() for c, _ in tensor_names(info)]
        self._live = model.graph.reachable(split(model.graph.outputs[o])[0] for o in outputs)
        fed = [name for name, node in model.graph.nodes.items() if _source(node) and name not in model.weights]
        self._varying = _closure(model.graph, fed)
        self._bodies: dict[str, Graph] = {}

    def promoted(self) -> Iterator[str]:
        graph = self._model.graph
        for node in [node for node in graph.topological() if node.name in self._live]:
            value = _value(graph, node)
            if value is None or value.dtype != np.float32 or not np.all(np.abs(value) < _MASK):
                continue
            uses = [use for use in graph.uses(node.name) if use[2] == 0]
            trainable = [use for use in uses if use[0] in self._live and self._use(graph, self._varying, *use)]
            if value.ndim:
                trainable = [use for use in trainable if not self._is_range(graph, use)] or trainable
            else:  # of scalars, ranges alone
                trainable = [use for use in trainable if self._is_range(graph, use)]
            if not trainable:
                continue
            shared = any(user not in self._live for user, _, _ in uses)  # with another signature: it stays so
            if len(uses) > 1 and _uniform(value) and not shared and not self._is_range(graph, trainable[0]):
                kept = 1 if len(trainable) == len(uses) else 0
                yield from self._copies(node.name, value, trainable[kept:])
                trainable = trainable[:kept]
            if trainable:
                if node.op == "Const":
                    _make_weight(graph, node.name, value)
                yield node.name

    def _copies(self, name: str, value: np.ndarray, uses: list[tuple[str, int, int]]) -> Iterator[str]:
        """Gives each of some uses of a constant its own copy."""
        graph = self._model.graph
        for user, index, _ in uses:
            copy = graph.add(make_node(graph.unique_name(f"{name}_copy"), "NoOp"))
            _make_weight(graph, copy, value)
            graph.set_input(user, index, copy)
            yield copy

    def _is_range(self, graph: Graph, use: tuple[str, int, int]) -> bool:
        return graph.nodes[use[0]].op in OPS and use[1] > 0

    def _use(self, graph: Graph, varying: set[str], user: str, index: int, port: int, depth: int = 0) -> bool:
        """Whether what an input of a node brings is trained there, or behind it."""
        node = graph.nodes[user]
        if port < 0 or depth > 64:
            return False
        if node.op in _LINEAR:
            return index < 2 if node.op != "Conv2DBackpropInput" else index > 0
        if node.op in _LOOKUPS:
            return index == 0
        if node.op in _NORMALISATIONS:  # in training mode it normalises by the batch: a layer norm in disguise
            return index in (1, 2) and not node.attr["is_training"].b
        if node.op in OPS and index > 0:
            return self._ranges
        if node.op in _AFFINE:
            if user in varying:
                return True
        elif node.op in OPS:
            pass
        elif node.op in _MOVES:
            if index:
                return False
        elif node.op not in _JOINS:
            return any(
                self._use(body, moving, *use, depth + 1)
                for body, argument, moving in self._called(graph, varying, node, index)
                for use in body.uses(argument)
            )
        return any(self._use(graph, varying, *use, depth + 1) for use in graph.uses(user))

    def _called(
        self, graph: Graph, varying: set[str], node: NodeDef, index: int
    ) -> Iterator[tuple[Graph, str, set[str]]]:
        """The bodies that a node calls, each with the argument that operand `index` becomes, and what varies in it."""
        first = 1 if node.op in ("If", "StatelessIf", "Case", "StatelessCase") else 0
        if index < first:
            return
        for key in ("body",) if node.op in _LOOPS else ("then_branch", "else_branch", "branches", "f"):
            if key not in node.attr:
                continue
            attr = node.attr[key]
            for name in [attr.func.name] if attr.HasField("func") else [f.name for f in attr.list.func]:
                body = self._body(name)
                if body is None:
                    continue
                operands = graph.data_inputs(node)[first:]
                moving = [a for a, ref in zip(body.arguments, operands, strict=False) if split(ref)[0] in varying]
                if node.op in _LOOPS:
                    changed = zip(body.arguments, body.outputs.values(), strict=True)
                    moving += [argument for argument, ref in changed if not _same(body, argument, ref)]
                argument = body.arguments[index - first]
                if argument not in moving:
                    yield body, argument, _closure(body, moving)

    def _body(self, name: str) -> Graph | None:
        if name not in self._bodies:
            try:
                self._bodies[name] = function_body(self._model.functions[name], self._model.functions)
            except (ValueError, KeyError):
                return None  # a polymorphic function: its constants stay as they are
        return self._bodies[name]


def _source(node: NodeDef) -> bool:
    """Whether what a node gives is not known before the model runs."""
    return node.op in ("Placeholder", "PlaceholderWithDefault", "VarHandleOp") or node.op.startswith("Random")


def _value(graph: Graph, node: NodeDef) -> np.ndarray | None:
    if node.name in graph.weights:
        return graph.weights[node.name]
    if node.op != "Const" or node.attr["dtype"].type != tf.float32.as_datatype_enum:
        return None
    before = graph.reachable(graph.control_inputs(node))  # where nothing of it has an effect, nothing is lost
    if any(has_effect(graph.nodes[name]) or graph.nodes[name].op in ("Switch", "Merge") for name in before):
        return None
    return tf.make_ndarray(node.attr["value"].tensor)


def _make_weight(graph: Graph, name: str, value: np.ndarray) -> None:
    graph.replace(make_node(name, "Placeholder", dtype=tf.float32, shape=tuple(value.shape)))
    graph.weights[name] = np.array(value, order="C")


def _uniform(value: np.ndarray) -> bool:
    return bool(value.size and np.all(value == value.flat[0]))


def _closure(graph: Graph, names: Iterable[str]) -> set[str]:
    """The nodes that depend on some of them, themselves included."""
    seen: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack.extend(user for user, _, port in graph.uses(name) if port >= 0)
    return seen


def _same(body: Graph, argument: str, ref: str) -> bool:
    """Whether a result of a loop body is the argument, unchanged."""
    name, port = split(ref)
    while body.nodes[name].op == "Identity" and name != argument:
        name, port = split(body.data_inputs(body.nodes[name])[0])
    return name == argument and port == 0
