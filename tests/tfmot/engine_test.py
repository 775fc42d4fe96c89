from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from absl.testing import flagsaver
from ai_edge_litert.interpreter import Interpreter

from tests.conftest import REPO
from tfopt import runtime
from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError
from tfopt.optimize import Options, optimize
from tfopt.recipe import NAMED
from tfopt.tfmot.check import check

pytest.importorskip("tensorflow_model_optimization", reason="TFMOT is the extra keras2")

# In a process of its own: importing TFMOT turns its Keras into Keras 2.
MODELS = """
import sys
import numpy as np
import tf_keras as keras

layers, folder = keras.layers, sys.argv[1]
keras.utils.set_random_seed(3)


def functional(build, *shape):
    x = keras.Input(shape, name="x")
    return keras.Model(x, build(x))


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)


convnet = keras.Sequential([
    layers.Input((8, 8, 1), name="image"),
    layers.Conv2D(8, 3, padding="same", use_bias=False),
    layers.BatchNormalization(),
    layers.ReLU(),
    layers.DepthwiseConv2D(3, padding="same"),
    layers.BatchNormalization(),
    layers.ReLU(),
    layers.GlobalAveragePooling2D(),
    layers.Dense(4, activation="softmax", name="scores"),
])
rng = np.random.default_rng(0)
for layer in convnet.layers:
    if isinstance(layer, layers.BatchNormalization):
        layer.set_weights([rng.uniform(0.5, 2, w.shape) for w in layer.get_weights()])
    elif layer.name == "scores":
        layer.set_weights([0.3 * w for w in layer.get_weights()])
convnet.save(f"{folder}/convnet.h5")
convnet.save(f"{folder}/convnet", save_format="tf")
two = functional(lambda x: [layers.Dense(3, name="a")(x), layers.Dense(2, name="b")(x)], 4)
two.save(f"{folder}/two", save_format="tf")
functional(lambda x: layers.Dense(2)(layers.LSTM(3)(x)), 5, 4).save(f"{folder}/lstm.h5")
functional(lambda x: layers.Dense(2)(layers.LayerNormalization()(x)), 4).save(f"{folder}/layer_norm.h5")
functional(lambda x: layers.Dense(2)(layers.Multiply()([x, x])), 4).save(f"{folder}/multiply.h5")
functional(lambda x: keras.Sequential([layers.Dense(2, input_shape=(4,))])(x), 4).save(f"{folder}/nested.h5")
functional(lambda x: layers.Lambda(lambda y: 2 * y)(layers.Dense(2)(x)), 4).save(f"{folder}/code", save_format="tf")
subclassed = Subclassed()
subclassed(np.zeros((1, 4), np.float32))
subclassed.save(f"{folder}/subclassed", save_format="tf")
"""


