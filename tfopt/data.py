"""Representative and evaluation data: `.npz` files, TFRecords of tf.Example, or a Python function.

Whatever the source, the result is a Dataset: NumPy arrays keyed by input name, rows on axis 0, already cast to
what the signature wants. What does not fit ends in one line that shows wanted and received. `probes` draws
random rows for a signature without data.

TensorFlow is imported only where a source needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tfopt.errors import TfoptError

STRING = "string"


class TensorSpec(NamedTuple):
    """One input or output of a signature.

    `dtype` is a NumPy dtype or "string". A None in `shape` is an unknown dimension, None for all of it an unknown
    rank.
    """

    name: str
    dtype: Any
    shape: tuple[int | None, ...] | None

    def __str__(self) -> str:
        return f"'{self.name}' {_dtype_name(self.dtype)} {_shape_text(self.shape)}"


@dataclass(frozen=True)
class Dataset:
    """Rows to run a signature on.

    Attributes:
        inputs: arrays by input name, the same number of rows on axis 0; strings are object arrays of bytes.
        labels: rows on axis 0 too, or None.
        source: where they came from, for the report.
        whole: names of the inputs that have no row axis (see `whole_inputs`): every batch gets them unchanged.
        warnings: what a reader of the report should know about the data.
        start: number of the first row in the source, from 0.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    source: str
    whole: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()
    start: int = 0
    records: np.ndarray | None = None

    def __len__(self) -> int:
        return next((len(array) for name, array in self.inputs.items() if name not in self.whole), 1)

    def take(self, rows: slice) -> Dataset:
        """Returns the dataset of some rows."""
        inputs = {name: a if name in self.whole else a[rows] for name, a in self.inputs.items()}
        labels = None if self.labels is None else self.labels[rows]
        records = None if self.records is None else self.records[rows]
        start = self.start + rows.indices(len(self))[0]
        return Dataset(inputs, labels, self.source, self.whole, self.warnings, start, records)

    def batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields the inputs `size` rows at a time; the last batch may be shorter."""
        for start in range(0, len(self), size):
            yield self.take(slice(start, start + size)).inputs


def whole_inputs(specs: Mapping[str, TensorSpec]) -> frozenset[str]:
    """Returns the names of the inputs without a row axis.

    Rows are counted by the inputs with an unknown first dimension; scalars and fixed first dimensions beside them
    count none. Where no first dimension is unknown, one that all inputs share is the (fixed) batch.
    """
    first = {n: s.shape[0] if s.shape else None for n, s in specs.items() if s.shape != ()}
    scalars = specs.keys() - first.keys()
    if None in first.values():
        return frozenset(scalars | {name for name, size in first.items() if size is not None})
    return frozenset(specs) if len(set(first.values())) > 1 else frozenset(scalars)


def batch_size(specs: Mapping[str, TensorSpec], default: int) -> int:
    """Returns the rows that one call takes: the fixed batch of the signature, or else `default`."""
    first = [spec.shape[0] for name, spec in specs.items() if spec.shape and name not in whole_inputs(specs)]
    return next((size for size in first if size is not None), default)


def load(
    source: str,
    specs: Mapping[str, TensorSpec],
    *,
    feature_spec: Mapping[str, Any] | None = None,
    label: str = "label",
    limit: int | None = None,
    signature: str | None = None,
) -> Dataset:
    """Reads rows for a signature.

    Args:
        source: one of
            `FILE.npz`: arrays keyed by input name, and `label`;
            a TFRecord file or glob of tf.Example, or several joined by commas, gzipped or not. A signature with one
            input, a string, gets the records as they are (unless they hold a feature called like that input); otherwise
            they are parsed into the named inputs;
            `python:package.module:function`: a function without arguments, found with the current directory on the
            path, that returns a tf.data.Dataset of dict or (dict, label), batched or not.
        specs: the inputs of the signature.
        feature_spec: feature name -> tf.io.FixedLenFeature, VarLenFeature, ..., as found in the model. Features that
            it does not name are parsed by the dtype and shape of the input of that name.
        label: the array or feature that holds the labels; there need be none where it is "label".
        limit: read no more than this many rows.
        signature: its name, which logged requests must name; None takes those that name its inputs.

    Raises:
        TfoptError: the source is missing, empty, cannot be read or does not fit `specs`.
    """
    if limit is not None and limit < 1:
        raise TfoptError(f"{source}: the number of rows to read must be at least 1, received {limit}")
    from tfopt import readers  # which need the types above

    notes: tuple[str, ...] = ()
    if source.startswith("python:"):
        arrays, labels = readers.read_function(source, specs, limit)
    elif source.endswith(".npz"):
        arrays = readers.read_npz(source)
        labels = arrays.get(label) if label in specs else arrays.pop(label, None)
    else:
        arrays, labels, notes = readers.read_tfrecords(source, specs, feature_spec, label, limit, signature)
    require_labels(source, arrays, labels, label)
    return fit(source, arrays, labels, specs, limit, notes=notes)


def probes(
    specs: Mapping[str, TensorSpec],
    seed: int,
    rows: int,
    feature_spec: Mapping[str, Any] | None = None,
    *,
    size: int = 8,
    shapes: Mapping[str, Sequence[int]] | None = None,
    int_high: int = 10,
    tokens: Sequence[bytes] = (),
    values: tuple[int, int] = (0, 3),
    unknown_rank: Sequence[int | None] = (None,),
) -> Dataset:
    """Draws seeded random inputs that fit a signature in one call.

    Args:
        specs: the inputs of the signature.
        seed: the same seed and arguments give the same inputs.
        rows: for an unknown first dimension; a fixed one is kept.
        feature_spec: makes serialized tf.Examples for the string input of a signature that has no other input.
        size: for every other unknown dimension.
        shapes: whole shapes, rows included, for inputs (by name) that need others.
        int_high: integers are in [0, int_high), as indices must be valid; uint8 uses its whole range.
        values: least and most values of a tf.Example feature of variable length.
        unknown_rank: the shape that is tried for an unknown rank.
        tokens: strings that the model knows, such as its vocabulary; half of the strings are drawn from them.

    Returns:
        Floats are standard normal, booleans and strings random.
    """
    from tfopt import examples, random_inputs  # which need the types above

    draw = random_inputs.Draw(np.random.default_rng(seed), int_high, tuple(tokens), values)
    serialized = examples.serialized_input(specs) if feature_spec else None
    inputs = {}
    for name, spec in specs.items():
        known = unknown_rank if spec.shape is None else spec.shape
        shape = [(rows if axis == 0 else size) if d is None else d for axis, d in enumerate(known)]
        shape = list((shapes or {}).get(name, shape))
        if name == serialized and feature_spec:
            inputs[name] = random_inputs.random_examples(feature_spec, draw, rows=int(np.prod(shape)))
        else:
            inputs[name] = draw(spec.dtype, shape)
    return Dataset(inputs, None, f"random inputs, seed {seed}", whole_inputs(specs))


def require_labels(source: str, arrays: Mapping[str, Any], labels: np.ndarray | None, label: str) -> None:
    """Raises where labels were asked for by a name, and there are none."""
    if labels is None and label != "label":
        raise TfoptError(f"{source}: wants labels called '{label}', received {_names(arrays) or 'nothing'}")


def fit(
    source: str,
    arrays: dict[str, np.ndarray],
    labels: np.ndarray | None,
    specs: Mapping[str, TensorSpec],
    limit: int | None = None,
    start: int = 0,
    notes: Sequence[str] = (),
) -> Dataset:
    """Checks names, row counts, shapes and values; casts; returns what the signature can be fed."""
    missing = [str(spec) for name, spec in specs.items() if name not in arrays]
    if missing:
        raise TfoptError(f"{source}: wants {', '.join(missing)}; received {_names(arrays) or 'nothing'}")
    extra = arrays.keys() - specs.keys()
    warnings = [*notes, *(f"{source}: '{n}' is not an input of the model: ignored" for n in extra)]
    whole = whole_inputs(specs)
    inputs: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for name, spec in specs.items():
        array = _cast(source, arrays[name], spec)
        axis = 0 if name in whole else 1
        if axis and not array.ndim:
            raise TfoptError(f"{source}: input {spec} wants rows, received a single value")
        want = spec.shape if spec.shape is None else spec.shape[axis:]
        if want is not None and (
            len(want) != array.ndim - axis
            or any(w not in (None, d) for w, d in zip(want, array.shape[axis:], strict=True))
        ):
            rows_of = "rows of shape " if axis else "shape "
            raise TfoptError(
                f"{source}: input {spec} wants {rows_of}{_shape_text(want)}, "
                f"received {_shape_text(array.shape[axis:])} ({array.dtype} {_shape_text(array.shape)} in all)"
            )
        if axis:
            counts[f"'{name}'"] = len(array)
            array = array[:limit]
        if (bad := _non_finite(array, start)) is not None:
            warnings.append(f"{source}: input '{name}' holds NaN or infinity in {bad}")
        inputs[name] = array
    if labels is not None:
        labels = np.asarray(labels)
        if not labels.ndim:
            raise TfoptError(f"{source}: labels must have one row per row of the inputs, received a single value")
        counts["the labels"] = len(labels)
        labels = labels[:limit]
        if (bad := _non_finite(labels, start)) is not None:
            raise TfoptError(f"{source}: the labels hold NaN or infinity in {bad}")
    if len(set(counts.values())) > 1:
        received = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise TfoptError(f"{source}: wants as many rows everywhere, received {received}")
    if 0 in counts.values():
        raise TfoptError(f"{source}: holds no rows")
    return Dataset(inputs, labels, source, whole, tuple(sorted(warnings)), start)


def _cast(source: str, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Casts to the dtype of `spec` where every value survives; floats may be rounded, as float64 data always is."""
    problem = f"{source}: input '{spec.name}' wants {_dtype_name(spec.dtype)}, received {array.dtype}"
    if spec.dtype == STRING:
        if array.dtype.kind == "U":
            return np.char.encode(array, "utf-8").astype(object)
        if array.dtype.kind not in "SO":
            raise TfoptError(problem)
        return array.astype(object)
    dtype = np.dtype(spec.dtype)
    if array.dtype == dtype:
        return array
    numeric = array.dtype.kind in "biufc" or _is_float(array.dtype)
    if not numeric or (array.dtype.kind == "c" and dtype.kind != "c"):
        raise TfoptError(problem)
    with np.errstate(all="ignore"):
        cast = array.astype(dtype)
        if _is_float(array.dtype) and _is_float(dtype):
            kept = np.isfinite(cast) | ~np.isfinite(array)
        else:
            # The sign catches -1 -> 2**64 - 1 -> -1.
            kept = (cast.astype(array.dtype) == array) & ((cast.real < 0) == (array.real < 0))
    if not kept.all():
        example = array[~kept].flat[0]
        raise TfoptError(f"{problem} with values that it cannot hold, such as {example}")
    return cast


def _non_finite(array: np.ndarray, start: int) -> str | None:
    """Returns where a float array is not finite, in words, or None."""
    if not array.size or not (_is_float(array.dtype) or array.dtype.kind == "c"):
        return None
    finite = np.isfinite(array).reshape(len(array) if array.ndim else 1, -1).all(axis=1)
    if finite.all():
        return None
    return f"{np.count_nonzero(~finite)} of {len(finite)} rows (the first is row {start + int(np.argmin(finite))})"


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _is_float(dtype: np.dtype) -> bool:
    # bfloat16 and its kin are of kind "V" to NumPy.
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def _dtype_name(dtype: Any) -> str:
    return STRING if dtype == STRING else np.dtype(dtype).name


def _shape_text(shape: Sequence[int | None] | None) -> str:
    return "of any shape" if shape is None else "(" + ", ".join("?" if d is None else str(d) for d in shape) + ")"
