"""The tf.Example features that a model parses, read from its parsing nodes."""

from __future__ import annotations

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


def _features(graph: Graph, node: NodeDef) -> dict[str, Any]:
    inputs = graph.data_inputs(node)
    dense_types = [tf.as_dtype(t) for t in node.attr["Tdense"].list.type]
    sparse_types = [tf.as_dtype(t) for t in node.attr["sparse_types"].list.type]
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
    spec: dict[str, Any] = {key: tf.io.VarLenFeature(t) for key, t in zip(sparse_keys, sparse_types, strict=True)}
    ragged_types = [tf.as_dtype(t) for t in node.attr["ragged_value_types"].list.type]
    spec |= {key: tf.io.RaggedFeature(t) for key, t in zip(ragged_keys, ragged_types, strict=True)}
    shapes = [[d.size for d in shape.dim] for shape in node.attr["dense_shapes"].list.shape]
    for key, dtype, shape, ref in zip(dense_keys, dense_types, shapes, defaults, strict=True):
        default = _value(graph, ref)
        if shape and shape[0] < 0:
            spec[key] = tf.io.FixedLenSequenceFeature(shape[1:], dtype, allow_missing=True)
        else:
            known = default is not None and default.size > 0
            spec[key] = tf.io.FixedLenFeature(shape, dtype, default_value=_broadcast(default, shape) if known else None)
    return spec


def _broadcast(default: np.ndarray | None, shape: list[int]) -> Any:
    assert default is not None
    return np.broadcast_to(default.reshape(()) if default.size == 1 else default, shape).tolist()


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