@pytest.fixture(scope="module")
def keras2(tmp_path_factory):
    """A folder of Keras 2 models, and of rows for them."""
    folder = tmp_path_factory.mktemp("keras2")
    done = subprocess.run([sys.executable, "-c", MODELS, folder], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    rng = np.random.default_rng(1)
    images = rng.normal(size=(120, 8, 8, 1)) + rng.normal(size=(120, 1, 1, 1))
    images = (10 * images).astype(np.float32)  # far beyond TFMOT's initial [-6, 6]
    with runtime.open(folder / "convnet") as program:
        (answers,) = program.run("serving_default", {"image": images}).values()
    top = answers.argmax(1)
    assert np.bincount(top).max() < 90, "one class alone would be no test"
    np.savez(folder / "images.npz", image=images)
    np.savez(folder / "labelled.npz", image=images, label=top)
    np.savez(folder / "wrong.npz", image=images, label=np.full(120, 9))
    np.savez(folder / "rows.npz", x=rng.normal(size=(40, 4)).astype(np.float32))
    return folder


def run(keras2, tmp_path, model, rows="images.npz", **changed):
    recipe = tmp_path / "quick.json"
    quick = {"pass": "train_quantized", "epochs": 2, "batch_size": 16, **changed.pop("settings", {})}
    recipe.write_text(json.dumps({"passes": [*NAMED["lossless"]["passes"], quick], "tflite": ["int8"]}))
    chosen = {"representative_data": str(keras2 / rows), "measure_latency": False, **changed}
    chosen = {"recipe": str(recipe), "engine": "tfmot", **chosen}
    result = optimize(keras2 / model, tmp_path / "out", Options(**chosen))
    return result, {artifact.name: artifact for artifact in result.report.artifacts}


def test_the_file_is_integer_and_agrees_with_the_original(keras2, tmp_path):
    result, artifacts = run(keras2, tmp_path, "convnet.h5", eval_data=str(keras2 / "labelled.npz"), serving_tflite=True)
    assert not result.failed and set(artifacts) == {"original", "serving", "int8"}
    assert artifacts["serving"].max_rel_error < 1e-5, "the serving model is the lossless one"
    int8 = artifacts["int8"]
    assert int8.accuracy.value >= 0.95 and int8.max_rel_error < 0.1
    assert all("1 x SOFTMAX left in float" in note for note in int8.notes if "not all-integer" in note)
    (step,) = [step for step in result.report.steps if step.name == "train_quantized"]
    assert step.applied["fake quantization by TFMOT"] >= 7 and "after" in step.notes[-1]
    with (
        runtime.open(tmp_path / "out" / "device" / "int8.tflite") as device,
        runtime.open(tmp_path / "out" / "serving" / "1") as serving,
    ):
        assert set(device.signatures) == set(serving.signatures)
        for name in ("inputs", "outputs"):
            ends = [getattr(each.signatures["serving_default"], name) for each in (device, serving)]
            assert set(ends[0]) == set(ends[1])
        assert device.signatures["serving_default"].inputs["image"].shape == (1, 8, 8, 1)
    assert (tmp_path / "out" / "serving" / "1" / "model.tflite").exists()
    assert "model.tflite beside it is int8, for --prefer_tflite_model" in artifacts["serving"].notes
    assert not any("answered only without" in note for note in artifacts["serving"].notes)


def test_labels_teach_and_integers_come_and_go(keras2, tmp_path):
    data = {"representative_data": None, "labels": str(keras2 / "labelled.npz")}
    result, artifacts = run(
        keras2, tmp_path, "convnet", io_type="int8", eval_data=data["labels"], settings={"alpha": 1.0}, **data
    )
    assert not result.failed and artifacts["int8"].accuracy.value >= 0.95
    (detail,) = Interpreter(str(tmp_path / "out" / "device" / "int8.tflite")).get_input_details()
    assert detail["dtype"] == np.int8


def test_outputs_keep_their_names(keras2, tmp_path):
    result, artifacts = run(keras2, tmp_path, "two", "rows.npz")
    assert not result.failed and artifacts["int8"].max_rel_error < 0.1


def rows(model):
    return np.ones((8, *((5, 4) if model == "lstm.h5" else (4,))), np.float32)


@pytest.fixture(scope="module")
def child():
    with Child("tfopt.tfmot.worker:worker", {"TF_USE_LEGACY_KERAS": "1"}) as child:
        yield child


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (REPO / "saved_models" / "digits", "Keras 2 finds no layers in it: it is of Keras 3"),
        ("lstm.h5", "TFMOT refuses it: Layer lstm:"),
        ("layer_norm.h5", "TFMOT refuses it: Layer layer_normalization:"),
        ("multiply.h5", "TFMOT refuses it: Layer multiply:"),
        ("nested.h5", "TFMOT refuses it: Quantizing a keras Model inside another keras Model"),
        ("subclassed", "TFMOT refuses it: it is a subclassed model"),
        ("code", "holds Python code (Lambda)"),
        ("two", "signature 's' is not the model's call: it has y, the Keras model a, b"),
    ],
)
def test_what_tfmot_refuses_ends_in_a_line(model, reason, keras2, child):
    job = {"source": str(keras2 / model), "allow_unsafe": False, "seed": 0, "main": "s", "ends": {"s": (["x"], ["y"])}}
    job |= {
        "task": "quantize",
        "options": {},
        "state": None,
        "rows": {"x": rows(model)},
        "labelled": None,
        "labels": None,
    }
    job |= {
        "epochs": 1,
        "min_steps": 0,
        "batch_size": 8,
        "learning_rate": 1e-4,
        "alpha": 0.5,
        "destination": str(keras2 / "none"),
    }
    with pytest.raises(ChildError) as raised:
        child.ask(job, 60)
    assert reason in str(raised.value) and "\n" not in str(raised.value)


