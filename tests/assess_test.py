"""What an artifact costs and whether it passes: figures filled in, and rejections with their reason."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.conftest import REPO
from tfopt import metrics, runtime
from tfopt.assess import Assessment, assess
from tfopt.data import Dataset, probes
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.model import load
from tfopt.report import Artifact

DIGITS = REPO / "saved_models" / "digits"


@pytest.fixture(scope="module")
def job():
    """The original scored on its own answers: accuracy 1."""
    with runtime.open(DIGITS) as program:
        specs = program.signatures["serving_default"].inputs
        rows = probes(specs, seed=0, rows=64)
        (scores,) = program.run("serving_default", rows.inputs).values()
    data = Dataset(rows.inputs, scores.argmax(axis=1), "its own answers")
    return Assessment(
        original=DIGITS,
        signature="serving_default",
        comparison={"serving_default": rows},
        evaluation=data,
        latency=False,
    )


def _emit(directory, change):
    """Emits the digits model with the kernel of its last layer changed."""
    model = load(DIGITS)
    name = next(n for n, w in model.weights.items() if w.ndim == 2 and w.shape[1] == 10)
    model.weights[name] = change(model.weights[name])
    saved_model.save(model, directory)
    return str(directory)


def test_an_equal_artifact_is_measured_and_kept(job, tmp_path):
    original, artifact = assess(job, [Artifact("serving", "saved_model", _emit(tmp_path / "a", lambda w: w))])
    assert artifact.rejected is None and original.accuracy == metrics.Metric("accuracy", 1.0, 64)
    assert artifact.accuracy == original.accuracy and artifact.agreement == 1.0
    assert artifact.max_rel_error < 1e-5 and 0 < artifact.bytes < original.bytes
    assert artifact.parameters <= original.parameters and artifact.flops == original.flops


def test_weights_are_looked_into_where_they_are_few_or_zeros(job, tmp_path):
    few = _emit(tmp_path / "few", lambda w: np.where(w < 0, np.float32(0), np.float32(0.5)))
    original, artifact, other = assess(
        job, [Artifact("a", "saved_model", few), Artifact("b", "saved_model", "", rejected="no")]
    )
    assert 0 <= original.zeros < artifact.zeros < 0.1 and other.zeros is None
    assert original.entropy_bytes > artifact.entropy_bytes + 2000  # 640 weights of one bit each
    original, artifact = assess(job, [Artifact("a", "saved_model", _emit(tmp_path / "same", lambda w: w))])
    assert original.zeros is None and artifact.entropy_bytes is None


def test_a_serving_model_that_differs_is_rejected(job, tmp_path):
    path = _emit(tmp_path / "b", lambda w: -w)
    _, serving, other = assess(job, [Artifact("serving", "saved_model", path), Artifact("other", "saved_model", path)])
    assert "differ from the original's" in serving.rejected
    assert other.rejected is None and other.max_rel_error > 1e-4 and other.accuracy.value < 1


@pytest.mark.parametrize(("bar", "kept"), [(1.0, True), (1e-3, False)])
def test_the_accuracy_bar(job, tmp_path, bar, kept):
    strict = dataclasses.replace(job, max_accuracy_drop=bar)
    _, artifact = assess(strict, [Artifact("other", "saved_model", _emit(tmp_path / "c", lambda w: -w))])
    assert (artifact.rejected is None) == kept
    assert kept or "more than --max_accuracy_drop=0.001" in artifact.rejected


def test_outputs_that_are_not_finite_are_rejected(job, tmp_path):
    path = _emit(tmp_path / "d", lambda w: np.full_like(w, np.nan))
    _, artifact = assess(job, [Artifact("other", "saved_model", path)])
    assert "not finite" in artifact.rejected


def test_what_does_not_load_is_rejected_and_the_others_go_on(job, tmp_path):
    (tmp_path / "e.tflite").write_bytes(b"no model")
    missing = Artifact("float32", "tflite", str(tmp_path / "e.tflite"))
    good = Artifact("serving", "saved_model", _emit(tmp_path / "f", lambda w: w))
    assert [bool(a.rejected) for a in assess(job, [missing, good])] == [False, True, False]


def test_an_original_that_does_not_load_ends_the_run(job, tmp_path):
    with pytest.raises(TfoptError):
        assess(dataclasses.replace(job, original=tmp_path), [])
