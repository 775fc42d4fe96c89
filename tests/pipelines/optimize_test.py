"""The flags of tfopt-optimize reach the library, and what comes back becomes an exit code."""

from __future__ import annotations

import json

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from pipelines import optimize as script
from tests.conftest import REPO
from tfopt.errors import TfoptError
from tfopt.optimize import Options
from tfopt.report import Report

MODEL = REPO / "saved_models" / "digits"


@pytest.fixture
def run():
    """Runs the script's main with flags, in this process, and gives back the exit code."""

    def main(*arguments: str) -> int:
        with flagsaver.flagsaver():
            flags.FLAGS(["tfopt-optimize", *arguments])
            return script.main(["tfopt-optimize"])

    return main


class _Result:
    def __init__(self, failed=(), empty=False):
        self.failed, self.empty, self.directory = list(failed), empty, REPO
        self.report = Report(
            created="", command="", seed=0, environment={}, recipe={"name": "x", "passes": []}, verify="", data={}
        )


@pytest.mark.parametrize(("result", "code"), [(_Result(), 0), (_Result(failed=["int8"]), 1), (_Result(empty=True), 1)])
def test_exit_codes(result, code, run, monkeypatch, capsys):
    monkeypatch.setattr("tfopt.optimize.optimize", lambda *_: result)
    assert run("--model=m", "--output_dir=o") == code
    assert "report.html" in capsys.readouterr().out


def test_every_flag_reaches_its_option(run, monkeypatch):
    seen = []
    monkeypatch.setattr("tfopt.optimize.optimize", lambda *given: seen.append(given) or _Result())
    wanted = {
        "recipe": "none", "tflite": ("float32", "int8"), "representative_data": "r.npz", "eval_data": "e.npz",
        "metric": "auc", "eval_output": "y", "label": "l", "max_accuracy_drop": 0.5, "signatures": ("a", "b"),
        "seed": 7, "version": 3, "io_type": "int8", "max_constant_bytes": 9, "threads": 1, "inputs": ("x",),
        "outputs": ("y", "z"), "overwrite": True, "keep_batch": True, "allow_select_tf_ops": True,
        "allow_unsafe_deserialization": True, "measure_latency": False, "labels": "t.npz", "minimize": "latency",
        "engine": "tfmot", "runtime": "tflite-2.14", "all_integer": True, "serving_tflite": True,
        "strategy": "mirrored", "checkpoint_dir": "c", "deployment": "name", "broadcast_inputs": "user_*,day",
        "keep_example_signature": True, "beam_args": "--runner=DirectRunner",
    }  # fmt: skip
    arguments = [f"--{k}={','.join(v) if isinstance(v, tuple) else v}" for k, v in wanted.items()]
    run("--model=m", "--output_dir=o", "--verify=off", "--set=a.b=1", "--set=a.c=x", *arguments)
    model, output, options = seen[0]
    assert (model, output) == ("m", "o") and options.verify is False and options.set == ("a.b=1", "a.c=x")
    assert {name: getattr(options, name) for name in wanted} == wanted
    assert set(wanted) | {"verify", "command", "set"} == set(vars(Options())), "an option without a flag"


def test_defaults_of_flags_are_those_of_the_library(run, monkeypatch):
    seen = []
    monkeypatch.setattr("tfopt.optimize.optimize", lambda *given: seen.append(given) or _Result())
    run("--model=m", "--output_dir=o")
    options = seen[0][2]
    assert {**vars(options), "command": ""} == vars(Options())
    run("--model=m", "--output_dir=o", "--tflite=")
    assert seen[1][2].tflite == ()


def test_positional_arguments_are_refused():
    with pytest.raises(TfoptError, match="unexpected argument 'model'"):
        script.main(["tfopt-optimize", "model"])


@pytest.mark.slow
def test_the_bundled_model_from_the_flags_to_the_report(run, tmp_path, capsys):
    data = _digits(tmp_path)
    code = run(
        *(f"--model={MODEL}", f"--output_dir={tmp_path / 'out'}", "--tflite=float32,int8", f"--eval_data={data}"),
        *(f"--representative_data={data}", "--max_accuracy_drop=0.05", "--threads=1"),
    )
    assert code == 0
    report = Report.from_json((tmp_path / "out" / "report.json").read_text())
    artifacts = {artifact.name: artifact for artifact in report.artifacts}
    assert set(artifacts) == {"original", "serving", "float32", "int8"}
    assert artifacts["serving"].accuracy.value == artifacts["original"].accuracy.value > 0.9
    assert artifacts["int8"].bytes < artifacts["float32"].bytes
    assert all(a.rejected is None and a.latency_ms_p50 > 0 and a.peak_memory_bytes > 0 for a in artifacts.values())
    assert (tmp_path / "out" / "device" / "int8.tflite").exists()
    printed = capsys.readouterr().out
    assert all(name in printed for name in artifacts)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["schema_version"] == report.schema_version


def _digits(folder):
    from sklearn.datasets import load_digits

    from tfopt import runtime

    with runtime.open(MODEL) as program:
        (name,) = program.signatures["serving_default"].inputs
        shape = program.signatures["serving_default"].inputs[name].shape
    data = load_digits()
    images = (data.images[:60] / 16).astype(np.float32).reshape(-1, *shape[1:])
    np.savez(folder / "digits.npz", **{name: images, "label": data.target[:60]})
    return folder / "digits.npz"
