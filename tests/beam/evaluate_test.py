"""Evaluation on Beam: the bits of one process, on tiny artifacts and on the taxi trips, also where workers die."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="make test-tfx runs it")

import apache_beam as beam
import tensorflow as tf

from tests.comparison_test import Linear
from tfopt import evaluation
from tfopt.beam.evaluate import observe
from tfopt.beam.rows import ReadRows
from tfopt.comparison import compare
from tfopt.counterparts import opened
from tfopt.errors import TfoptError
from tfopt.optimize import Options, optimize

TWO = "--direct_running_mode=multi_processing --direct_num_workers=2"


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A, B whose first score is higher by 0.25, and C: B as a .tflite file with a batch of 8."""
    root = tmp_path_factory.mktemp("artifacts")
    module = Linear(apart=0.25, batch=8, names=("input_1", "Identity"))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.serve.get_concrete_function()], module)
    (root / "c.tflite").write_bytes(converter.convert())
    return [Linear().save(root / "a"), Linear(apart=0.25).save(root / "b"), str(root / "c.tflite")]


def _example(**features) -> bytes:
    lists = {
        name: tf.train.Feature(float_list=tf.train.FloatList(value=np.atleast_1d(value)))
        for name, value in features.items()
    }
    return tf.train.Example(features=tf.train.Features(feature=lists)).SerializeToString()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """500 rows in four files of different length; the labels hold two classes."""
    folder = tmp_path_factory.mktemp("rows")
    x = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    for part, chosen in enumerate(np.split(np.arange(500), [10, 130, 301])):
        with tf.io.TFRecordWriter(str(folder / f"rows-{part}.tfrecord")) as writer:
            for row in chosen:
                writer.write(_example(x=x[row], label=float(row % 2)))
    return str(folder / "*.tfrecord")


@pytest.mark.parametrize("metrics", [["accuracy", "logloss"], []])
def test_the_same_bits_as_here(artifacts, rows, metrics):
    options = {"metrics": metrics, "output": "scores" if metrics else None, "batch_size": 24}
    here = evaluation.evaluate(artifacts, rows, **options)
    assert here.rows == 500 and len(here.results[1].equivalence.outputs["scores"].worst) == 10
    assert evaluation.evaluate(artifacts, rows, beam_args="", **options).to_json() == here.to_json()


def test_compare_on_beam(artifacts, rows):
    here = compare(artifacts[0], artifacts[1], data=rows, eval_data=rows, eval_output="scores", latency=False)
    there = compare(
        artifacts[0], artifacts[1], data=rows, eval_data=rows, eval_output="scores", latency=False, beam_args=""
    )
    assert there.to_json() == here.to_json() and here.rows == 500 and here.a.metric.samples == 500


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """90 requests of 1 to 3 rows as TensorFlow Serving logs them, in three files; nine are for another signature."""
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    folder = tmp_path_factory.mktemp("logs")
    random = np.random.default_rng(1)
    for part in range(3):
        with tf.io.TFRecordWriter(str(folder / f"log-{part}"), "GZIP" if part else "") as writer:
            for number in range(30):
                log = PredictionLog()
                request = log.predict_log.request
                request.model_spec.signature_name = "other" if number % 9 == 8 else ""
                x = random.normal(size=(1 + number % 3, 4)).astype(np.float32)
                request.inputs["x"].CopyFrom(tf.make_tensor_proto(x))
                writer.write(log.SerializeToString())
    return str(folder / "log-*")


def test_logged_requests_are_compared(artifacts, logs):
    found = [compare(*artifacts[:2], data=logs, latency=False, beam_args=args) for args in (None, "")]
    assert found[0].to_json() == found[1].to_json()
    assert found[0].rows == 3 * sum(1 + number % 3 for number in range(30) if number % 9 != 8) == 153
    assert any("9 requests for signature 'other' were left out" in note for note in found[0].notes)
    (scores,) = [output for output in found[0].outputs if output.a == "scores"]
    assert scores.max_abs_error == pytest.approx(0.25) and scores.shape == (153, 3)
    here, there = (evaluation.evaluate(artifacts, logs, beam_args=args).to_json() for args in (None, ""))
    assert here == there


@pytest.mark.parametrize("times, seen", [(0, 476), (2, 524)])
def test_a_runner_that_loses_or_doubles_rows_is_found_out(artifacts, rows, times, seen):
    with opened(artifacts[:2], "AB") as together:
        job, read = evaluation.job_of(together, []), ReadRows(rows, together.specs, batch_size=24)
    spoilt = beam.ptransform_fn(
        lambda start: start | read | beam.FlatMap(lambda b: [b] * (times if b.start == 48 else 1))
    )
    with pytest.raises(TfoptError, match=f"the runner lost or doubled rows: {seen} were seen of 500"):
        observe(job, spoilt(), "", 2)


