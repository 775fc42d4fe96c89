"""tfopt-optimize scores its artifacts on Beam, in one pass over all rows: as it does in one process."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="make test-tfx runs it")

from tests.conftest import REPO
from tfopt import run_data, runtime
from tfopt.optimize import Options, optimize

MODEL = REPO / "saved_models" / "digits"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """300 random images, and what the model says of them, wrong for every seventh."""
    image = np.random.default_rng(0).random((300, 8, 8, 1), np.float32)
    with runtime.open(MODEL) as program:
        (scores,) = program.run("serving_default", {"image": image}).values()
    labels = scores.argmax(1)
    labels[::7] = (labels[::7] + 1) % 10
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    np.savez(path, image=image, label=labels)
    return str(path)


def test_artifacts_have_the_metric_of_all_rows(rows, tmp_path, monkeypatch):
    def run(name: str, beam_args: str | None):
        options = Options(
            tflite=("dynamic_int8",),
            eval_data=rows,
            measure_latency=False,
            max_accuracy_drop=0.5,
            beam_args=beam_args,
        )
        return optimize(MODEL, tmp_path / name, options).report

    here = run("here", None)
    monkeypatch.setattr(run_data, "ROWS_IN_MEMORY", 20)
    there = run("there", "")
    assert [a.name for a in there.artifacts] == ["original", "serving", "dynamic_int8"]
    assert here.artifacts[0].accuracy.value == pytest.approx(1 - 43 / 300) and here.artifacts[0].accuracy.samples == 300
    for ours, theirs in zip(here.artifacts, there.artifacts, strict=True):
        assert ours.accuracy == theirs.accuracy and theirs.rejected is None
    assert there.artifacts[0].agreement is None and there.artifacts[1].agreement == 1.0
    assert "searched_on" not in here.data and there.data["searched_on"].startswith("the first 20 rows")


def test_an_artifact_below_the_bar_is_rejected(rows, tmp_path):
    options = Options(tflite=(), eval_data=rows, measure_latency=False, max_accuracy_drop=-0.1, beam_args="")
    result = optimize(MODEL, tmp_path / "out", options)
    assert "accuracy falls by 0, more than --max_accuracy_drop=-0.1" in result.report.artifacts[1].rejected
    assert result.empty and result.report.artifacts[0].rejected is None
