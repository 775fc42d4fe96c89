from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines import run_tflite

SCRIPT = Path(run_tflite.__file__)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """``float.tflite`` and ``int8.tflite``: tanh(x @ w) of x (1, 64), ``rows.npz`` with 9 rows, ``expected.npz``."""
    import tensorflow as tf

    folder = tmp_path_factory.mktemp("files")
    random = np.random.default_rng(0)
    weight = random.normal(size=(64, 32)).astype(np.float32) / 8
    x = random.normal(size=(9, 64)).astype(np.float32)
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        features = v1.placeholder(tf.float32, [1, 64], "x")
        y = tf.tanh(tf.matmul(features, tf.constant(weight)))
        v1.saved_model.simple_save(session, str(folder / "model"), {"x": features}, {"y": y})
    for name in ("float", "int8"):
        converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "model"))
        if name == "int8":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: ({"x": row[None]} for row in x)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.int8
        (folder / f"{name}.tflite").write_bytes(converter.convert())
    np.savez(folder / "rows.npz", x=x, label=np.arange(9))
    np.savez(folder / "expected.npz", y=np.tanh(x @ weight))
    return folder


def _run(capsys, *arguments) -> tuple[int, dict]:
    code = run_tflite.main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("name", "rtol"), [("float", 1e-5), ("int8", 0.05)])
def test_predictions_are_saved_and_checked(files, tmp_path, capsys, name, rtol):
    arguments = (files / f"{name}.tflite", f"--inputs={files}/rows.npz", f"--save={tmp_path}/out.npz")
    code, result = _run(capsys, *arguments, f"--check={files}/expected.npz", f"--rtol={rtol}", "--runs=7")
    assert code == 0 and result["check"]["passed"] and result["rows"] == 9
    assert result["check"]["outputs"]["y"]["max_rel_error"] <= rtol
    assert result["latency"]["runs"] == 7 and 0 < result["latency"]["p50_ms"] <= result["latency"]["p95_ms"]
    assert result["peak_memory_bytes"] > 1e6 and result["bytes"] == (files / f"{name}.tflite").stat().st_size
    saved, expected = np.load(tmp_path / "out.npz")["y"], np.load(files / "expected.npz")["y"]
    assert saved.dtype == np.float32
    np.testing.assert_allclose(saved, expected, atol=rtol)


def test_a_difference_ends_with_1(files, tmp_path, capsys):
    expected = np.load(files / "expected.npz")["y"]
    expected[3, 4] += 0.5
    np.savez(tmp_path / "wrong.npz", y=expected)
    code, result = _run(capsys, files / "float.tflite", f"--inputs={files}/rows.npz", f"--check={tmp_path}/wrong.npz")
    assert code == 1 and not result["check"]["passed"]
    assert result["check"]["outputs"]["y"]["max_abs_error"] == pytest.approx(0.5, abs=1e-5)


def test_without_data_it_times_random_rows_and_prints_a_table(files, capsys):
    assert run_tflite.main([str(files / "float.tflite"), "--runs=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:1] == ["p50_ms"] for line in lines)
    assert any(line.split()[:2] == ["signature", "serving_default"] for line in lines)


def test_a_file_without_signatures(shared, capsys):
    code, result = _run(capsys, shared / "models/kws-ds-cnn/kws_ref_model.tflite", "--runs=2", "--threads=2")
    assert code == 0 and result["signature"] == "serving_default"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.tflite"], "none.tflite: no such file"),
        (["rows.npz"], "rows.npz does not load"),
        (["float.tflite", "--signature=other"], "has no signature 'other'; it has: serving_default"),
        (["float.tflite", "--inputs=none.npz"], "none.npz is not a readable .npz file"),
        (["float.tflite", "--inputs=expected.npz"], "takes the inputs ['x'], received ['y']"),
        (["float.tflite", "--inputs=narrow.npz"], "takes 'x' of shape ['rows', 64], received [2, 5]"),
        (["float.tflite", "--inputs=rows.npz", "--check=rows.npz"], "has no output 'x'"),
        (["float.tflite", "--inputs=rows.npz", "--save=none/out.npz"], "out.npz cannot be written"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(files, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    np.savez("narrow.npz", x=np.zeros((2, 5), np.float32))
    assert run_tflite.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and sum(line.startswith("error: ") for line in error.splitlines()) == 1


def test_it_stands_alone(files, tmp_path):
    """Copied elsewhere, it runs, and imports nothing that a device lacks."""
    script = tmp_path / "run_tflite.py"
    script.write_text(SCRIPT.read_text())
    code = (
        "import sys, runpy; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'tensorflow', 'tfopt', 'absl', 'keras', 'ai_edge_litert'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(script), str(files / "float.tflite"), "--runs=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert done.stdout.splitlines()[-1] == "['ai_edge_litert']"