def test_a_refusal_leaves_nothing_behind(keras2, tmp_path):
    with pytest.raises(TfoptError, match=r"^--engine=tfmot: .*\(Lambda\).*--engine=graph"):
        run(keras2, tmp_path, "code", "rows.npz")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"settings": {"bits": 4}}, "TFMOT has train_quantized with bits=8; received 4"),
        ({"strategy": "mirrored"}, "leave out --strategy"),
        ({"labels": "wrong.npz"}, "labels go from 9 to 9, and its output has 4 classes"),
        ({"recipe": "device_int8"}, "--engine=tfmot goes with a recipe that has one of the passes prune_"),
    ],
)
def test_wrong_use_ends_in_a_line(changed, message, keras2, tmp_path):
    changed = {key: str(keras2 / value) if key == "labels" else value for key, value in changed.items()}
    with pytest.raises(TfoptError) as raised:
        run(keras2, tmp_path, "convnet", **changed)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TfoptError, match="pip install 'tfopt\\[keras2\\]'"):
        check([("train_quantized", {})])


@pytest.mark.slow
def test_the_keyword_model_by_its_flags(shared, tmp_path, capsys):
    from absl import flags

    from pipelines import optimize as script

    data = dict(np.load(shared / "data" / "kws" / "kws01_first500.npz"))
    np.savez(tmp_path / "rows.npz", input_1=data["input_1"][:100])
    np.savez(tmp_path / "eval.npz", input_1=data["input_1"][100:], label=data["label"][100:])
    arguments = {
        "model": shared / "models" / "kws-ds-cnn" / "saved_model",
        "output_dir": tmp_path / "out",
        "recipe": "qat_int8",
        "engine": "tfmot",
        "representative_data": tmp_path / "rows.npz",
        "eval_data": tmp_path / "eval.npz",
        "max_accuracy_drop": 0.01,
    }
    with flagsaver.flagsaver():
        flags.FLAGS(["tfopt-optimize", "--nomeasure_latency", *(f"--{k}={v}" for k, v in arguments.items())])
        assert script.main(["tfopt-optimize"]) == 0
    assert "trained by TFMOT" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "out" / "device" / "int8.tflite").stat().st_size < 36_000


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([("prune_channels", {}), ("train_quantized", {})], "TFMOT has no prune_channels; --engine=graph does"),
        (
            [("bfloat16", {}), ("cluster", {})],
            "bfloat16 stands before cluster, which starts from the Keras model again",
        ),
        ([("equalize", {}), ("train_quantized", {})], "equalize stands before train_quantized"),
        ([("cluster", {}), ("prune_magnitude", {})], "put prune_magnitude before cluster"),
        ([("prune_magnitude", {"scope": "global"})], "TFMOT has prune_magnitude with scope=layer; received global"),
        ([("cluster", {"init": "optimal"})], "init=linear or density or kmeans++; received optimal"),
        ([("cluster", {"weighting": "fisher"})], "weighting=none; received fisher: --engine=graph has it"),
        ([("prune_magnitude", {"depthwise": 0.5})], "depthwise=0.0; received 0.5"),
    ],
)
def test_what_tfmot_does_not_have_is_refused_when_it_is_read(steps, message):
    with pytest.raises(TfoptError) as raised:
        check(steps)
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "steps",
    [
        [
            ("fold_affine", {}),
            ("prune_magnitude", {"pattern": "2:4"}),
            ("cluster", {"init": "linear"}),
            ("quantize", {}),
        ],
        [("prune_magnitude", {}), ("train_quantized", {"bits": 8}), ("int8_weights", {})],
    ],
)
def test_what_tfmot_has_is_not(steps):
    check(steps)
