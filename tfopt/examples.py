"""tf.Examples: parsing them to arrays, and drawing random ones from a feature spec.

A feature spec maps feature names to tf.io.FixedLenFeature, VarLenFeature, FixedLenSequenceFeature, SparseFeature
or RaggedFeature, as tf.io.parse_example takes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfopt.data import STRING, TensorSpec
from tfopt.errors import TfoptError

# tf.Example knows three types of values.
_LISTS = {"int64": "int64_list", "float32": "float_list", "string": "bytes_list"}


def serialized_input(specs: Mapping[str, TensorSpec]) -> str | None:
    """Returns the input that can take serialized examples: the only one, a vector of strings."""
    for name, spec in specs.items():
        if len(specs) == 1 and spec.dtype == STRING and (spec.shape is None or len(spec.shape) == 1):
            return name
    return None


def decode(source: str, record: bytes) -> Any:
    """Returns a record as a tf.train.Example."""
    import tensorflow as tf
    from google.protobuf.message import DecodeError

    try:
        return tf.train.Example.FromString(record)
    except DecodeError as error:
        raise TfoptError(f"{source}: wants tf.Examples, received records that are none") from error


def feature_of(source: str, spec: TensorSpec) -> Any:
    """Returns the feature that holds an input by the same name: as many values as one row has elements."""
    import tensorflow as tf

    if spec.shape is None or None in spec.shape[1:]:
        return tf.io.VarLenFeature(_example_type(spec.dtype))
    return tf.io.FixedLenFeature(spec.shape[1:], _example_type(spec.dtype))


def parse(source: str, records: Sequence[bytes], features: Mapping[str, Any]) -> dict[str, Any]:
    """Parses records; returns a tensor of any kind per feature."""
    import tensorflow as tf

    try:
        return tf.io.parse_example(list(records), dict(features))
    except (tf.errors.OpError, ValueError) as error:
        received = ", ".join(f"'{name}'" for name in sorted(decode(source, records[0]).features.feature))
        raise TfoptError(
            f"{source}: the examples do not fit the features of the model: {one_line(error)} "
            f"(the first record holds {received or 'no features'})"
        ) from error


def as_rows(source: str, name: str, value: Any, shape: Sequence[int | None] | None) -> np.ndarray:
    """Returns one parsed feature as an array of rows of the shape that its input wants.

    Examples hold flat lists: values are reshaped where their number agrees. Rows of different lengths are refused,
    as padding is the model's own choice.
    """
    import tensorflow as tf

    if isinstance(value, tf.SparseTensor):
        value = tf.RaggedTensor.from_sparse(value)
    if isinstance(value, tf.RaggedTensor):
        lengths = sorted(set(value.row_lengths().numpy().tolist()))
        if len(lengths) > 1:
            raise TfoptError(
                f"{source}: feature '{name}': wants as many values in every record, "
                f"received {lengths[0]} to {lengths[-1]}"
            )
        value = value.to_tensor()
    array = value.numpy()
    if shape is None:
        return array
    want = [-1 if size is None else size for size in shape[1:]]
    if want.count(-1) <= 1:
        sizes = int(np.prod([size for size in want if size != -1]))
        per_row = array.size // len(array)
        if per_row == sizes or (-1 in want and sizes and per_row % sizes == 0):
            return array.reshape(len(array), *want)
    return array


def label_feature(held: Any, label: str) -> dict[str, Any]:
    """Returns what parses the labels: as many values a record as the first holds; empty where it holds none.

    Args:
        held: the features of the first record, a tf.train.Features.feature map.
        label: the name of the feature.
    """
    import tensorflow as tf

    kind = held[label].WhichOneof("kind") if label in held else None
    if kind is None:
        return {}
    dtype = next(name for name, value in _LISTS.items() if value == kind)
    count = len(getattr(held[label], kind).value)
    return {label: tf.io.FixedLenFeature([] if count == 1 else [count], dtype)}


def one_line(error: BaseException) -> str:
    """Returns the message of an exception on one line of moderate length, without TensorFlow's ornaments."""
    message = re.sub(r"\{\{.*?\}\}|\[Op:.*|Name: <unknown>, ", "", " ".join(str(error).split())).strip()
    return message if len(message) <= 300 else message[:297] + "..."


def _example_type(dtype: Any) -> str:
    if dtype == STRING:
        return "string"
    return "float32" if np.dtype(dtype).kind not in "biu" else "int64"