def test_errors_are_one_line(artifacts, rows, tmp_path):
    with pytest.raises(TfoptError, match="DirectRunner knows no --nope"):
        evaluation.evaluate(artifacts, rows, beam_args="--nope=1")
    np.savez(tmp_path / "x.npz", x=np.eye(4, dtype=np.float32))
    with pytest.raises(TfoptError, match=r"x\.npz: accuracy needs labels, and there are none") as error:
        evaluation.evaluate(artifacts, str(tmp_path / "x.npz"), metrics=["accuracy"], output="scores", beam_args="")
    assert "\n" not in str(error.value)


def _labelled(source: Path, target: Path) -> str:
    """Copies taxi trips that have a tip and a fare, with the feature `big_tip`: the tip is over a fifth of the fare."""
    for file in sorted(source.iterdir()):
        with tf.io.TFRecordWriter(str(target / file.name), "GZIP") as writer:
            for record in tf.data.TFRecordDataset(str(file), compression_type="GZIP").as_numpy_iterator():
                example = tf.train.Example.FromString(record)
                tips, fare = (example.features.feature[name].float_list.value for name in ("tips", "fare"))
                if tips and fare:
                    example.features.feature["big_tip"].int64_list.value.append(int(tips[0] > 0.2 * fare[0]))
                    writer.write(example.SerializeToString())
    return str(target / "*.gz")


@pytest.fixture(scope="module")
def taxi(shared, tmp_path_factory):
    """The Estimator, its optimized serving model, one that takes features in the place of tf.Examples; the rows."""
    root = tmp_path_factory.mktemp("taxi")
    given = shared / "models" / "tfx-chicago-taxi" / "estimator_serving"
    made = [given]
    for recipe in ("lossless", "compact_signature"):
        options = Options(recipe=recipe, tflite=(), signatures=("predict",), measure_latency=False)
        made.append(optimize(given, root / recipe, options).directory / "serving" / "1")
    (root / "rows").mkdir()
    return made, _labelled(shared / "data" / "chicago-taxi" / "tfexamples" / "Split-eval", root / "rows")


OPTIONS = {"metrics": ["auc", "accuracy"], "label": "big_tip", "signature": "predict", "output": "logistic"}


@pytest.fixture(scope="module")
def here(taxi):
    return evaluation.evaluate(*taxi, **OPTIONS)


def test_taxi_here(here):
    for result in here.results:
        assert result.counts["auc"] == {"rows": 5091, "positives": 1152, "negatives": 3939}
        assert result.metrics["auc"].value == pytest.approx(0.9166, abs=1e-4)
    for result in here.results[1:]:
        assert result.equivalence.max_error < 1e-6 and result.equivalence.broken is None


def test_taxi_on_beam(taxi, here):
    found = evaluation.evaluate(*taxi, **OPTIONS, beam_args="")
    for ours, theirs in zip(here.results, found.results, strict=True):
        assert ours.counts == theirs.counts and ours.metrics == theirs.metrics
    assert json.loads(found.to_json()) == json.loads(here.to_json())


class _DieOnce(beam.DoFn):
    """Kills its own process in the middle, the first time; the run after that is one of two whole processes."""

    def __init__(self, mark: Path):
        self._mark = mark

    def process(self, batch):
        if batch.start >= 1000 and not self._mark.exists():
            self._mark.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch


def test_taxi_while_a_worker_is_killed(taxi, here, tmp_path):
    paths, source = taxi
    with opened(paths, "ABC", "predict") as together:
        job = evaluation.job_of(together, OPTIONS["metrics"], "logistic")
        rows = ReadRows(source, together.specs, together.features, "big_tip", evaluation.BATCH)
        together.close()
        mark = tmp_path / "killed"
        seen = observe(job, beam.ptransform_fn(lambda start: start | rows | beam.ParDo(_DieOnce(mark)))(), TWO, 2)
    assert int(mark.read_text()) != os.getpid() and seen.rows == 5091
    for ours, theirs in zip(here.results, evaluation.results(job, seen, "ABC"), strict=True):
        assert ours.counts == theirs.counts and ours.metrics == theirs.metrics
        assert ours.equivalence is None or ours.equivalence.outputs == theirs.equivalence.outputs
