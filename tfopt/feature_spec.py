"""The tf.Example features that a model parses, read from its parsing nodes."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, split

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
      kind: "fixed" (as many values in each row), "padded" (rows of different length, filled up), "sparse" or "ragged".
      dtype: of its values.
      shape: of one row; of one step of it where it is padded; () where it is sparse or ragged.
      default: of one row where it is fixed, of one value where it is padded; None where there is none.
      ports: part -> output of the node: "values"; "indices", "values" and "shape"; or "values" and "splits".
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
    """The features that a parsing node reads, sparse ones first, then dense and ragged ones."""
    inputs = graph.data_inputs(node)
    dense_types, sparse_types, ragged_types, splits_types = (
        [tf.as_dtype(t) for t in node.attr[attr].list.type]
        for attr in ("Tdense", "sparse_types", "ragged_value_types", "ragged_split_types")
    )
    ragged_keys: list[str] = []
    if node.op == "ParseSingleExample":
        sparse_keys = [key.decode() for key in node.attr["sparse_keys"].list.s]
        dense_keys = [key.decode() for key in node.attr["dense_keys"].list.s]
        defaults = inputs[1:]
    elif node.op == "ParseExample":
        n_sparse, n_dense = node.attr["Nsparse"].i, node.attr["Ndense"].i
        sparse_keys = [_text(graph, ref) for ref in inputs[2 : 2 + n_sparse]]
        dense_keys = [_text(graph, ref) for ref in inputs[2 + n_sparse : 2 + n_sparse + n_dense]]
        defaults = inputs[2 + n_sparse + n_dense :]
    else:
        sparse_keys, dense_keys, ragged_keys = (_texts(graph, ref) for ref in inputs[2:5])
        defaults = inputs[5:]
    n_sparse, n_dense, n_ragged = len(sparse_keys), len(dense_keys), len(ragged_keys)
    found = [
        Feature(key, "sparse", dtype, (), None, {"indices": i, "values": n_sparse + i, "shape": 2 * n_sparse + i})
        for i, (key, dtype) in enumerate(zip(sparse_keys, sparse_types, strict=True))
    ]
    shapes = [tuple(d.size for d in shape.dim) for shape in node.attr["dense_shapes"].list.shape]
    for i, (key, dtype, shape, ref) in enumerate(zip(dense_keys, dense_types, shapes, defaults, strict=True)):
        default = _value(graph, ref)
        default = None if default is None or not default.size else default
        ports = {"values": 3 * n_sparse + i}
        if shape and shape[0] < 0:
            found.append(Feature(key, "padded", dtype, shape[1:], default, ports))
        else:
            known = None if default is None else _broadcast(default, shape)
            found.append(Feature(key, "fixed", dtype, shape, known, ports))
    first = 3 * n_sparse + n_dense
    found += [
        Feature(key, "ragged", dtype, (), None, {"values": first + i, "splits": first + n_ragged + i}, splits)
        for i, (key, dtype, splits) in enumerate(zip(ragged_keys, ragged_types, splits_types, strict=True))
    ]
    return found


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
