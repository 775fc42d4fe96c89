"""Pruned, clustered and quantized by TFMOT, one after the other."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest

from tfopt.child import Child
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.fake_quant import OPS, quantized_value
from tfopt.function import Function
from tfopt.graph import split
from tfopt.model import load
from tfopt.optimize import Options, optimize
from tfopt.passes import Data
from tfopt.recipe import NAMED
from tfopt.rewrite import Log
from tfopt.tfmot.engine import Engine
from tfopt.weight_statistics import arrays_of

pytest.importorskip("tensorflow_model_optimization", reason="TFMOT is the extra keras2")

MODEL = """
import sys
import numpy as np
import tf_keras as keras

layers, regularizer = keras.layers, keras.regularizers.l2(1e-3)
keras.utils.set_random_seed(3)
image = x = layers.Input((8, 8, 1), name="image")
x = layers.Conv2D(16, 3, padding="same", use_bias=False, kernel_regularizer=regularizer)(x)
x = shortcut = layers.ReLU()(layers.BatchNormalization()(x))
x = layers.DepthwiseConv2D(3, padding="same")(x)
x = layers.ReLU()(layers.BatchNormalization()(x))
x = layers.BatchNormalization()(layers.Conv2D(16, 3, padding="same")(x))
x = layers.ReLU()(layers.Add()([x, shortcut]))
x = layers.GlobalAveragePooling2D()(x)
x = layers.ReLU()(layers.BatchNormalization(scale=False)(layers.Dense(32)(x)))
model = keras.Model(image, layers.Dense(4, activation="softmax", name="scores")(x))
rng = np.random.default_rng(0)
for layer in model.layers:
    if isinstance(layer, layers.BatchNormalization):
        layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
model.save(sys.argv[1], save_format="tf")
"""
FOLDED = """
import sys
from pathlib import Path
import numpy as np
import tf_keras as keras
from tfopt.tfmot import fold, keras_model

model = keras_model.load(Path(sys.argv[1]), False)
images = np.random.default_rng(0).normal(size=(9, 8, 8, 1)).astype(np.float32)
copied, folded = fold.copied(model), fold.fold_batch_norms(model)
for made, norms in ((copied, 4), (folded, 1)):
    assert len(keras_model.batch_norms(made)) == norms, "that of the depthwise kernel stays"
    assert not made.losses, "regularizers stay"
    np.testing.assert_allclose(made.predict(images, verbose=0), model.predict(images, verbose=0), atol=1e-5)
assert len(keras_model.batch_norms(model)) == 4
"""
TRAINING = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "alpha": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Keras 2 model, and rows for it."""
    path = tmp_path_factory.mktemp("compression")
    _python(MODEL, path / "model")
    images = np.random.default_rng(1).normal(size=(120, 8, 8, 1)).astype(np.float32)
    np.savez(path / "images.npz", image=images)
    return path


@pytest.fixture(scope="module")
def child():
    with Child("tfopt.tfmot.worker:worker", {"TF_USE_LEGACY_KERAS": "1"}) as child:
        yield child


@pytest.fixture(autouse=True)
def one_child(child, monkeypatch):
    """One child does the jobs of all tests: each start of TensorFlow takes seconds."""
    monkeypatch.setattr("tfopt.tfmot.engine.Child", lambda *_: contextlib.nullcontext(child))


def _python(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]


def _engine(folder, rows=True):
    """The engine, the model and its data."""
    original = load(folder / "model")
    images = dict(np.load(folder / "images.npz"))
    data = Data("serving_default", original, rows=Dataset(images, None, "images") if rows else None)
    return Engine(folder / "model"), original, data


def _kernels(model):
    """The kernels of convolutions and products, as a signature reads them: (..., inputs, outputs)."""
    graph, found = model.graph, []
    for node in graph.nodes.values():
        if node.op in ("Conv2D", "MatMul"):
            ref = node.input[1]
            quantized = graph.producer(ref).op in OPS
            found.append(quantized_value(graph, split(ref)[0]) if quantized else graph.constant(ref))
    return found


def _prune(engine, model, data, **changed):
    log = Log()
    options = {"sparsity": 0.8, "pattern": "", "schedule": "polynomial", "begin": 0.0, "end": 0.5, "frequency": 0}
    engine.prune(model, log, data, **{**options, "skip": "", "embeddings": False, "training": TRAINING, **changed})
    return log


def _cluster(engine, model, data, **changed):
    log = Log()
    options = {"clusters": 16, "init": "linear", "granularity": "tensor", "skip": "", "embeddings": False}
    engine.cluster(model, log, data, **{**options, "training": TRAINING, **changed})
    return log


def test_folding_changes_no_answer(folder):
    _python(FOLDED, folder / "model")


