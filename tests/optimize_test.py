from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests import large_model
from tests.conftest import REPO
from tests.origins import ORIGINS, REAL_MODELS, answers, assert_same, original_answers, rows, save_tf1, v1
from tfopt import model, passes
from tfopt.errors import TfoptError
from tfopt.optimize import Options, main_signature, optimize
from tfopt.report import Report

FAST = Options(tflite=(), measure_latency=False)


def options(**changed) -> Options:
    return Options(**{"tflite": (), "measure_latency": False, **changed})


@pytest.mark.parametrize("name", ORIGINS)
def test_every_origin_goes_through_the_main_job(name, built, tmp_path):
    result = optimize(built(name), tmp_path / "out", FAST)
    assert not result.failed and not result.empty
    assert [step.status for step in result.report.steps if step.status == "undone"] == []
    expected = original_answers(name, built(name))
    received = answers(tmp_path / "out" / "serving" / "1", ORIGINS[name].inputs, ORIGINS[name].calls)
    assert_same(expected, received, bound=1e-5)
    (serving,) = [artifact for artifact in result.report.artifacts if artifact.name == "serving"]
    assert serving.max_rel_error <= 1e-5 and serving.path == str(tmp_path / "out" / "serving" / "1")


@pytest.mark.parametrize("name", [n for n in REAL_MODELS if "half_plus_two" not in n])
def test_real_models_go_through_the_main_job(name, shared, tmp_path):
    result = optimize(shared / "models" / name, tmp_path / "out", FAST)
    (serving,) = [artifact for artifact in result.report.artifacts if artifact.name == "serving"]
    assert not result.failed and serving.max_rel_error <= 1e-5
    first = result.report.steps[0]
    assert result.report.steps[-1].nodes_after < first.nodes_before
    assert not any(step.status == "undone" for step in result.report.steps)


def test_dtln_called_twice_gives_what_the_original_gives_twice(shared, tmp_path):
    path = shared / "models" / "dtln" / "saved_model"
    optimize(path, tmp_path / "out", FAST)
    (name,) = model.load(path).signatures["serving_default"].inputs
    inputs = {"serving_default": {name: rows(1, 512)}}
    expected = answers(path, inputs, 2)
    first, second = expected["serving_default"]
    assert any((first[key] != second[key]).any() for key in first), "no state would show"
    assert_same(expected, answers(tmp_path / "out" / "serving" / "1", inputs, 2), bound=1e-5)


def test_the_report_is_read_back(built, tmp_path):
    result = optimize(built("keras3_export"), tmp_path / "out", options(command="tfopt-optimize --x"))
    text = (tmp_path / "out" / "report.json").read_text()
    read = Report.from_json(text)
    assert read == Report.from_json(result.report.to_json()) and json.loads(text) == json.loads(read.to_json())
    assert read.command == "tfopt-optimize --x" and read.seed == 0 and read.recipe["name"] == "lossless"
    assert [a.name for a in read.artifacts] == ["original", "serving"]
    original, serving = read.artifacts
    assert serving.bytes < original.bytes and serving.gzip_bytes < original.gzip_bytes
    assert serving.parameters < original.parameters and serving.flops == original.flops
    assert read.verify.startswith("on: outputs of every signature compared")
    assert {s["name"] for s in read.model["signatures"]} == {"serve", "serving_default"}
    assert "<html" in (tmp_path / "out" / "report.html").read_text()


def _files(root: Path) -> dict[str, str]:
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file() and not file.name.startswith("report")
    }


