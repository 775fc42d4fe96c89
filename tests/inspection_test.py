from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import REPO
from tfopt.errors import TfoptError
from tfopt.inspection import inspect
from tfopt.inspection_text import WIDTH, draw

MODEL = REPO / "saved_models" / "digits"


@pytest.fixture(scope="module")
def digits():
    return inspect(MODEL)


def section(text: str, title: str) -> str:
    """The lines under a title."""
    return text.partition(f"\n{title}")[2].partition("\n\n")[0]


def test_digits(digits):
    names = {signature.name for signature in digits.signatures}
    assert "serving_default" in names and digits.problem is None and digits.bugs == []
    (image,) = digits.signatures[0].inputs
    assert (image.name, image.dtype, image.shape) == ("image", "float32", [None, 8, 8, 1])
    assert digits.ops["Conv2D"] > 0 and sum(digits.nodes[:2]) > sum(digits.ops.values())
    sizes = [weight.bytes for weight in digits.weights]
    assert sizes == sorted(sizes, reverse=True)
    assert all(w.bytes == 4 * int(np.prod(w.shape)) for w in digits.weights)
    assert digits.batch_norms == 3
    assert digits.steps[-1].nodes_after < digits.steps[0].nodes_before
    assert not any(refusal.rule == "fold_affine" for step in digits.steps for refusal in step.refused)


def test_text_fits_and_json_is_json(digits):
    text = draw(digits)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "No signature reads or writes files" in section(text, "Security")
    assert "3 batch norms; no scale or shift stays" in text
    assert json.loads(digits.to_json())["batch_norms"] == 3
    assert "and 1 more" not in draw(digits, top=1000)


def test_damaged_models_end_in_one_line(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "saved_model.pb").write_bytes(b"\x00" * 100)
    with pytest.raises(TfoptError, match="cannot be read as a SavedModel"):
        inspect(tmp_path / "model")
    with pytest.raises(TfoptError, match="no signature 'nope'"):
        inspect(MODEL, ["nope"])
    (tmp_path / "a.tflite").write_bytes(b"TFL3")
    with pytest.raises(TfoptError, match="tfopt-compare"):
        inspect(tmp_path / "a.tflite")


def test_without_a_checkpoint_the_graph_is_still_shown(tmp_path):
    shutil.copytree(MODEL, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "variables")
    found = inspect(tmp_path / "model")
    assert "variables" in found.problem and found.ops["Conv2D"] > 0 and len(found.signatures) > 0
    assert "tfopt cannot optimize it" in draw(found)


def test_probable_bugs(tmp_path):
    class Wrong(tf.Module):
        def __init__(self):
            super().__init__()
            self.scale = tf.Variable(tf.ones(3))
            self.weight = tf.Variable([[np.nan] * 3] * 3)

        @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), tf.float32, name="x")])
        def serve(self, x):
            zeros = tf.zeros(3)
            x, *_ = tf.compat.v1.nn.fused_batch_norm(x, self.scale, zeros, is_training=True)
            x = tf.nn.dropout(x, 0.5)
            return {"y": tf.reduce_mean(x, [1, 2]) @ self.weight}

    module = Wrong()
    tf.saved_model.save(module, str(tmp_path / "model"), {"serving_default": module.serve})
    bugs = "\n".join(inspect(tmp_path / "model").bugs)
    assert "serves in training mode" in bugs
    assert "Dropout is active at serving time" in bugs
    assert "NaN" in bugs


def test_nothing_of_the_model_runs(tmp_path):
    secret = tmp_path / "secret.txt"
    written = tmp_path / "written.txt"
    secret.write_text("password")

    class Hostile(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((), tf.float32, name="x")])
        def serve(self, x):
            tf.io.write_file(str(written), "x")
            return {"y": tf.io.read_file(str(secret)), "x": x}

    module = Hostile()
    tf.saved_model.save(module, str(tmp_path / "model"), {"serving_default": module.serve})
    found = inspect(tmp_path / "model")
    assert not written.exists()
    assert "password" not in found.to_json()
    text = section(draw(found), "Security")
    assert "WARNING: WriteFile writes files" in text and "WARNING: ReadFile reads files" in text
    assert "secret.txt" in text and "run by serving_default" in text


def test_names_do_not_command_the_terminal(digits):
    text = draw(dataclasses.replace(digits, assets=["a\x1b[2Jb"], ops={"Add\r": 1}))
    assert "\x1b" not in text and "\r" not in text and "a\\x1b[2Jb" in text


def test_features_and_tables(tmp_path):
    class Parser(tf.Module):
        def __init__(self):
            super().__init__()
            keys = tf.lookup.KeyValueTensorInitializer(["a", "b"], [1, 2], tf.string, tf.int64)
            self.table = tf.lookup.StaticHashTable(keys, 0)

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="examples")])
        def serve(self, examples):
            features = {
                "age": tf.io.FixedLenFeature((2,), tf.float32),
                "size": tf.io.FixedLenFeature((), tf.int64, default_value=7),
                "word": tf.io.VarLenFeature(tf.string),
            }
            parsed = tf.io.parse_example(examples, features)
            words = tf.sparse.to_dense(parsed["word"], "")
            return {"sum": tf.reduce_sum(parsed["age"], 1), "ids": self.table.lookup(words), "size": parsed["size"]}

    module = Parser()
    tf.saved_model.save(module, str(tmp_path / "model"), {"serving_default": module.serve})
    found = inspect(tmp_path / "model")
    features = {f.name: (f.dtype, f.length, f.shape, f.default) for f in found.examples["serving_default"]}
    assert features == {
        "age": ("float32", "fixed", [2], None),
        "size": ("int64", "fixed", [], 7),
        "word": ("string", "variable", None, None),
    }
    assert len(found.tables) == 1 and "string -> int64" in found.tables[0]
    assert "Select TF" in " ".join(found.opportunities)


def test_lambda_layers_are_named_and_not_run(tmp_path):
    import keras

    model = keras.Sequential([keras.Input((2,)), keras.layers.Lambda(lambda x: x * 2, name="doubler")])
    model.save(tmp_path / "model.keras")
    found = inspect(tmp_path / "model.keras")
    assert [layer for layer, _ in found.layers] == ["doubler"]
    assert "WARNING: layer 'doubler' holds Python code" in draw(found)
    assert found.ops["Lambda"] == 1


@pytest.mark.slow
def test_real_models(shared):
    for path in sorted((shared / "models").rglob("saved_model.pb")):
        found = inspect(path.parent)
        assert found.problem is None and found.steps, path
        text = draw(found)
        assert max(map(len, text.splitlines())) <= WIDTH, path
        expected = "BoostedTreesBucketize" if "unsupported" in str(path) else ""
        assert (expected in " ".join(found.bugs)) == bool(expected) or not expected
    dtln = inspect(shared / "models" / "dtln" / "saved_model")
    assert len(dtln.state) == 8
    assert inspect(shared / "models" / "kws-ds-cnn" / "saved_model").batch_norms == 9
