from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tfopt import runtime
from tfopt.errors import TfoptError


def _images(rows: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, 8, 8, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> dict:
    """A v1-style SavedModel with a fixed batch of 1, and its weight: ``y`` = ``x`` @ weight."""
    import tensorflow as tf

    path = tmp_path_factory.mktemp("frozen") / "model"
    weight = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [1, 4], "x")
        tf.compat.v1.saved_model.simple_save(session, str(path), {"x": x}, {"y": tf.matmul(x, weight)})
    return {"path": path, "weight": weight}


def test_a_saved_model_opens_as_serving_does_and_gives_its_outputs(keras3_convnet):
    images = _images(5)
    with (
        runtime.open(keras3_convnet, threads=1) as session,
        runtime.open(keras3_convnet, loader=runtime.PYTHON) as python,
    ):
        assert (session.loader, python.loader) == (runtime.SESSION, runtime.PYTHON)
        assert session.signatures == python.signatures
        spec = session.signatures["serving_default"].inputs["image"]
        assert (spec.dtype, spec.shape) == (np.float32, (None, 8, 8, 1))
        a, b = (program.run("serving_default", {"image": images})["output_0"] for program in (session, python))
    assert a.shape == (5, 10)
    np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(a.sum(axis=1), 1, atol=1e-5)


def test_every_signature_runs(plain_module):
    x = np.eye(4, dtype=np.float32)
    with runtime.open(plain_module) as program:
        score, double = (program.run(key, {"x": x})[key] for key in ("score", "double"))
    np.testing.assert_allclose(np.maximum(double / 2, 0), score, atol=1e-6)


def test_keras3_saved_by_tf_goes_to_the_python_loader_at_the_first_call(tmp_path):
    import keras
    import tensorflow as tf

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    tf.saved_model.save(model, str(tmp_path / "m"))
    x = np.ones((2, 8), np.float32)
    with runtime.open(tmp_path / "m") as program:
        (name,) = program.signatures["serving_default"].inputs
        outputs = program.run("serving_default", {name: x})
        assert program.loader == runtime.PYTHON
    np.testing.assert_allclose(outputs["output_0"], model(x), atol=1e-6)
    with (
        runtime.open(tmp_path / "m", loader=runtime.SESSION) as strict,
        pytest.raises(TfoptError, match="'serving_default' cannot run: Could not find variable"),
    ):
        strict.run("serving_default", {name: x})


@pytest.mark.parametrize("rows", [1, 3])
def test_a_fixed_batch_runs_row_by_row(frozen, rows):
    x = np.random.default_rng(2).normal(size=(rows, 4)).astype(np.float32)
    with runtime.open(frozen["path"]) as program:
        np.testing.assert_allclose(program.run("serving_default", {"x": x})["y"], x @ frozen["weight"], rtol=1e-5)


@pytest.mark.parametrize(
    ("signature", "inputs", "message"),
    [
        ("serve", {"x": np.zeros((1, 4), "f4")}, r"no signature 'serve'; it has: serving_default"),
        ("serving_default", {"z": 1}, r"takes the inputs \['x'\], received \['z'\]"),
        ("serving_default", {"x": np.zeros((1, 5), "f4")}, r"wants 'x' float32 \(1, 4\), received \(1, 5\)"),
        ("serving_default", {"x": np.zeros((2, 5), "f4")}, r"wants 'x' float32 \(1, 4\), received \(2, 5\)"),
        ("serving_default", {"x": np.array([[b"a"] * 4])}, r"wants 'x' float32 \(1, 4\), received dtype \|S1"),
    ],
)
def test_inputs_that_do_not_fit_end_in_one_line(frozen, signature, inputs, message):
    with runtime.open(frozen["path"]) as program, pytest.raises(TfoptError, match=message) as raised:
        program.run(signature, inputs)
    assert "\n" not in str(raised.value)


def test_what_is_no_artifact_ends_in_one_line(tmp_path):
    (tmp_path / "dir").mkdir()
    (tmp_path / "text.tflite").write_bytes(b"not a flatbuffer at all")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "saved_model.pb").write_bytes(b"\xff\x00garbage")
    for path in (tmp_path / "none", tmp_path / "dir", tmp_path / "text.tflite", broken):
        with pytest.raises(TfoptError, match=path.name) as raised:
            runtime.open(path)
        assert "\n" not in str(raised.value)


