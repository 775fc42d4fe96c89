"""The tf.Example features that a model parses, read from its parsing nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, output_ranges, split

_PARSERS = ("ParseExample", "ParseExampleV2", "ParseSingleExample")


def feature_spec(graph: Graph, input_ref: str) -> dict[str, Any]:
    """The features that the parsing nodes behind an input read.

    Args:
      graph: the body.
      input_ref: the serialized examples.

    Returns:
      Feature name -> tf.io.FixedLenFeature, VarLenFeature or RaggedFeature; empty where nothing parses the input.
    """
    spec: dict[str, Any] = {}
    frontier = [split(input_ref)[0]]
    seen = set(frontier)
    while frontier:
        name = frontier.pop()
        for user in graph.users(name):
            node = graph.nodes[user]
            if node.op in _PARSERS:
                spec.update(_features(graph, node))
            elif node.op in ("Identity", "Reshape", "ExpandDims", "Squeeze") and user not in seen:
                seen.add(user)
                frontier.append(user)
    return spec


@dataclasses.dataclass(frozen=True)
class Feature:
    """What a parsing node reads of one feature.

    Attributes:
      name: the key in the tf.Example.
      kind: "fixed" (as many values in each row), "padded" (rows of different length, filled up), "sparse" or "ragged";
        of a SequenceExample's lists, "lists" (steps of one shape, filled up), "sparse_lists" or "ragged_lists".
      dtype: of its values.
      shape: of one row; of one step of it where it is padded, or a list; () where it is sparse or ragged.
      default: of one row where it is fixed, of one value where it is padded; None where there is none.
      ports: part -> output of the node: "values"; "indices", "values", "shape"; "values", "splits"; of lists also
        "values", "lengths", or "values", "outer", "inner".
      splits_dtype: of the row splits of a ragged feature.
    """

    name: str
    kind: str
    dtype: tf.DType
    shape: tuple[int, ...]
    default: np.ndarray | None
    ports: dict[str, int]
    splits_dtype: tf.DType | None = None


def parsed_features(graph: Graph, node: NodeDef) -> list[Feature]:
    """The features that a parsing node reads: sparse ones first, then dense and ragged ones, then lists of them."""
    inputs = graph.data_inputs(node)
    first = {label: start for label, start, _ in output_ranges(node, {})}
    if node.op == "ParseSequenceExampleV2":
        keys = [_texts(graph, ref) for ref in inputs[2:8]]
        context = _parsed(graph, node, "context_", first, keys[:3], inputs[9:])
        return [*context, *_lists(node, first, keys[3:])]
    if node.op == "ParseSingleExample":
        keys = [[key.decode() for key in node.attr[attr].list.s] for attr in ("sparse_keys", "dense_keys")]
        return _parsed(graph, node, "", first, [*keys, []], inputs[1:])
    if node.op == "ParseExample":
        n_sparse, n_dense = node.attr["Nsparse"].i, node.attr["Ndense"].i
        texts = [_text(graph, ref) for ref in inputs[2 : 2 + n_sparse + n_dense]]
        keys = [texts[:n_sparse], texts[n_sparse:], []]
        return _parsed(graph, node, "", first, keys, inputs[2 + n_sparse + n_dense :])
    return _parsed(graph, node, "", first, [_texts(graph, ref) for ref in inputs[2:5]], inputs[5:])


def _parsed(
    graph: Graph, node: NodeDef, prefix: str, first: dict[str, int], keys: list[list[str]], defaults: list[str]
) -> list[Feature]:
    """Features of one value, or one list of values, a row; `keys` are those of sparse, dense and ragged ones."""
    sparse, dense, ragged = keys
    found = [
        Feature(key, "sparse", dtype, (), None, _ports(first, prefix, i, *_SPARSE))
        for i, (key, dtype) in enumerate(zip(sparse, _types(node, f"{prefix}sparse_types"), strict=True))
    ]
    dense_types = _types(node, f"T{prefix}dense")
    shapes = _shapes(node, f"{prefix}dense_shapes")
    for i, (key, dtype, shape, ref) in enumerate(zip(dense, dense_types, shapes, defaults, strict=True)):
        default = _value(graph, ref)
        default = None if default is None or not default.size else default
        ports = _ports(first, prefix, i, ("values", "dense_values"))
        if shape and shape[0] < 0:
            found.append(Feature(key, "padded", dtype, shape[1:], default, ports))
        else:
            known = None if default is None else _broadcast(default, shape)
            found.append(Feature(key, "fixed", dtype, shape, known, ports))
    types, splits = (_types(node, f"{prefix}ragged_{kind}_types") for kind in ("value", "split"))
    for i, (key, dtype, split_dtype) in enumerate(zip(ragged, types, splits, strict=True)):
        ports = _ports(first, prefix, i, ("values", "ragged_values"), ("splits", "ragged_row_splits"))
        found.append(Feature(key, "ragged", dtype, (), None, ports, split_dtype))
    return found


def _lists(node: NodeDef, first: dict[str, int], keys: list[list[str]]) -> list[Feature]:
    """Features of a sequence of steps a row; `keys` are those of sparse, dense and ragged ones."""
    sparse, dense, ragged = keys
    prefix = "feature_list_"
    found = [
        Feature(key, "sparse_lists", dtype, (), None, _ports(first, prefix, i, *_SPARSE))
        for i, (key, dtype) in enumerate(zip(sparse, _types(node, f"{prefix}sparse_types"), strict=True))
    ]
    kinds = zip(dense, _types(node, f"{prefix}dense_types"), _shapes(node, f"{prefix}dense_shapes"), strict=True)
    for i, (key, dtype, shape) in enumerate(kinds):
        ports = _ports(first, prefix, i, ("values", "dense_values"), ("lengths", "dense_lengths"))
        found.append(Feature(key, "lists", dtype, shape, None, ports))
    types, splits = (_types(node, f"{prefix}ragged_{kind}_types") for kind in ("value", "split"))
    for i, (key, dtype, split_dtype) in enumerate(zip(ragged, types, splits, strict=True)):
        parts = (("values", "ragged_values"), ("outer", "ragged_outer_splits"), ("inner", "ragged_inner_splits"))
        found.append(Feature(key, "ragged_lists", dtype, (), None, _ports(first, prefix, i, *parts), split_dtype))
    return found


_SPARSE = (("indices", "sparse_indices"), ("values", "sparse_values"), ("shape", "sparse_shapes"))


def _ports(first: dict[str, int], prefix: str, index: int, *parts: tuple[str, str]) -> dict[str, int]:
    return {part: first[prefix + output] + index for part, output in parts}


def _types(node: NodeDef, attr: str) -> list[tf.DType]:
    return [tf.as_dtype(t) for t in node.attr[attr].list.type]


def _shapes(node: NodeDef, attr: str) -> list[tuple[int, ...]]:
    return [tuple(d.size for d in shape.dim) for shape in node.attr[attr].list.shape]


def _features(graph: Graph, node: NodeDef) -> dict[str, Any]:
    spec: dict[str, Any] = {}
    for feature in parsed_features(graph, node):
        if feature.kind == "sparse":
            spec[feature.name] = tf.io.VarLenFeature(feature.dtype)
        elif feature.kind == "ragged":
            spec[feature.name] = tf.io.RaggedFeature(feature.dtype)
        elif feature.kind == "padded":
            spec[feature.name] = tf.io.FixedLenSequenceFeature(list(feature.shape), feature.dtype, allow_missing=True)
        else:
            default = None if feature.default is None else feature.default.tolist()
            spec[feature.name] = tf.io.FixedLenFeature(list(feature.shape), feature.dtype, default_value=default)
    return spec


def _broadcast(default: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.broadcast_to(default.reshape(()) if default.size == 1 else default, shape)


def _value(graph: Graph, ref: str) -> np.ndarray | None:
    """A constant, also one that waits for something by a control edge, as inlined constants do."""
    node = graph.producer(ref)
    while node.op in ("Identity", "Reshape"):  # tf.io.parse_example reshapes defaults
        node = graph.producer(node.input[0])
    return tf.make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None


def _texts(graph: Graph, ref: str) -> list[str]:
    value = _value(graph, ref)
    return [] if value is None else [key.decode() for key in value.reshape(-1)]


def _text(graph: Graph, ref: str) -> str:
    return _texts(graph, ref)[0]
