"""Batches of a stream are those of the whole, wherever files and parts are cut."""

from __future__ import annotations

import gzip
import itertools

import numpy as np
import pytest

from tfopt import batches, data
from tfopt.batches import Batches, Part, Scan
from tfopt.data import TensorSpec
from tfopt.errors import TfoptError

SPECS = {"x": TensorSpec("x", np.dtype(np.float32), (None, 2))}
SERIALIZED = {"examples": TensorSpec("examples", "string", (None,))}


@pytest.fixture
def records(tmp_path):
    """Writes so many rows a file; row i holds x = [i, 1] and label = i % 3; returns the glob."""
    import tensorflow as tf

    def write(*counts, compression=""):
        rows = itertools.count()
        for file, count in enumerate(counts):
            with tf.io.TFRecordWriter(str(tmp_path / f"part-{file}"), compression) as writer:
                for i in itertools.islice(rows, count):
                    features = tf.train.Features(
                        feature={
                            "x": tf.train.Feature(float_list=tf.train.FloatList(value=[i, 1])),
                            "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[i % 3])),
                        }
                    )
                    writer.write(tf.train.Example(features=features).SerializeToString())
        return str(tmp_path / "part-*")

    return write


def check(found, whole: data.Dataset, size: int) -> None:
    """Whether batches are those of the whole, in order."""
    found = list(found)
    assert [len(b) for b in found] == [min(size, len(whole) - s) for s in range(0, len(whole), size)]
    assert [b.start for b in found] == list(range(0, len(whole), size))
    for name, array in whole.inputs.items():
        np.testing.assert_array_equal(np.concatenate([b.inputs[name] for b in found]), array)
    np.testing.assert_array_equal(np.concatenate([b.labels for b in found]), whole.labels)


@pytest.mark.parametrize("specs", [SPECS, SERIALIZED])
@pytest.mark.parametrize("compression", ["", "GZIP"])
@pytest.mark.parametrize(
    ("counts", "size", "limit"),
    [
        ((10,), 4, None),
        ((5, 0, 1, 9), 4, None),
        ((5, 1, 9), 4, 9),
        ((3, 2), 8, None),
        ((8, 8), 4, 8),
        ((1, 1, 1), 2, 99),
    ],
)
def test_parts_of_files_are_the_batches_of_the_whole(records, monkeypatch, specs, compression, counts, size, limit):
    monkeypatch.setattr(batches, "_MARK_BYTES", 150)  # a few records
    source = records(*counts, compression=compression)
    whole = data.load(source, specs, limit=limit)
    cut = batches.cut(source, specs, size=size, limit=limit)
    check(cut, whole, size)
    parts = cut.parts([cut.scan(file) for file in cut.files])
    check(itertools.chain.from_iterable(map(cut.read, parts)), whole, size)
    assert sum(part.batches for part in parts) == -(-len(whole) // size)
    if not compression and counts == (10,):
        assert len(parts) > 1 and cut.needs_scan


def test_where_parts_begin():
    cut = Batches("s", SPECS, "label", None, 4, ("a", "b"), None)
    scans = [Scan(10, ((0, 0), (5, 500))), Scan(0), Scan(5)]
    # Batches begin at rows 0, 4, 8 and 12; the mark at row 5 comes before 8.
    assert cut.parts(scans) == [Part(0, 0, 0, 0, 2), Part(0, 500, 3, 8, 1), Part(2, 0, 2, 12, 1)]


def test_other_sources(tmp_path):
    path = str(tmp_path / "rows.npz")
    np.savez(path, x=np.arange(20, dtype=np.float32).reshape(10, 2), label=np.arange(10))
    cut = batches.cut(path, SPECS, size=4)
    assert not cut.needs_scan
    check(cut, data.load(path, SPECS), 4)


def test_what_is_wrong_is_one_line(tmp_path, records):
    def fail(message, source, **options):
        with pytest.raises(TfoptError, match=message):
            list(batches.cut(str(source), SPECS, **{"size": 4, **options}))

    fail("no file matches", tmp_path / "none")
    fail("wants labels called 'y'", records(3), label="y")
    fail("received 0 and None", records(3), size=0)
    fail("holds no rows", records(0, 0))
    whole = records(9).replace("*", "0")
    cut = batches.cut(whole, SPECS, size=4)
    content = (tmp_path / "part-0").read_bytes()
    (tmp_path / "part-0").write_bytes(content[:-7])
    fail("not a TFRecord file, or a damaged one", whole)
    with pytest.raises(TfoptError, match="ends inside its last record"):
        cut.scan(whole)
    (tmp_path / "part-0").write_bytes(gzip.compress(content)[:-20])
    fail("not a TFRecord file, or a damaged one", whole)


def test_a_warning_names_the_row_of_the_source(tmp_path, records):
    path = str(tmp_path / "rows.npz")
    x = np.ones((10, 2), np.float32)
    x[6, 0] = np.nan
    np.savez(path, x=x)
    assert "(the first is row 6)" in data.load(path, SPECS).warnings[0]
    source = records(5)
    (batch,) = batches.cut(source, SPECS, size=8)
    assert data.fit(source, {"x": x}, None, SPECS, start=100).warnings[0].endswith("(the first is row 106)")
    assert batch.warnings == ()