def test_versions_stand_beside_each_other_and_overwriting_is_asked_for(built, tmp_path):
    out = tmp_path / "out"
    optimize(built("shared_weights"), out, FAST)
    before = _files(out)
    with pytest.raises(TfoptError, match="holds serving/1 already; pass --overwrite"):
        optimize(built("shared_weights"), out, FAST)
    optimize(built("keras3_export"), out, options(version=2, overwrite=True))
    after = _files(out)
    assert {name: after[name] for name in before} == before
    assert "serving/2/saved_model.pb" in after
    optimize(built("keras3_export"), out, options(overwrite=True))
    assert _files(out)["serving/1/saved_model.pb"] == after["serving/2/saved_model.pb"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "the workspace is left"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"recipe": "nope"}, "unknown recipe 'nope'"),
        ({"tflite": ("float8",)}, "--tflite: unknown name 'float8'"),
        ({"tflite": ("int8",)}, "--tflite=int8 needs --representative_data"),
        ({"metric": "beauty"}, "--metric: unknown 'beauty'"),
        ({"max_accuracy_drop": 0.1}, "--max_accuracy_drop needs --eval_data"),
        ({"version": 0}, "--version"),
        ({"io_type": "int4"}, "--io_type"),
        ({"engine": "nope"}, "--engine: choose from graph, tfmot"),
        ({"serving_tflite": True}, "--serving_tflite needs a quantized file"),
        ({"signatures": ("nope",)}, "has no signature 'nope'"),
        ({"representative_data": "/none.npz"}, "/none.npz"),
        ({"eval_data": "/none.npz"}, "/none.npz"),
    ],
)
def test_bad_usage_leaves_nothing_behind(changed, message, built, tmp_path):
    with pytest.raises(TfoptError) as raised:
        optimize(built("shared_weights"), tmp_path / "deep" / "out", options(**changed))
    assert message in str(raised.value) and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_beam_is_one_line(built, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(TfoptError, match=r"^--beam_args needs apache-beam: pip install 'tfopt\[beam\]'$"):
        optimize(built("shared_weights"), tmp_path / "out", options(beam_args="", representative_data="r.npz"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changed", [{}, {"representative_data": "r.npz"}, {"recipe": "device_int8"}])
def test_beam_that_would_do_nothing_is_refused(changed, built, tmp_path, monkeypatch):
    monkeypatch.setattr("tfopt.optimize.need_beam", lambda _: None)
    with pytest.raises(TfoptError, match=r"^--beam_args: nothing would run on Beam: give --eval_data, or"):
        optimize(built("shared_weights"), tmp_path / "out", options(beam_args="", **changed))


def _evaluation(path, rows_):
    images = rows(rows_, 8, 8, 1, seed=9)
    labels = answers(path, {"serving_default": {"image": images}})["serving_default"][0]["output_0"].argmax(1)
    return {"image": images, "label": labels}


def _noise_weights(loaded, log):
    for name in list(loaded.weights):
        value = loaded.weights[name]
        loaded.graph.set_constant(name, value + rows(*value.shape, seed=4))
    log.applied["noise"] += 1


@pytest.mark.parametrize(("bar", "emitted"), [(None, True), (0.9999, True), (0.01, False)])
def test_an_artifact_below_the_bar_is_not_emitted(bar, emitted, built, tmp_path, monkeypatch):
    get = passes.get
    noisy = passes.Pass("prune_graph", _noise_weights, lossless=False)
    monkeypatch.setattr(passes, "get", lambda name: noisy if name == "prune_graph" else get(name))
    monkeypatch.setattr(
        "tfopt.assess.worst", lambda found: type("D", (), {"broken": None, "absolute": 1, "relative": 1})
    )
    path = built("keras3_export")
    np.savez(tmp_path / "eval.npz", **_evaluation(path, 40))
    (tmp_path / "mine.json").write_text('["prune_graph"]')
    result = optimize(
        path,
        tmp_path / "out",
        options(eval_data=str(tmp_path / "eval.npz"), max_accuracy_drop=bar, recipe=str(tmp_path / "mine.json"),
                signatures=("serving_default",), verify=False),
    )  # fmt: skip
    original, serving = result.report.artifacts
    assert original.accuracy.value == 1.0 and original.accuracy.samples == 40 and serving.accuracy.value < 0.9
    assert (serving.rejected is None) == emitted and result.empty == (not emitted)
    assert (tmp_path / "out" / "serving" / "1").exists() == emitted
    if not emitted:
        assert "accuracy falls by" in serving.rejected and "--max_accuracy_drop=0.01" in serving.rejected
        assert result.failed == ["serving"] and (tmp_path / "out" / "report.json").exists()


def test_a_wrong_pass_does_not_reach_the_output(built, tmp_path, monkeypatch):
    get = passes.get
    wrong = passes.Pass("merge_duplicates", _noise_weights)
    monkeypatch.setattr(passes, "get", lambda name: wrong if name == "merge_duplicates" else get(name))
    result = optimize(built("shared_weights"), tmp_path / "out", FAST)
    undone = [step.name for step in result.report.steps if step.status == "undone"]
    assert set(undone) == {"merge_duplicates"}
    assert any("merge_duplicates was undone: output" in warning for warning in result.report.warnings)
    inputs = ORIGINS["shared_weights"].inputs
    assert_same(answers(built("shared_weights"), inputs), answers(tmp_path / "out" / "serving" / "1", inputs))


def test_what_is_random_is_said_and_the_rest_is_compared(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 40], "x")
        noisy = tf.nn.dropout(x, rate=0.5)
        save_tf1(tmp_path / "m", session, {"noisy": ({"x": x}, {"y": noisy}), "calm": ({"x": x}, {"y": x * 2.0})})
    result = optimize(tmp_path / "m", tmp_path / "out", FAST)
    assert any("'noisy' gives other outputs at each call: random ops" in w for w in result.report.warnings)
    assert not result.failed


def test_a_pass_is_left_out_where_none_of_its_files_is_made(built, tmp_path):
    named = {"passes": ["prune_graph", "fold_constants", "fold_affine", "quantize"]}
    (tmp_path / "mine.json").write_text(json.dumps(named))
    result = optimize(built("keras3_export"), tmp_path / "out", options(recipe=str(tmp_path / "mine.json")))
    step = result.report.steps[-1]
    assert (step.name, step.status) == ("quantize", "left out") and "int8, int4, mixed" in step.notes[0]
    assert not result.failed and result.report.recipe["passes"][-1] == {"pass": "quantize"}


def test_the_main_signature_takes_inputs(built):
    assert main_signature(model.load(built("keras3_export"))) == "serving_default"
    assert main_signature(model.load(built("counter"))) == "count"


@pytest.mark.slow
def test_two_runs_with_one_seed_give_the_same_bytes(built, tmp_path):
    for run in ("1", "2"):
        subprocess.run(
            [sys.executable, "-m", "pipelines.optimize", f"--model={built('keras3_export')}", "--seed=3",
             f"--output_dir={tmp_path / run}", "--tflite=float32,dynamic_int8", "--nomeasure_latency"],
            cwd=REPO, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": run},
        )  # fmt: skip
    first, second = _files(tmp_path / "1"), _files(tmp_path / "2")
    assert first == second and {"device/float32.tflite", "serving/1/saved_model.pb"} <= set(first)


ROWS = (5 << 29) // (4 * large_model.WIDTH)  # 2.5 GiB


@pytest.mark.slow
def test_weights_beyond_2_gib(tmp_path):
    weight_bytes = ROWS * large_model.WIDTH * 4
    free_disk = shutil.disk_usage(tmp_path).free
    free_memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if free_disk < 4 * weight_bytes or free_memory < 3 * weight_bytes:
        pytest.skip(f"needs 10 GiB of disk and 7.5 GiB of memory; free: {free_disk >> 30} and {free_memory >> 30} GiB")
    try:
        large_model.main(tmp_path / "m", ROWS)
        run = subprocess.run(
            [sys.executable, "-m", "pipelines.optimize", f"--model={tmp_path / 'm'}", "--tflite=",
             f"--output_dir={tmp_path / 'out'}", "--nomeasure_latency"],
            cwd=REPO, check=True, capture_output=True, text=True,
        )  # fmt: skip
        assert "serving" in run.stdout
        ids = np.array([0, 1, ROWS // 2, ROWS - 1], np.int64)
        inputs = {"serving_default": {"ids": ids}}
        expected = np.stack([large_model.row(int(i)) for i in ids]) * 2
        (outputs,) = answers(tmp_path / "out" / "serving" / "1", inputs)["serving_default"]
        np.testing.assert_array_equal(outputs["rows"], expected)
        variables = tf.train.list_variables(str(tmp_path / "out" / "serving" / "1" / "variables" / "variables"))
        assert [shape for _, shape in variables] == [[ROWS, large_model.WIDTH]]
        assert (tmp_path / "out" / "serving" / "1" / "saved_model.pb").stat().st_size < 20_000
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
