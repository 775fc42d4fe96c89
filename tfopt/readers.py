"""One reader per kind of data source; each returns arrays by name, and labels, as they are in the source."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import examples, request_log
from tfopt.data import TensorSpec, whole_inputs
from tfopt.errors import TfoptError

Arrays = dict[str, np.ndarray]


def read_npz(source: str) -> Arrays:
    """Reads every array of an .npz file; never unpickles."""
    path = Path(source)
    if not path.is_file():
        raise TfoptError(f"{source}: no such file")
    if not zipfile.is_zipfile(path):
        raise TfoptError(f"{source}: not an .npz file (numpy.savez writes them)")
    arrays: Arrays = {}
    name = ""
    try:
        with np.load(path, allow_pickle=False) as archive:
            for name in archive.files:
                arrays[name] = archive[name]
                if not isinstance(arrays[name], np.ndarray):
                    raise TfoptError(f"{source}: '{name}' is not an array")
    except (ValueError, OSError, EOFError, KeyError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise TfoptError(
                f"{source}: array '{name}' holds Python objects, which are not read because they can run code: "
                "save numbers, or strings of dtype 'S' or 'U'"
            ) from error
        raise TfoptError(f"{source}: array '{name}' cannot be read: {examples.one_line(error)}") from error
    return arrays


@dataclass(frozen=True)
class ExampleFormat:
    """How records that are tf.Examples become arrays; found once, from the first record, for all of a source.

    Attributes:
        features: what each input is parsed by; empty where the records are fed as they are.
        serialized: the input that takes the records as they are, or None.
        checked: features that the model parses itself, which the records must fit.
        label: what the labels are parsed by, under their name; empty where there are none.
    """

    source: str
    specs: Mapping[str, TensorSpec]
    features: Mapping[str, Any]
    serialized: str | None
    checked: Mapping[str, Any]
    label: Mapping[str, Any]
    one_row_a_record = True

    def rows(self, records: Iterable[bytes], left_out: Counter[str] | None = None) -> Iterable[Any]:
        """The rows of records: a tf.Example is one, and none is left out."""
        return records

    def arrays(self, rows: Sequence[Any]) -> tuple[Arrays, np.ndarray | None]:
        """Returns arrays by input, and the labels: (rows,) or (rows, values)."""
        if self.checked:
            examples.parse(self.source, rows, self.checked)
        if self.serialized is not None:
            arrays = {self.serialized: np.array(rows, dtype=object)}
        else:
            parsed = examples.parse(self.source, rows, self.features)
            arrays = {n: examples.as_rows(self.source, n, v, self.specs[n].shape) for n, v in parsed.items()}
        labels = examples.parse(self.source, rows, self.label) if self.label else {}
        return arrays, next((tensor.numpy() for tensor in labels.values()), None)


def example_format(
    source: str, first: bytes, specs: Mapping[str, TensorSpec], feature_spec: Mapping[str, Any] | None, label: str
) -> ExampleFormat:
    """Decides by the first record how all of a source are read (see `tfopt.data.load`)."""
    held = examples.decode(source, first).features.feature
    serialized = examples.serialized_input(specs)
    if serialized is not None and not feature_spec and serialized in held:
        serialized = None
    known = feature_spec or {}
    features = {} if serialized else {n: known.get(n) or examples.feature_of(source, s) for n, s in specs.items()}
    checked = known if serialized else {}  # what the model itself would stumble over
    return ExampleFormat(source, specs, features, serialized, checked, examples.label_feature(held, label))


def format_of(
    source: str,
    first: bytes,
    specs: Mapping[str, TensorSpec],
    feature_spec: Mapping[str, Any] | None,
    label: str,
    signature: str | None,
) -> ExampleFormat | request_log.LogFormat:
    """Decides by the first record how all of a source are read."""
    if request_log.is_logged(first):
        return request_log.LogFormat(source, specs, signature)
    return example_format(source, first, specs, feature_spec, label)


def read_tfrecords(
    source: str,
    specs: Mapping[str, TensorSpec],
    feature_spec: Mapping[str, Any] | None,
    label: str,
    limit: int | None,
    signature: str | None = None,
) -> tuple[Arrays, np.ndarray | None, tuple[str, ...]]:
    """Reads tf.Examples or logged requests (see `tfopt.data.load`), labels, and what to know about the data."""
    records = itertools.chain.from_iterable(map(records_of, record_files(source)))
    first = next(records, None)
    if first is None:
        raise TfoptError(f"{source}: holds no rows")
    found = format_of(source, first, specs, feature_spec, label, signature)
    left_out: Counter[str] = Counter()
    rows = list(itertools.islice(found.rows(itertools.chain([first], records), left_out), limit))
    warnings = request_log.left_out_text(source, left_out)
    if not rows:
        raise TfoptError("; ".join([f"{source}: holds no rows for these inputs", *warnings]))
    return *found.arrays(rows), warnings


def read_function(source: str, specs: Mapping[str, TensorSpec], limit: int | None) -> tuple[Arrays, np.ndarray | None]:
    """Calls the function that `python:module:function` names, and gathers the rows of its tf.data.Dataset."""
    module, _, function = source.removeprefix("python:").rpartition(":")
    if not module or not function:
        raise TfoptError(f"{source}: wants python:package.module:function")
    with _working_directory_on_path():
        try:
            dataset = getattr(importlib.import_module(module), function)()
            if not hasattr(dataset, "as_numpy_iterator"):
                raise TfoptError(f"{source}: wants a tf.data.Dataset, received {type(dataset).__name__}")
            if limit is None and dataset.cardinality() == -1:  # tf.data.INFINITE_CARDINALITY
                raise TfoptError(f"{source}: the dataset has no end: give it one with .take(rows)")
            return _gather(source, dataset, specs, limit)
        except TfoptError:
            raise
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise TfoptError(f"{source}: {type(error).__name__}: {examples.one_line(error)}") from error


def tf_records(source: str, limit: int | None) -> list[bytes]:
    """Reads the records of the TFRecord files that match a glob, in the order of their names."""
    records = list(itertools.islice(itertools.chain.from_iterable(map(records_of, record_files(source))), limit))
    if not records:
        raise TfoptError(f"{source}: holds no rows")
    return records


def record_files(source: str) -> list[str]:
    """Returns the files that match a glob, in the order of their names; several globs are joined by commas."""
    import tensorflow as tf

    files = sorted(tf.io.gfile.glob(source))  # a name may hold a comma
    if not files and "," in source:
        return [file for glob in source.split(",") for file in record_files(glob.strip())]
    if not files:
        raise TfoptError(f"{source}: no file matches")
    for file in files:
        if tf.io.gfile.isdir(file):
            raise TfoptError(f"{source}: {file} is a directory: name its files, such as '{file.rstrip('/')}/*'")
    return files


def records_of(file: str, offset: int = 0) -> Iterator[bytes]:
    """Reads the records of one TFRecord file, gzipped or not.

    Args:
        file: its path.
        offset: byte at which the first record begins; of a file that is not gzipped.
    """
    import tensorflow as tf

    try:
        compression = "GZIP" if is_gzip(file) else ""
        if offset:  # inside a function, as TensorFlow cannot serialize this op with the pipeline around it

            def rest(start: Any) -> Any:
                variant = tf.raw_ops.TFRecordDatasetV2(
                    filenames=[file], compression_type="", buffer_size=1 << 18, byte_offsets=[start]
                )
                return tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))

            dataset = tf.data.Dataset.from_tensors(tf.constant(offset, tf.int64)).flat_map(rest)
        else:
            dataset = tf.data.TFRecordDataset(file, compression_type=compression)
        for records in dataset.batch(64).as_numpy_iterator():
            yield from records
    except tf.errors.OpError as error:
        raise TfoptError(f"{file}: not a TFRecord file, or a damaged one: {examples.one_line(error)}") from error


def is_gzip(file: str) -> bool:
    """Whether a file begins as gzip does."""
    import tensorflow as tf

    with tf.io.gfile.GFile(file, "rb") as stream:
        return bool(stream.read(2) == b"\x1f\x8b")


def _gather(
    source: str, dataset: Any, specs: Mapping[str, TensorSpec], limit: int | None
) -> tuple[Arrays, np.ndarray | None]:
    """Collects the elements of a tf.data.Dataset into arrays with rows on axis 0."""
    whole = whole_inputs(specs)
    columns: dict[str, list[np.ndarray]] = {}
    labels: list[np.ndarray] = []
    batched = None
    rows = 0
    for element in dataset.as_numpy_iterator():
        inputs, label = element if isinstance(element, tuple) and len(element) == 2 else (element, None)
        if not isinstance(inputs, dict):
            wanted = ", ".join(f"'{name}'" for name in specs)
            raise TfoptError(
                f"{source}: wants elements that are a dict with {wanted}, or (dict, label); "
                f"received {type(inputs).__name__}"
            )
        arrays = {name: _array(value) for name, value in inputs.items()}
        if batched is None:
            batched = _is_batched(arrays, specs, dataset.element_spec)
        for name, array in arrays.items():
            if name not in whole:
                columns.setdefault(name, []).append(array if batched else array[None])
            elif name not in columns:  # the same for all rows
                columns[name] = [array]
        if label is not None:
            labels.append(_array(label) if batched else _array(label)[None])
        counted = [array for name, array in arrays.items() if name not in whole]
        rows += len(counted[0]) if batched and counted else 1
        if limit is not None and rows >= limit:
            break
    if not rows:
        raise TfoptError(f"{source}: holds no rows")
    joined = {name: _join(source, f"input '{name}'", parts) for name, parts in columns.items()}
    return joined, _join(source, "the labels", labels) if labels else None


def _is_batched(arrays: Arrays, specs: Mapping[str, TensorSpec], element_spec: Any) -> bool:
    """Tells whether the elements have a row axis: by rank, or where the model's is unknown, by an open axis 0."""
    counted = [name for name in specs.keys() & arrays.keys() if name not in whole_inputs(specs)]
    for name in counted:
        if (shape := specs[name].shape) is not None:
            return arrays[name].ndim == len(shape)
    element_inputs = element_spec[0] if isinstance(element_spec, tuple) else element_spec
    shapes = [element_inputs[name].shape for name in counted]
    return any(shape.rank and shape[0] is None for shape in shapes)


def _array(value: Any) -> np.ndarray:
    """Returns a NumPy array; bytes go to an object array, as NumPy's own string arrays drop trailing zeros."""
    return np.array(value, dtype=object) if isinstance(value, bytes) else np.asarray(value)


def _join(source: str, name: str, parts: list[np.ndarray]) -> np.ndarray:
    shapes = sorted({part.shape[1:] for part in parts})
    if len(shapes) > 1:
        raise TfoptError(f"{source}: {name}: wants rows of one shape, received {', '.join(map(str, shapes[:4]))}")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


@contextlib.contextmanager
def _working_directory_on_path() -> Iterator[None]:
    directory = str(Path.cwd())
    sys.path.insert(0, directory)
    try:
        yield
    finally:
        if directory in sys.path:
            sys.path.remove(directory)
