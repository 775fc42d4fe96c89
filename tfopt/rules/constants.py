"""Expressions over constants: what a batch norm computes from its statistics, if nobody has folded that yet.

rsqrt(variance + epsilon) * gamma, and beta - mean * that
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.attr_value_pb2 import AttrValue
from tensorflow.core.framework.node_def_pb2 import NodeDef

# Expressions are evaluated this deep: a batch norm's chain has 8 ops.
MAX_DEPTH = 24

_UNSET = AttrValue()


def attr(node: NodeDef, key: str) -> AttrValue:
    """An attribute of a node, empty where it is not set (indexing the node's own map would set it)."""
    return node.attr.get(key, _UNSET)


def _squeeze(node: NodeDef, a: np.ndarray) -> np.ndarray:
    return np.squeeze(a, tuple(attr(node, "squeeze_dims").list.i) or None)


# Ops of constant expressions; float results keep the dtype of their operands, as TensorFlow's would.
OPS: dict[str, Callable[..., np.ndarray]] = {
    "Identity": lambda node, a: a,
    "Mul": lambda node, a, b: np.multiply(a, b),
    "Add": lambda node, a, b: np.add(a, b),
    "AddV2": lambda node, a, b: np.add(a, b),
    "Sub": lambda node, a, b: np.subtract(a, b),
    "RealDiv": lambda node, a, b: np.true_divide(a, b),
    "Neg": lambda node, a: np.negative(a),
    "Cast": lambda node, a: a.astype(tf.as_dtype(attr(node, "DstT").type).as_numpy_dtype),
    "Sqrt": lambda node, a: np.sqrt(a),
    "Rsqrt": lambda node, a: (1 / np.sqrt(a, dtype=np.float64)).astype(a.dtype),
    "Square": lambda node, a: np.square(a),
    "Reshape": lambda node, a, shape: a.reshape(tuple(shape.ravel())),
    "ExpandDims": lambda node, a, axis: np.expand_dims(a, int(axis)),
    "Squeeze": _squeeze,
    "Transpose": lambda node, a, order: np.transpose(a, order),
    "Pack": lambda node, *parts: np.stack(parts, attr(node, "axis").i),
    "ConcatV2": lambda node, *parts: np.concatenate(parts[:-1], int(parts[-1])),
}
