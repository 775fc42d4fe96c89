from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import REPO
from tfopt.comparison import compare
from tfopt.comparison_text import WIDTH, draw
from tfopt.errors import TfoptError

MODEL = REPO / "saved_models" / "digits"


class Linear(tf.Module):
    """scores = x @ w, class = argmax; `apart` is added to the first score."""

    def __init__(self, apart: float = 0.0, batch: int | None = None, names=("x", "scores")):
        super().__init__()
        kernel = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
        self.kernel = tf.Variable(kernel)
        self.apart = apart
        x, scores = names

        @tf.function(input_signature=[tf.TensorSpec((batch, 4), tf.float32, name=x)])
        def serve(value):
            out = value @ self.kernel + tf.constant([self.apart, 0.0, 0.0])
            return {scores: out, "class": tf.argmax(out, 1)}

        self.serve = serve

    def save(self, path, signature: str = "serving_default") -> str:
        tf.saved_model.save(self, str(path), {signature: self.serve})
        return str(path)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    return Linear().save(tmp_path_factory.mktemp("linear") / "model")


@pytest.fixture
def rows(tmp_path):
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    np.savez(tmp_path / "rows.npz", x=x, label=(x @ (np.arange(12).reshape(4, 3) / 10)).argmax(1))
    return str(tmp_path / "rows.npz")


def test_a_model_against_itself(linear, rows):
    found = compare(linear, linear, eval_data=rows, latency=False)
    by_name = {output.a: output for output in found.outputs}
    assert (by_name["scores"].max_abs_error, by_name["scores"].agreement) == (0.0, 1.0)
    assert by_name["class"].equal == 1.0 and found.max_error == 0.0 and found.agreement == 1.0
    assert found.a.bytes == found.b.bytes > 0 and found.a.flops == 2 * 4 * 3
    assert found.a.metric.value == found.b.metric.value == 1.0 and found.a.metric.samples == 50
    assert found.a.latency_ms_p50 is None and found.notes == []


def test_errors_are_those_of_numpy(linear, tmp_path, rows):
    other = Linear(apart=0.25).save(tmp_path / "other")
    found = compare(linear, other, data=rows, latency=False)
    x = np.load(rows)["x"]
    ours = x @ (np.arange(12, dtype=np.float32).reshape(4, 3) / 10)
    theirs = ours + np.array([0.25, 0, 0], np.float32)
    (scores,) = [output for output in found.outputs if output.a == "scores"]
    np.testing.assert_allclose(scores.max_abs_error, 0.25, rtol=1e-5)
    np.testing.assert_allclose(scores.max_rel_error, 0.25 / np.abs(ours).max(), rtol=1e-5)
    assert scores.agreement == np.mean(ours.argmax(1) == theirs.argmax(1)) < 1
    (classes,) = [output for output in found.outputs if output.a == "class"]
    assert classes.equal == scores.agreement and found.max_error == float("inf")
    assert found.rows == 50 and "rows.npz" in found.source


def test_tflite_with_other_names_and_a_fixed_batch(linear, tmp_path, rows):
    module = Linear(batch=4, names=("input_1", "Identity"))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.serve.get_concrete_function()], module)
    path = tmp_path / "other.tflite"
    path.write_bytes(converter.convert())
    found = compare(linear, path, data=rows, eval_data=rows)
    assert found.max_error < 1e-6 and found.b.loader == "ai_edge_litert"
    assert any("'x' of A is taken for" in note for note in found.notes)
    assert any("'scores' of A is taken for" in note for note in found.notes)
    assert found.b.metric.value == 1.0 and found.b.metric.samples == 50
    for side in (found.a, found.b):
        assert 0 < side.latency_ms_p50 <= side.latency_ms_p95 and side.peak_memory_bytes > 0
    text = draw(found)
    assert "as fast" in text and max(map(len, text.splitlines())) <= WIDTH
    assert json.loads(found.to_json())["max_error"] == found.max_error


def test_a_keras_file(tmp_path):
    import keras

    model = keras.Sequential([keras.Input((3,), name="x"), keras.layers.Dense(2, name="y")])
    model.save(tmp_path / "model.keras")
    model.export(tmp_path / "exported", verbose=False)
    found = compare(tmp_path / "model.keras", tmp_path / "exported", latency=False)
    assert found.max_error < 1e-6
    assert found.a.bytes == (tmp_path / "model.keras").stat().st_size


def test_outputs_that_do_not_fit(linear, tmp_path):
    class Wide(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def serve(self, x):
            return {"scores": tf.concat([x, x], 1), "more": x}

    wide = Wide()
    tf.saved_model.save(wide, str(tmp_path / "wide"), {"serving_default": wide.serve})
    found = compare(linear, tmp_path / "wide", latency=False)
    problems = {output.a: output.problem for output in found.outputs}
    assert problems == {"scores": "A gave float32[rows, 3], B gave float32[rows, 8]", "class": "B has no such output"}
    assert found.max_error == float("inf")
    assert "output 'more' of B has no counterpart in A" in found.notes


def test_signatures_under_other_names(linear, tmp_path):
    other = Linear().save(tmp_path / "other", "predict")
    found = compare(linear, other, latency=False)
    assert found.max_error == 0 and "signature 'serving_default' of A is compared with 'predict' of B" in found.notes


def test_state_is_noted(tmp_path):
    class Counter(tf.Module):
        def __init__(self):
            super().__init__()
            self.count = tf.Variable(0.0)

        @tf.function(input_signature=[tf.TensorSpec((), tf.float32, name="x")])
        def serve(self, x):
            return {"y": self.count.assign_add(x)}

    counter = Counter()
    tf.saved_model.save(counter, str(tmp_path / "model"), {"serving_default": counter.serve})
    found = compare(tmp_path / "model", tmp_path / "model", latency=False)
    assert found.max_error == 0 and any("when asked again" in note for note in found.notes)


def test_messages(linear, tmp_path, rows):
    def message(*paths, **options) -> str:
        with pytest.raises(TfoptError) as error:
            compare(*paths, latency=False, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no model at" in message(linear, tmp_path / "nope")
    assert "has no signature 'nope'; it has: serving_default" in message(linear, linear, signature="nope")
    assert "--metric: unknown 'nope'" in message(linear, linear, metric="nope")
    assert "take different inputs: A 'x' float32 (?, 4); B 'image' float32 (?, 8, 8, 1)" in message(linear, MODEL)
    assert "wants 'image' float32" in message(MODEL, MODEL, data=rows)
    (tmp_path / "broken.tflite").write_bytes(b"no model")
    assert "broken.tflite" in message(linear, tmp_path / "broken.tflite")


@pytest.mark.slow
def test_real_models(shared):
    models, data = shared / "models", str(shared / "data" / "kws" / "kws01_first500.npz")
    kws = models / "kws-ds-cnn"
    found = compare(kws / "saved_model", kws / "kws_ref_model.tflite", data=data, eval_data=data, latency=False)
    assert 0.9 < found.agreement < 1 and found.a.metric.samples == 500
    pitch = compare(models / "basic-pitch" / "nmp", models / "basic-pitch" / "nmp.tflite", latency=False)
    assert pitch.max_error < 1e-4 and len(pitch.outputs) == 3
    penguin = models / "tfx-penguin"
    assert compare(penguin, penguin, latency=False).max_error == 0