def _tflite(path, kind: str) -> np.ndarray:
    import tensorflow as tf

    weight = np.random.default_rng(1).normal(size=(64, 32)).astype(np.float32)

    @tf.function(input_signature=[tf.TensorSpec((None if kind == "dynamic" else 1, 64), tf.float32, name="x")])
    def dense(x):
        return {"y": tf.nn.tanh(x @ weight / 8)}

    converter = tf.lite.TFLiteConverter.from_concrete_functions([dense.get_concrete_function()])
    if kind == "int8":
        rows = np.random.default_rng(3).normal(size=(50, 64)).astype(np.float32)
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([row[None]] for row in rows)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = converter.inference_output_type = tf.int8
    path.write_bytes(converter.convert())
    return weight


@pytest.mark.parametrize(("kind", "tolerance"), [("fixed", 1e-5), ("dynamic", 1e-5), ("int8", 0.05)])
def test_tflite_takes_and_gives_the_original_floats(tmp_path, kind, tolerance):
    weight = _tflite(tmp_path / "m.tflite", kind)
    x = np.random.default_rng(4).normal(size=(7, 64)).astype(np.float32)
    with runtime.open(tmp_path / "m.tflite", threads=1) as program:
        assert program.loader == runtime.LITERT
        (signature,) = program.signatures.values()
        assert signature.inputs["x"].dtype == np.float32
        assert signature.inputs["x"].shape == ((None, 64) if kind == "dynamic" else (1, 64))
        (outputs,) = program.run("serving_default", {"x": x}).values()
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, np.tanh(x @ weight / 8), atol=tolerance)


def test_a_tflite_file_is_opened_without_tensorflow(tmp_path):
    _tflite(tmp_path / "m.tflite", "fixed")
    code = (
        "import sys; from tfopt import runtime\n"
        "runtime.open(sys.argv[1], threads=1).close(); print('tensorflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.tflite")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False"]


def test_files_without_signatures_get_serving_default(shared):
    data = np.load(shared / "data/kws/kws01_first500.npz")
    images, labels = data["input_1"][:100], data["label"][:100]
    scores = {}
    for name in ("kws_ref_model.tflite", "kws_ref_model_float32.tflite"):
        with runtime.open(shared / "models/kws-ds-cnn" / name, threads=1) as program:
            scores[name] = program.run("serving_default", {"input_1": images})["Identity"]
    for rows in scores.values():
        assert np.mean(rows.argmax(axis=1) == labels) > 0.8
        np.testing.assert_allclose(rows.sum(axis=1), 1, atol=0.02)


@pytest.mark.parametrize("loader", [runtime.SESSION, runtime.PYTHON])
def test_state_lives_in_the_program_and_starts_afresh(shared, loader):
    x = np.random.default_rng(0).normal(size=(1, 512)).astype(np.float32)
    calls = []
    for _ in range(2):
        with runtime.open(shared / "models/dtln/saved_model", loader=loader) as program:
            calls.append([program.run("serving_default", {"input_1": x})["conv1d_1"] for _ in range(2)])
    np.testing.assert_array_equal(calls[0], calls[1])
    assert np.abs(calls[0][0] - calls[0][1]).max() > 1e-4


def test_a_missing_kernel_ends_in_one_line(shared):
    with (
        runtime.open(shared / "models/tfx-unsupported-op/benchmark_trained") as program,
        pytest.raises(TfoptError, match=r"'classification' cannot run: .*BoostedTreesBucketize") as raised,
    ):
        program.run("classification", {"inputs": np.array([b""], object)})
    assert "\n" not in str(raised.value)


def test_a_failing_op_is_named(shared):
    with (
        runtime.open(shared / "models/tfx-penguin") as program,
        pytest.raises(TfoptError, match=r"body_mass_g .*\(op '.*ParseExampleV2'\)"),
    ):
        program.run("serving_default", {"examples": np.array([b""], object)})
