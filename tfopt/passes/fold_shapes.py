"""fold_shapes: gives each Reshape the constant shape that its input implies, so that no shape is computed at run time.

A Reshape keeps the number of elements. Hence, where all but one dimension of the target are known and none is 0, the
last one follows, and the target is the constant [d0, .., -1, .., dn]. TensorFlow's own folding gives up on what Keras
exports for a Dense layer on more than two axes, Shape -> GatherV2 -> Prod -> Pack, when the batch is dynamic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, split
from tfopt.model import Model
from tfopt.passes import INVARIANTS, Pass
from tfopt.rewrite import Log

# The entries of a small integer tensor: an int where it is known, None where it is not.
Entries = list[int | None]

_LONGEST = 16  # no shape has more dimensions that anybody computes with
_LOOPS = ("NextIteration", "RefNextIteration")
_HAND_ON = ("Identity", "Cast", "Squeeze", "ExpandDims", "Reshape")


def run(model: Model, log: Log) -> None:
    """Makes the target shapes of Reshapes constant, in the main body, in place."""
    graph = model.graph
    if any(node.op in _LOOPS for node in graph.nodes.values()):
        log.refused["constant target shape", "graph"] = "TF 1 loops have no static shapes"
        return
    shapes = _Shapes(model)
    for node in graph.topological():
        if node.op == "Reshape" and graph.constant(node.input[1]) is None:
            shapes.infer()
            target = shapes.entries(graph, node.input[1])
            if target is None:
                continue
            if target.count(None) > 1 or 0 in target or -1 in target:
                log.refused["constant target shape", node.name] = f"its target is {_words(target)}"
            else:
                dtype = np.int64 if node.attr["Tshape"].type == tf.int64.as_datatype_enum else np.int32
                constant = graph.add_constant(
                    f"{node.name}/shape", np.array([-1 if d is None else d for d in target], dtype)
                )
                shapes.pending.append(graph.nodes[constant])
                graph.set_inputs(node.name, [node.input[0], constant, *(r for r in node.input if r[0] == "^")])
                log.applied["constant target shape"] += 1
        shapes.pending.append(node)
    graph.sweep()


def _words(target: Entries) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in target) + "]"


class _Shapes:
    """Static shapes by TensorFlow's own shape functions, inferred as far as the graph has been gone through.

    A constant target sharpens the shapes of everything after it, so nodes are handed over in topological order, in
    pieces, each only when somebody asks.
    """

    def __init__(self, model: Model):
        self.pending: list[NodeDef] = []
        self._operations: dict[str, tf.Operation] = {}
        self._graph = tf.Graph()
        with self._graph.as_default():
            tf.graph_util.import_graph_def(GraphDef(library={"function": model.library()}), name="")

    def infer(self) -> None:
        """Infers the shapes of the nodes that are pending."""
        if not self.pending:
            return
        piece = GraphDef()
        piece.versions.producer = tf.version.GRAPH_DEF_VERSION
        inside = {node.name for node in self.pending}
        outside: dict[str, tf.Tensor] = {}
        for node in self.pending:
            copy = piece.node.add()
            copy.CopyFrom(node)
            refs = [ref for ref in node.input if not ref.startswith("^")]  # shapes do not wait for anything
            del copy.input[:]
            copy.input.extend(refs)
            for ref in refs:
                if split(ref)[0] not in inside:
                    outside[ref] = self._tensor(ref)
        with self._graph.as_default():
            # Operations are kept by the name that they have in the model: importing piece by piece may rename them.
            names = [node.name for node in self.pending]
            imported = tf.graph_util.import_graph_def(piece, input_map=outside, return_elements=names, name="")
        self._operations.update(zip(names, imported, strict=True))
        self.pending = []

    def of(self, ref: str) -> tuple[int | None, ...] | None:
        """The static shape of a tensor; None where its rank is not known."""
        shape = self._tensor(ref).shape
        return None if shape.rank is None else tuple(shape.as_list())

    def _tensor(self, ref: str) -> tf.Tensor:
        name, port = split(ref)
        return self._operations[name].outputs[port]

    def entries(self, graph: Graph, ref: str, depth: int = 32) -> Entries | None:
        """What is known of the entries of a small integer tensor, a scalar as a list of one; None for nothing."""
        value = graph.constant(ref)
        if value is not None:
            return [int(v) for v in value.reshape(-1)] if value.size <= _LONGEST and value.dtype.kind in "iu" else None
        shape = self.of(ref)
        if shape is None or len(shape) > 1 or None in shape or (shape and shape[0] > _LONGEST):  # type: ignore[operator]
            return None
        unknown: Entries = [None] * (shape[0] or 0 if shape else 1)
        node = graph.producer(ref)
        if depth == 0 or split(ref)[1] != 0:
            return unknown
        inputs = [r for r in node.input if not r.startswith("^")]
        if node.op == "Shape":
            dims = self.of(inputs[0])
            return None if dims is None else list(dims)
        if node.op in _HAND_ON:
            return self.entries(graph, inputs[0], depth - 1) or unknown
        found = [self.entries(graph, r, depth - 1) for r in inputs]
        result = evaluate(node, found)
        return unknown if result is None or len(result) != len(unknown) else result


def evaluate(node: NodeDef, inputs: Sequence[Entries | None]) -> Entries | None:
    """The entries that an op computes from those of its inputs; None where this file does not know the op."""
    if node.op == "Pack":
        return [entry for given in inputs for entry in (given or [None])]
    if node.op == "ConcatV2" and all(given is not None for given in inputs[:-1]):
        return [entry for given in inputs[:-1] for entry in given or []]
    if any(given is None for given in inputs):
        return None
    known = [given for given in inputs if given is not None]
    if node.op == "GatherV2":
        source, indices, axis = known
        if axis == [0] and None not in indices:
            return [source[i] if -len(source) <= i < len(source) else None for i in indices if i is not None]
    elif node.op == "Prod":
        return [None if None in known[0] else math.prod(d for d in known[0] if d is not None)]
    elif node.op == "StridedSlice":
        return _strided_slice(node, *known)
    elif node.op == "Slice" and None not in known[1] + known[2]:
        start, size = known[1][0] or 0, known[2][0]
        return known[0][start:] if size == -1 else known[0][start : start + (size or 0)]
    elif node.op in ("Mul", "AddV2", "Add", "Sub") and len(known[0]) == len(known[1]):
        operate = {"Mul": int.__mul__, "Sub": int.__sub__}.get(node.op, int.__add__)
        return [None if a is None or b is None else operate(a, b) for a, b in zip(*known, strict=True)]
    return None


def _strided_slice(node: NodeDef, source: Entries, begin: Entries, end: Entries, strides: Entries) -> Entries | None:
    masks = [node.attr[f"{name}_mask"].i for name in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")]
    if len(begin) != 1 or masks[2] or masks[3] or None in begin + end + strides:
        return None
    if masks[4]:
        index = begin[0]
        return [source[index]] if index is not None and -len(source) <= index < len(source) else None
    return source[slice(None if masks[0] else begin[0], None if masks[1] else end[0], strides[0])]


PASS = Pass("fold_shapes", run, needs=("fold_constants",), keeps=INVARIANTS)
