"""How large the ids of an input may get: the tables that they are looked up in say it.

Ids that a table of embeddings does not have make TensorFlow fail, so such a bound is sure. A one-hot encoding gives
zeros for ids that are beyond it, and a hash table its default, so theirs is only what the model was made for.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, Shape, join, split
from tfopt.model import Model

# Ops whose result holds the numbers of one input, and no others, but for its dtype and shape: op -> that input.
_HAND_ON = {
    **dict.fromkeys(("BroadcastTo", "ExpandDims", "Identity", "Reshape", "Snapshot", "Squeeze"), (0,)),
    **{"GatherNd": (0,), "SparseToDense": (2,)},  # values with a mask, whose filler is 0
}
_GATHERS = ("Gather", "GatherV2", "ResourceGather")
_SEGMENTS = ("SparseSegmentMean", "SparseSegmentSqrtN", "SparseSegmentSum")
_FILLS = ("InitializeTableV2", "LookupTableImportV2")


@dataclasses.dataclass(frozen=True)
class Bound:
    """Ids are in [0, size).

    Attributes:
      size: of the vocabulary.
      node: the op that looks them up.
      sure: whether ids beyond it make TensorFlow fail.
      negative: whether ids in [-size, 0) count from the end, as in Keras.
    """

    size: int
    node: str
    sure: bool
    negative: bool = False


def vocabulary_bound(model: Model, source: str, shapes: dict[str, Shape]) -> Bound | None:
    """The bound on the numbers of a Placeholder: the least sure one, else the greatest of the others.

    Args:
      model: the model.
      source: the Placeholder.
      shapes: of `graph.infer_shapes`.
    """
    graph = model.graph
    found: list[Bound] = []
    seen: set[str] = set()
    pending = [(source, False, True)]
    while pending:
        name, negative, sure = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        for user, index, port in graph.uses(name):
            node = graph.nodes[user]
            if port != 0:
                continue
            to_integer = node.op == "Cast" and tf.as_dtype(node.attr["DstT"].type) in (tf.int32, tf.int64)
            if to_integer or index in _HAND_ON.get(node.op, ()) or node.op in ("ConcatV2", "Pack"):
                pending.append((user, negative, sure))
            elif index == 2 and _counts_from_the_end(graph, node):
                pending.append((user, True, sure))
            elif (index and node.op in ("Select", "SelectV2")) or (index == 0 and node.op == "StridedSlice"):
                # What is not selected is not looked up.
                pending.append((user, negative, False))
            elif index == 1 and (bound := _looked_up(model, user, shapes)) is not None:
                found.append(dataclasses.replace(bound, negative=negative, sure=bound.sure and sure))
            elif index == 0 and node.op == "OneHot":
                depth = graph.constant(node.input[1])
                if depth is not None:
                    found.append(Bound(int(depth), user, sure=False))
    certain = [bound for bound in found if bound.sure]
    if certain:
        return min(certain, key=lambda bound: bound.size)
    return max(found, key=lambda bound: bound.size, default=None)


def _looked_up(model: Model, name: str, shapes: dict[str, Shape]) -> Bound | None:
    """The bound of an op whose second input are ids."""
    graph, node = model.graph, model.graph.nodes[name]
    if node.op in _GATHERS or node.op.removesuffix("WithNumSegments") in _SEGMENTS:
        axis = graph.constant(node.input[2]) if node.op == "GatherV2" else np.array(0)
        shape = _variable(graph, node.input[0]) if node.op == "ResourceGather" else None
        shape = shape or shapes.get(join(*split(node.input[0])))
        size = None if axis is None or not shape else shape[int(axis)]
        return None if size is None else Bound(size, name, sure=True)
    if node.op == "LookupTableFindV2":
        keys = _keys(model, split(node.input[0])[0])
        if keys is not None and keys.size and keys.dtype.kind in "iu" and keys.min() >= 0:
            return Bound(int(keys.max()) + 1, name, sure=False)
    return None


def _counts_from_the_end(graph: Graph, node: NodeDef) -> bool:
    """Whether this is where(x < 0, x + size, x), which Keras writes before a lookup."""
    if node.op not in ("Select", "SelectV2"):
        return False
    below, moved = graph.producer(node.input[0]), graph.producer(node.input[1])
    zero = graph.constant(below.input[1]) if below.op == "Less" else None
    same = {join(*split(ref)) for ref in (node.input[2], *below.input[:1], *moved.input[:1])}
    return zero is not None and not zero.any() and moved.op in ("Add", "AddV2") and len(same) == 1


def _variable(graph: Graph, ref: str) -> Shape:
    node = graph.producer(ref)
    if node.op != "VarHandleOp" or node.attr["shape"].shape.unknown_rank:
        return None
    return tuple(None if d.size < 0 else d.size for d in node.attr["shape"].shape.dim)


def _keys(model: Model, table: str) -> np.ndarray | None:
    if table in model.tables:
        return model.tables[table][0]
    fills = [user for user in model.graph.users(table) if model.graph.nodes[user].op in _FILLS]
    return model.graph.constant(model.graph.nodes[fills[0]].input[1]) if len(fills) == 1 else None
