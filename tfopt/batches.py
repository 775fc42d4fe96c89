"""The rows of a source in batches, one after the other: the same batches whoever reads them.

Batch k holds the rows [k B, (k + 1) B) of the source, its files in the order of their names: those of
`data.load(...).batches(B)`, without holding all rows in memory. A source is cut into parts, at a batch that begins in
the part, and its last batch reads on into the next file: so processes that share the parts see the same batches, and
a runtime, whose sums may depend on the number of rows in a call, gives the same bits.
"""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tfopt import data, examples, readers, request_log
from tfopt.data import Dataset, TensorSpec
from tfopt.errors import TfoptError

_MARK_BYTES = 32 << 20  # a file that is not gzipped is cut into parts of about this size
_LENGTH = struct.Struct("<Q")


class Part(NamedTuple):
    """Some batches of a source.

    Attributes:
        file: index of the file in which they begin.
        offset: byte in it at which to begin to read.
        skip: rows from there that belong to the batch before.
        first: number of the first row.
        batches: how many; None for all to the end of the source.
        notes: what a reader of the report should know about the source.
    """

    file: int = 0
    offset: int = 0
    skip: int = 0
    first: int = 0
    batches: int | None = None
    notes: tuple[str, ...] = ()


class Scan(NamedTuple):
    """What must be known of a file to cut it.

    Attributes:
        rows: how many there are.
        marks: where some of them begin, as (row, offset).
        left_out: requests that hold no rows for the signature: (why, how many).
    """

    rows: int
    marks: tuple[tuple[int, int], ...] = ((0, 0),)
    left_out: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Batches:
    """The batches of a source; picklable, and iterable as often as is wanted.

    Attributes:
        files: in order; for what is not a TFRecord glob, the source itself.
        format: how records become arrays; None for what is not a TFRecord glob.
        features: those of the first tf.Example; None where the rows are none.
        keep_records: whether the batches hold their tf.Examples too.
        size: rows of a batch; only the last of the source may be shorter.
    """

    source: str
    specs: Mapping[str, TensorSpec]
    label: str
    limit: int | None
    size: int
    files: tuple[str, ...]
    format: Any
    features: tuple[str, ...] | None = None
    keep_records: bool = False

    def __iter__(self) -> Iterator[Dataset]:
        part = Part(notes=self.notes([self.scan(file) for file in self.files])) if self._is_log else Part()
        return self.read(part)

    @property
    def _is_log(self) -> bool:
        return self.format is not None and not self.format.one_row_a_record

    def notes(self, scans: Sequence[Scan]) -> tuple[str, ...]:
        """What a reader of the report should know about the source: what was left out."""
        left_out: Counter[str] = Counter()
        for scan in scans:
            left_out.update(dict(scan.left_out))
        return request_log.left_out_text(self.source, left_out)

    @property
    def needs_scan(self) -> bool:
        """Whether parts can be made of it, and only after every file was scanned."""
        import tensorflow as tf

        if self.format is None or self._is_log or len(self.files) > 1:
            return self.format is not None
        file = self.files[0]
        return tf.io.gfile.stat(file).length >= 2 * _MARK_BYTES and not readers.is_gzip(file)

    def read(self, part: Part) -> Iterator[Dataset]:
        """Yields the batches of a part.

        Raises:
            TfoptError: the files cannot be read, or do not fit the signature.
        """
        first = part.first
        if self.format is None:
            whole = data.load(self.source, self.specs, label=self.label, limit=self.limit)
            for start in range(0, len(whole), self.size):
                yield whole.take(slice(start, start + self.size))
            return
        end = None if self.limit is None else max(self.limit - first, 0)
        if part.batches is not None:
            end = min(part.batches * self.size, self.limit - first if self.limit is not None else 1 << 62)
        rows = iter(itertools.islice(self._rows(part), part.skip, None if end is None else part.skip + end))
        while batch := list(itertools.islice(rows, self.size)):
            arrays, labels = self.format.arrays(batch)
            found = data.fit(self.source, arrays, labels, self.specs, start=first, notes=part.notes)
            yield replace(found, records=np.array(batch, dtype=object)) if self.keep_records else found
            first += len(batch)
        if first == 0:
            raise TfoptError(_empty(self.source, part.notes))

    def scan(self, file: str) -> Scan:
        """Counts the rows of a file, and finds places in it at which parts can begin."""
        if readers.is_gzip(file) or self._is_log:
            left_out: Counter[str] = Counter()
            rows = sum(1 for _ in self.format.rows(readers.records_of(file), left_out))
            return Scan(rows, left_out=tuple(sorted(left_out.items())))
        marks = list(_offsets(file))
        kept, due = [(0, 0)], _MARK_BYTES
        for row, offset in enumerate(marks):
            if offset >= due:
                kept.append((row, offset))
                due = offset + _MARK_BYTES
        return Scan(len(marks), tuple(kept))

    def parts(self, scans: Sequence[Scan]) -> list[Part]:
        """Cuts the source where batches begin.

        Args:
            scans: one for each file.
        """
        total = sum(scan.rows for scan in scans)
        notes = self.notes(scans)
        if not total:
            raise TfoptError(_empty(self.source, notes))
        stop = total if self.limit is None else min(total, self.limit)
        found, start = [], 0
        for file, scan in enumerate(scans):
            ends = [row for row, _ in scan.marks[1:]] + [scan.rows]
            for (row, offset), end in zip(scan.marks, ends, strict=True):
                first, last = (-(-min(r, stop) // self.size) * self.size for r in (start + row, start + end))
                if first < min(last, stop):
                    found.append(Part(file, offset, first - start - row, first, (last - first) // self.size, notes))
            start += scan.rows
        return found

    def _rows(self, part: Part) -> Iterable[Any]:
        files = self.files[part.file :]
        offsets = [part.offset] + [0] * (len(files) - 1)
        records = itertools.chain.from_iterable(map(readers.records_of, files, offsets))
        return self.format.rows(records)


def cut(
    source: str,
    specs: Mapping[str, TensorSpec],
    *,
    size: int,
    feature_spec: Mapping[str, Any] | None = None,
    label: str = "label",
    limit: int | None = None,
    signature: str | None = None,
    keep_records: bool = False,
) -> Batches:
    """Opens a source, of the forms of `data.load`; reads no more of it than the first record.

    Args:
        source: see `data.load`, as are the others.
        specs: the inputs of the signature.
        size: rows of a batch.
        feature_spec: what the model parses tf.Examples by.
        label: the array or feature that holds the labels.
        limit: read no more than this many rows.
        signature: its name, which logged requests must name.
        keep_records: have the batches hold their tf.Examples too.

    Raises:
        TfoptError: the source is missing or empty, or the first record does not fit.
    """
    if size < 1 or (limit is not None and limit < 1):
        raise TfoptError(f"{source}: wants at least 1 row a batch and in all, received {size} and {limit}")
    if source.startswith("python:") or source.endswith(".npz"):
        return Batches(source, specs, label, limit, size, (source,), None)
    files = readers.record_files(source)
    first = next(itertools.chain.from_iterable(map(readers.records_of, files)), None)
    if first is None:
        raise TfoptError(f"{source}: holds no rows")
    found = readers.format_of(source, first, specs, feature_spec, label, signature)
    rows = list(itertools.islice(found.rows([first]), 1))
    arrays, labels = found.arrays(rows) if rows else ({}, None)
    data.require_labels(source, arrays, labels, label)
    if rows:
        data.fit(source, arrays, labels, specs)
    features = tuple(examples.decode(source, first).features.feature) if found.one_row_a_record else None
    keep_records = keep_records and features is not None
    return Batches(source, specs, label, limit, size, tuple(files), found, features, keep_records)


def filled(rows: Dataset, least: int) -> dict[str, np.ndarray]:
    """The inputs of a batch, with copies of its last row where it has fewer than `least`."""
    missing = least - len(rows)
    if missing <= 0 or rows.whole.issuperset(rows.inputs):
        return rows.inputs
    return {
        name: array if name in rows.whole else np.concatenate([array, np.repeat(array[-1:], missing, axis=0)])
        for name, array in rows.inputs.items()
    }


def without_filling(outputs: Mapping[str, np.ndarray], rows: int, given: int) -> dict[str, np.ndarray]:
    """Outputs of `given` rows without those that were filled in; one that has no row for each is given as it is."""
    if rows == given:
        return dict(outputs)
    return {name: a[:rows] if a.ndim and len(a) == given else a for name, a in outputs.items()}


def _empty(source: str, notes: Sequence[str]) -> str:
    return "; ".join([f"{source}: holds no rows for these inputs", *notes])


def _offsets(file: str) -> Iterator[int]:
    """Where the records of a TFRecord file begin: length (8 bytes), its checksum (4), the data, its checksum (4)."""
    import tensorflow as tf

    with tf.io.gfile.GFile(file, "rb") as stream:
        end, offset = stream.size(), 0
        while offset < end:
            stream.seek(offset)
            header = stream.read(_LENGTH.size)
            if len(header) < _LENGTH.size:
                raise TfoptError(f"{file}: not a TFRecord file, or a damaged one: ends inside a record at {offset}")
            yield offset
            offset += _LENGTH.unpack(header)[0] + 16
        if offset != end:
            raise TfoptError(f"{file}: not a TFRecord file, or a damaged one: ends inside its last record")
