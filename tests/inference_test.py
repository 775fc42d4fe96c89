"""Batch inference in one process: a record a row, all files or none."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tests.conftest import REPO
from tfopt import data, inference_job, runtime
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.inference import infer
from tfopt.readers import tf_records

MODEL = str(REPO / "saved_models" / "digits")


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """50 digits as tf.Examples with a key, and the same as .npz."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("rows")
    image = np.random.default_rng(0).random((50, 8, 8, 1), np.float32)
    with tf.io.TFRecordWriter(str(folder / "rows.gz"), "GZIP") as writer:
        for row in range(50):
            example = tf.train.Example()
            example.features.feature["image"].float_list.value.extend(image[row].ravel())
            example.features.feature["key"].bytes_list.value.append(b"row%d" % row)
            writer.write(example.SerializeToString())
    np.savez(folder / "rows.npz", image=image)
    return folder, image


def parsed(files):
    import tensorflow as tf

    return [tf.train.Example.FromString(r).features.feature for file in files for r in tf_records(file, None)]


@pytest.mark.parametrize(("shards", "limit"), [(1, None), (3, None), (1, 20)])
def test_a_record_a_row_with_its_key(examples, tmp_path, shards, limit):
    folder, image = examples
    done = infer(MODEL, str(folder / "rows.gz"), f"{tmp_path}/", keep=["key"], shards=shards, batch_size=8, limit=limit)
    assert done.rows == (limit or 50)
    assert [Path(file).name for file in done.files] == [
        f"predictions-{shard:05}-of-{shards:05}.tfrecord.gz" for shard in range(shards)
    ]
    assert sorted(tmp_path.iterdir()) == sorted(map(Path, done.files))
    found = parsed(done.files)
    with runtime.open(MODEL, threads=2) as program:
        (name,) = program.signatures["serving_default"].outputs
        expected = {}
        for start in range(0, done.rows, 8):
            rows = image[start : min(start + 8, done.rows)]
            scores = program.run("serving_default", {"image": rows})[name]
            expected |= {b"row%d" % (start + i): score for i, score in enumerate(scores)}
    keys = [row["key"].bytes_list.value[0] for row in found]
    if shards == 1:
        assert keys == list(expected)
    assert sorted(keys) == sorted(expected)
    for row in found:
        assert set(row) == {"key", name}
        np.testing.assert_array_equal(np.float32(row[name].float_list.value), expected[row["key"].bytes_list.value[0]])


def test_prediction_logs_are_data_again(examples, tmp_path):
    folder, image = examples
    done = infer(MODEL, str(folder / "rows.npz"), str(tmp_path / "day"), format="prediction_log")
    assert done.files == [str(tmp_path / "day-00000-of-00001.tfrecord.gz")]
    with runtime.open(MODEL) as program:
        specs = program.signatures["serving_default"].inputs
    found = data.load(done.files[0], specs, signature="serving_default")
    np.testing.assert_array_equal(found.inputs["image"], image)
    again = infer(MODEL, done.files[0], str(tmp_path / "again"), format="prediction_log")
    assert tf_records(again.files[0], None) == tf_records(done.files[0], None)


def test_overwriting_replaces_every_file_of_before(examples, tmp_path):
    source = str(examples[0] / "rows.npz")
    infer(MODEL, source, f"{tmp_path}/", shards=3)
    with pytest.raises(TfoptError, match=r"-00000-of-00003\.tfrecord\.gz is there already; pass --overwrite"):
        infer(MODEL, source, f"{tmp_path}/")
    done = infer(MODEL, source, f"{tmp_path}/", shards=2, overwrite=True)
    assert sorted(tmp_path.iterdir()) == sorted(map(Path, done.files)) and len(done.files) == 2


def test_more_files_than_batches(examples, tmp_path):
    done = infer(MODEL, str(examples[0] / "rows.npz"), f"{tmp_path}/", shards=4)
    with pytest.raises(TfoptError, match="holds no rows"):
        tf_records(done.files[3], None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"signature": "nope"}, "has no signature 'nope'; it has: serve, serving_default"),
        ({"outputs": ["nope"]}, "--outputs: signature 'serving_default' has no 'nope'"),
        ({"keep": ["nope"]}, "--keep: the first record of --data has no 'nope'; it has: image, key"),
        ({"keep": ["key"], "format": "prediction_log"}, "--keep goes with --format=example"),
        ({"format": "csv"}, "--format=csv: choose from example, prediction_log"),
        ({"shards": 100_000}, "--shards=100000"),
        ({"output": "gs://bucket/x"}, "this process writes local files"),
        ({"data": "npz", "keep": ["key"]}, "--data holds none"),
        ({"data": "no/such-*"}, "no file matches"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(examples, tmp_path, options, message):
    folder, _ = examples
    given = {"data": str(folder / "rows.gz"), "output": f"{tmp_path}/", **options}
    if given["data"] == "npz":
        given["data"] = str(folder / "rows.npz")
    with pytest.raises(TfoptError, match=message) as caught:
        infer(MODEL, given.pop("data"), given.pop("output"), **given)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_failure_in_the_middle_leaves_nothing(examples, tmp_path, monkeypatch):
    calls = itertools.count()

    def fail(*arguments):
        if next(calls) == 2:
            raise TfoptError("it broke")
        return real(*arguments)

    real = inference_job.call
    monkeypatch.setattr(inference_job, "call", fail)
    with pytest.raises(TfoptError, match="it broke"):
        infer(MODEL, str(examples[0] / "rows.npz"), f"{tmp_path}/new/", batch_size=8)
    assert not list(tmp_path.iterdir())


class Fixed:
    """A program whose signature takes 4 rows, no more and no fewer."""

    signatures: ClassVar = {"s": runtime.Signature({"x": data.TensorSpec("x", np.dtype(np.float32), (4,))}, {})}

    def run(self, signature, inputs):
        assert inputs["x"].shape == (4,)
        return {"y": inputs["x"] * 2, "mean": inputs["x"].mean()}


def test_a_batch_smaller_than_the_signature_is_filled_up():
    outputs = inference_job.call(Fixed(), "s", Dataset({"x": np.float32([1, 2, 3])}, None, "rows"))
    assert outputs["y"].tolist() == [2, 4, 6] and outputs["mean"].shape == ()
