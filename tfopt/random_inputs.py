"""Random values for signatures that come without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfopt.data import STRING
from tfopt.errors import TfoptError

_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz0123456789", dtype="S1")
_MISSING = 0.25  # how often an optional feature is left out


@dataclass(frozen=True)
class Draw:
    """Draws arrays of any dtype: floats standard normal, integers in [0, int_high), uint8 in its whole range,
    strings random or, for one half, from `tokens`. A feature of variable length has `values` (least, most) values;
    where it always has one, no feature is left out.
    """

    random: np.random.Generator
    int_high: int = 10
    tokens: tuple[bytes, ...] = ()
    values: tuple[int, int] = (0, 3)

    def __call__(self, dtype: Any, shape: Sequence[int]) -> np.ndarray:
        """Returns an array of the dtype (or "string") and shape."""
        if dtype == STRING:
            return self._strings(shape)
        dtype = np.dtype(dtype)
        if dtype == np.bool_:
            return self.random.random(shape) < 0.5
        if dtype.kind in "iu":
            return self.random.integers(0, 256 if dtype == np.uint8 else self.int_high, shape).astype(dtype)
        if dtype.kind == "c":
            return (self.random.standard_normal(shape) + 1j * self.random.standard_normal(shape)).astype(dtype)
        return self.random.standard_normal(shape).astype(dtype)

    def _strings(self, shape: Sequence[int]) -> np.ndarray:
        strings = np.empty(shape, dtype=object)
        for index in np.ndindex(*shape):
            if self.tokens and self.random.random() < 0.5:
                strings[index] = self.tokens[self.random.integers(len(self.tokens))]
            else:
                strings[index] = self.random.choice(_LETTERS, self.random.integers(1, 9)).tobytes()
        return strings


def random_examples(feature_spec: Mapping[str, Any], draw: Draw, rows: int) -> np.ndarray:
    """Returns serialized tf.Examples, an object array (rows,), that parse by the spec.

    Features of fixed length without a default are always there; others are left out at times.
    """
    import tensorflow as tf

    features = {**feature_spec}
    records = np.empty(rows, dtype=object)
    for row in range(rows):
        example = tf.train.Example()
        for name in sorted(features):
            for key, values in _feature(name, features[name], draw).items():
                kind = {"S": "bytes_list", "O": "bytes_list", "f": "float_list"}.get(values.dtype.kind, "int64_list")
                getattr(example.features.feature[key], kind).value.extend(values.tolist())
        records[row] = example.SerializeToString(deterministic=True)
    return records


def _feature(name: str, feature: Any, draw: Draw) -> dict[str, np.ndarray]:
    """Returns the flat values of one feature by the keys that it is read from; none where it is left out."""
    kind = type(feature).__name__
    dtype = _numpy_type(feature.dtype)
    left_out = draw.random.random() < _MISSING and draw.values != (1, 1)
    count = int(draw.random.integers(draw.values[0], draw.values[1] + 1))
    if kind == "FixedLenFeature":
        if left_out and feature.default_value is not None:
            return {}
        return {name: draw(dtype, [int(np.prod(feature.shape, dtype=int))])}
    if kind == "SparseFeature":
        keys = [feature.index_key] if isinstance(feature.index_key, str) else list(feature.index_key)
        sizes = [feature.size] if isinstance(feature.size, int) else list(feature.size)
        count = min(count, *sizes)
        indices = {k: np.sort(draw.random.permutation(n)[:count]) for k, n in zip(keys, sizes, strict=True)}
        return {**indices, feature.value_key: draw(dtype, [count])}
    if left_out:
        return {}
    if kind == "VarLenFeature":
        return {name: draw(dtype, [count])}
    if kind == "FixedLenSequenceFeature":
        return {name: draw(dtype, [count * int(np.prod(feature.shape, dtype=int))])}
    if kind == "RaggedFeature" and not feature.partitions:
        return {feature.value_key or name: draw(dtype, [count])}
    raise TfoptError(f"feature '{name}': no random values for {kind}{' with partitions' * (kind == 'RaggedFeature')}")


def _numpy_type(dtype: Any) -> Any:
    """Returns the dtype of a feature for `Draw`; it may be a tf.DType, or the name of one."""
    name = getattr(dtype, "name", dtype)
    return STRING if name == "string" else np.dtype(name)
