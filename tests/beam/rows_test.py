"""The batches of a PCollection are those of one process."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="make test-tfx runs it")

import apache_beam as beam

from tfopt import batches, data
from tfopt.beam import pipeline
from tfopt.beam.rows import ReadRows
from tfopt.data import TensorSpec
from tfopt.errors import TfoptError

SPECS = {"x": TensorSpec("x", np.dtype(np.float32), (None, 2))}


def collect(read: ReadRows):
    found = pipeline.run(lambda root: root | read | beam.combiners.ToList(), "")
    return sorted(found, key=lambda batch: batch.start)


def same(found, expected) -> None:
    expected = list(expected)
    assert [b.start for b in found] == [b.start for b in expected]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a.inputs["x"], b.inputs["x"])
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.warnings == b.warnings


@pytest.mark.parametrize("counts", [(11,), (5, 0, 7), (1,) * 20])
def test_tfrecords(tmp_path, counts):
    import tensorflow as tf

    row = 0
    for file, count in enumerate(counts):
        with tf.io.TFRecordWriter(str(tmp_path / f"rows-{file:02}")) as writer:
            for _ in range(count):
                example = tf.train.Example()
                example.features.feature["x"].float_list.value.extend([row, 1])
                example.features.feature["label"].int64_list.value.append(row % 2)
                writer.write(example.SerializeToString())
                row += 1
    source = str(tmp_path / "rows-*")
    same(collect(ReadRows(source, SPECS, batch_size=4)), batches.cut(source, SPECS, size=4))
    limited = collect(ReadRows(source, SPECS, batch_size=4, limit=6))
    assert [len(batch) for batch in limited] == [4, 2]
    with pytest.raises(TfoptError, match="wants labels called 'y'"):
        ReadRows(source, SPECS, label="y")


def test_npz(tmp_path):
    source = str(tmp_path / "rows.npz")
    np.savez(source, x=np.arange(80, dtype=np.float32).reshape(40, 2), label=np.arange(40))
    found = collect(ReadRows(source, SPECS))
    assert [len(batch) for batch in found] == [32, 8]
    np.testing.assert_array_equal(np.concatenate([b.labels for b in found]), data.load(source, SPECS).labels)


def test_logged_requests(tmp_path):
    import tensorflow as tf
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    with tf.io.TFRecordWriter(str(tmp_path / "log")) as writer:
        for rows, name in ((3, "x"), (1, "y"), (5, "x")):
            log = PredictionLog()
            array = np.random.default_rng(rows).random((rows, 2), np.float32)
            log.predict_log.request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
            writer.write(log.SerializeToString())
    source = str(tmp_path / "log")
    found = collect(ReadRows(source, SPECS, batch_size=4))
    assert [len(batch) for batch in found] == [4, 4]
    assert found[0].warnings == (f"{source}: 1 requests with the inputs 'y' were left out",)
    for batch, expected in zip(found, batches.cut(source, SPECS, size=4), strict=True):
        np.testing.assert_array_equal(batch.inputs["x"], expected.inputs["x"])
