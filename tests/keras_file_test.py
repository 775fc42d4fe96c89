from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import serve_v1
from tfopt import keras_file
from tfopt.errors import TfoptError


def layer(class_name: str, **config) -> dict:
    return {"class_name": class_name, "config": {"name": "inner", **config}}


def function(name: str, module: str | None) -> dict:
    return {"class_name": "function", "module": module, "config": name, "registered_name": "function"}


@pytest.mark.parametrize(
    "config, reason",
    [
        (layer("Lambda", function=["4wEAAAA=", None, None], function_type="lambda"), "Lambda"),
        (layer("my_package>Lambda"), "Lambda"),
        (layer("Dense", activation={"class_name": "__lambda__", "config": {"value": "4wE="}}), "Lambda"),
        (layer("ResidualWrapper", residual_fn_type="lambda", residual_fn=["4wE="]), "residual_fn_type"),
        ({**layer("Layer"), "module": "os"}, "Python module 'os'"),
        (layer("Dense", activation=function("system", "os")), "Python module 'os'"),
        (layer("Dense", activation=function("exec", "builtins")), "'exec' of 'builtins'"),
        (layer("Dense", activation=function("get_file", "keras.utils")), "'get_file' of 'keras.utils'"),
        (layer("TFOpLambda", function="io.write_file"), "tf.io.write_file"),
        (layer("TFOpLambda", function="compat.v1.gfile.Remove"), "tf.compat.v1.gfile.Remove"),
        (layer("TFOpLambda", function="py_function"), "tf.py_function"),
    ],
)
def test_unsafe_layers_are_found(config, reason):
    model = {"class_name": "Functional", "config": {"name": "outer", "layers": [config]}}
    ((name, found), *_) = keras_file.unsafe(model)
    assert name == "inner" and reason in found


@pytest.mark.parametrize(
    "config",
    [
        layer("Dense", activation="relu", dtype={"module": "keras", "class_name": "DTypePolicy", "config": {}}),
        layer("Dense", kernel_initializer={"module": "keras.initializers", "class_name": "Zeros", "config": {}}),
        layer("Dense", activation=function("relu", "keras.activations")),
        layer("Dense", activation=function("my_relu", "builtins")),
        layer("TFOpLambda", function="math.add"),
        layer("TFOpLambda", function="compat.v1.transpose"),
    ],
)
def test_safe_layers_pass(config):
    assert list(keras_file.unsafe({"class_name": "Functional", "config": {"layers": [config]}})) == []


def lambda_model(library, path) -> None:
    model = library.Sequential([library.layers.Input((3,)), library.layers.Lambda(lambda x: x * 2.0, name="twice")])
    model.save(path)


@pytest.mark.parametrize("file", ["model.keras", "model.h5"])
@pytest.mark.parametrize("library", ["keras", "tf_keras"])
def test_lambda_is_refused_by_name(library, file, tmp_path):
    lambda_model(pytest.importorskip(library), tmp_path / file)
    with pytest.raises(TfoptError, match=r"layer 'twice' holds Python code.*--allow_unsafe_deserialization"):
        keras_file.export(tmp_path / file, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("library, file", [("keras", "model.keras"), ("tf_keras", "model.h5")])
def test_lambda_runs_when_allowed(library, file, tmp_path):
    lambda_model(pytest.importorskip(library), tmp_path / file)
    keras_file.export(tmp_path / file, tmp_path / "saved", allow_unsafe=True)
    (name,) = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"].structured_input_signature[1]
    (output,) = serve_v1(tmp_path / "saved", {name: np.float32([[1, 2, 3]])}).values()
    assert output.tolist() == [[2.0, 4.0, 6.0]]


def test_a_zip_behind_an_h5_file_hides_no_lambda(tmp_path):
    import keras

    lambda_model(keras, tmp_path / "model.h5")
    with zipfile.ZipFile(tmp_path / "model.h5", "a") as archive:
        archive.writestr("config.json", json.dumps(layer("Dense")))
    assert zipfile.is_zipfile(tmp_path / "model.h5")
    with pytest.raises(TfoptError, match="layer 'twice' holds Python code"):
        keras_file.export(tmp_path / "model.h5", tmp_path / "saved")


def test_custom_class_that_no_keras_knows_is_one_line(tmp_path):
    config = {"class_name": "Unknown", "module": None, "registered_name": "Unknown", "config": {"name": "u"}}
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", "{}")
    with pytest.raises(TfoptError, match=r"could not be read as a Keras model. keras: .*tf_keras: ") as error:
        keras_file.export(tmp_path / "model.keras", tmp_path / "saved")
    assert "\n" not in str(error.value)


def test_damaged_files(tmp_path):
    import keras

    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.Dense(2)])
    model.save(tmp_path / "model.h5")
    model.save_weights(tmp_path / "model.weights.h5")
    whole = (tmp_path / "model.h5").read_bytes()
    (tmp_path / "half.h5").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.keras").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.h5").write_bytes(b"")
    for file, text in {
        "model.weights.h5": "weights without a model",
        "half.h5": "damaged",
        "noise.keras": "damaged",
        "empty.h5": "damaged",
    }.items():
        with pytest.raises(TfoptError, match=text) as error:
            keras_file.export(tmp_path / file, tmp_path / "saved")
        assert file in str(error.value) and "\n" not in str(error.value)