def test_two_of_four_stay_through_quantization(folder):
    engine, original, data = _engine(folder)
    pruned = original.copy()
    log = _prune(engine, pruned, data, pattern="2:4")
    assert log.applied["kernel pruned by TFMOT"] == 3
    assert log.refused["TFMOT", "conv2d"] == "1 inputs do not make groups of 4"
    assert "does not prune DepthwiseConv2D" in log.refused["TFMOT", "depthwise_conv2d"]
    assert "50.0% of the" in log.notes[-1] and "trained by TFMOT" in log.notes[0]
    quantized, log = pruned.copy(), Log()
    engine.train_quantized(quantized, log, data, TRAINING)
    assert log.applied["kernel whose zeros TFMOT kept"] == 3
    for model in (pruned, quantized):
        groups = [np.moveaxis(kernel, -2, -1).reshape(-1, 4) for kernel in _kernels(model) if kernel.shape[-2] % 4 == 0]
        assert len(groups) == 3 and all((np.count_nonzero(group, axis=1) <= 2).all() for group in groups)
    with Function(pruned) as function:
        (answers,) = function("serving_default", data.rows.inputs).values()
    assert np.isfinite(answers).all() and np.ptp(answers) > 0


@pytest.mark.slow
def test_sparse_clustered_and_quantized_in_the_device_file(folder, tmp_path):
    recipe = tmp_path / "pcqat.json"
    passes = [
        *NAMED["lossless"]["passes"],
        {"pass": "prune_magnitude", "sparsity": 0.8, "epochs": 2, "min_steps": 0, "batch_size": 16},
        {"pass": "cluster", "clusters": 8, "epochs": 1, "min_steps": 0, "batch_size": 16},
        {"pass": "train_quantized", "epochs": 1, "batch_size": 16},
    ]
    recipe.write_text(json.dumps({"passes": passes, "tflite": ["int8"]}))
    options = Options(recipe=str(recipe), engine="tfmot", representative_data=str(folder / "images.npz"))
    result = optimize(folder / "model", tmp_path / "out", options)
    assert not result.failed
    steps = {step.name: step for step in result.report.steps}
    assert steps["prune_magnitude"].applied == {"kernel pruned by TFMOT": 4}
    assert steps["cluster"].applied == {"kernel clustered by TFMOT": 4}
    assert steps["train_quantized"].applied["kernel whose zeros and clusters TFMOT kept"] == 4
    serving = _kernels(load(tmp_path / "out" / "serving" / "1"))
    stored = arrays_of(tmp_path / "out" / "device" / "int8.tflite")
    device = [values for values in stored if values.dtype == np.int8 and values.shape != (1, 3, 3, 16)]  # the depthwise
    for kernels in (serving, device):
        assert sorted(kernel.size for kernel in kernels) == [128, 144, 512, 2304]
        assert all(0.79 <= np.mean(kernel == 0) < 1 and len(np.unique(kernel)) <= 8 for kernel in kernels)


@pytest.mark.parametrize(("granularity", "most"), [("tensor", 16), ("channel", 48)])
def test_clusters_without_rows(granularity, most, folder):
    engine, original, data = _engine(folder, rows=False)
    clustered = original.copy()
    log = _cluster(engine, clustered, data, granularity=granularity, clusters=16 if granularity == "tensor" else 3)
    assert any("not recovered" in warning for warning in log.warnings)
    assert all(len(np.unique(kernel)) <= most for kernel in _kernels(clustered))


def test_nothing_to_prune_ends_in_a_line(folder):
    engine, original, data = _engine(folder, rows=False)
    with pytest.raises(TfoptError, match="no kernel that TFMOT could have pruned: left dense"):
        _prune(engine, original.copy(), data, skip=".*")


@pytest.mark.slow
def test_the_keyword_model(shared, tmp_path):
    data = dict(np.load(shared / "data" / "kws" / "kws01_first500.npz"))
    np.savez(tmp_path / "rows.npz", input_1=data["input_1"][:200])
    recipe = tmp_path / "pcqat.json"
    quick = {"epochs": 1, "batch_size": 32}
    passes = [{"pass": name, "min_steps": 0, **quick} for name in ("prune_magnitude", "cluster")]
    passes.append({"pass": "train_quantized", **quick})
    recipe.write_text(json.dumps({"passes": [*NAMED["lossless"]["passes"], *passes], "tflite": ["int8"]}))
    options = Options(recipe=str(recipe), engine="tfmot", representative_data=str(tmp_path / "rows.npz"))
    result = optimize(shared / "models" / "kws-ds-cnn" / "saved_model", tmp_path / "out", options)
    assert not result.failed
    kernels = [values for values in arrays_of(tmp_path / "out" / "device" / "int8.tflite") if values.size > 600]
    assert sorted(kernel.size for kernel in kernels) == [768, 2560, *[4096] * 4]
    assert all(np.mean(kernel == 0) >= 0.79 and len(np.unique(kernel)) <= 16 for kernel in kernels)
