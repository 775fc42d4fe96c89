from __future__ import annotations

import shutil

import numpy as np
import pytest

from tests.conftest import serve_v1
from tfopt.errors import TfoptError
from tfopt.sources import as_saved_model


def test_saved_model_is_passed_through(plain_module, tmp_path):
    assert as_saved_model(plain_module, workdir=tmp_path) == plain_module
    assert list(tmp_path.iterdir()) == []


def test_messages_of_wrong_paths(plain_module, tmp_path):
    def message(path, **flags) -> str:
        with pytest.raises(TfoptError) as error:
            as_saved_model(path, workdir=tmp_path, **flags)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "there is no model at" in message(tmp_path / "missing")
    assert f"give its directory, {plain_module}" in message(plain_module / "saved_model.pb")
    assert "go with a frozen GraphDef .pb only" in message(plain_module, inputs=["x"])
    versions = tmp_path / "versions"
    shutil.copytree(plain_module, versions / "12")
    assert f"there is one in {versions / '12'}" in message(versions)
    (tmp_path / "model.tflite").write_bytes(b"TFL3")
    assert "already converted" in message(tmp_path / "model.tflite")
    (tmp_path / "model.onnx").write_bytes(b"")
    assert "no known kind" in message(tmp_path / "model.onnx")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_keras3_file(suffix, tmp_path):
    import keras

    keras.utils.set_random_seed(3)
    image = keras.Input((6, 6, 3), name="image")
    extra = keras.Input((4,), name="extra")
    x = keras.layers.BatchNormalization()(keras.layers.Conv2D(4, 3)(image))
    x = keras.layers.Dropout(0.5)(keras.layers.Flatten()(keras.layers.ReLU()(x)))
    x = keras.layers.Concatenate()([x, extra])
    model = keras.Model({"image": image, "extra": extra}, keras.layers.Dense(5)(x))
    model.save(tmp_path / f"model{suffix}")

    path = as_saved_model(tmp_path / f"model{suffix}", workdir=tmp_path)

    random = np.random.default_rng(0)
    inputs = {
        "image": random.normal(size=(3, 6, 6, 3)).astype(np.float32),
        "extra": random.normal(size=(3, 4)).astype(np.float32),
    }
    (output,) = serve_v1(path, inputs).values()
    np.testing.assert_allclose(output, model(inputs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name, shape",
    [
        ("mobilenet-v1-025/mobilenet_v1_0.25_224.h5", (2, 224, 224, 3)),
        ("face-xception/emotion_model.hdf5", (2, 64, 64, 1)),
        ("face-xception/fer2013_big_XCEPTION.54-0.66.hdf5", (2, 64, 64, 1)),
    ],
)
@pytest.mark.slow
def test_real_keras_files(name, shape, shared, tmp_path):
    tf_keras = pytest.importorskip("tf_keras")
    model = tf_keras.models.load_model(shared / "models" / name, compile=False)

    path = as_saved_model(shared / "models" / name, workdir=tmp_path)

    image = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    (output,) = serve_v1(path, {model.inputs[0].name: image}).values()
    np.testing.assert_allclose(output, model(image), rtol=1e-5, atol=1e-6)
