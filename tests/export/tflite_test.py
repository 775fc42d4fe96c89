from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tfopt import runtime
from tfopt.cost_tflite import tflite_cost
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export import tflite


def _build(path: Path, kind: str = "two") -> Path:
    """A v1-style SavedModel with all weights as constants and a batch of 1."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [1, 32], "x")
        weights = [random.normal(size=(32, 64)).astype("f4") / 6, random.normal(size=(64, 10)).astype("f4") / 8]
        hidden = tf.nn.relu(tf.matmul(x, tf.constant(weights[0])), name="hidden")
        scores = tf.nn.softmax(tf.matmul(hidden, tf.constant(weights[1])), name="scores")
        define = v1.saved_model.predict_signature_def
        signatures = {"serving_default": define({"x": x}, {"scores": scores})}
        if kind == "two":
            signatures["embed"] = define({"x": x}, {"hidden": hidden})
        elif kind == "select":
            text = v1.placeholder(tf.string, [1], "text")
            parsed = tf.io.parse_example(text, {"a": tf.io.FixedLenFeature([32], tf.float32)})["a"]
            signatures["examples"] = define({"text": text}, {"parsed": parsed * 2.0})
        elif kind == "select only":
            text = v1.placeholder(tf.string, [1], "text")
            parsed = tf.io.parse_example(text, {"a": tf.io.FixedLenFeature([32], tf.float32)})["a"]
            signatures = {"serving_default": define({"text": text}, {"parsed": parsed * 2.0})}
        elif kind == "weightless":
            signatures = {"serving_default": define({"x": x}, {"y": x / 2 + 2})}
        elif kind == "cond":
            y = tf.cond(tf.reduce_sum(x) > 0, lambda: hidden * 2, lambda: hidden - 1)
            signatures = {"serving_default": define({"x": x}, {"y": y})}
        elif kind == "state":
            count = v1.get_variable("count", [], tf.float32, v1.zeros_initializer(), use_resource=True)
            session.run(count.initializer)
            with tf.control_dependencies([count.assign_add(1.0)]):
                signatures = {"serving_default": define({"x": x}, {"y": hidden + count.read_value()})}
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(session, ["serve"], signatures)
        builder.save()
    return path


def _rows(count: int = 60) -> Dataset:
    return Dataset({"x": np.random.default_rng(1).normal(size=(count, 32)).astype("f4")}, None, "random")


DEFAULT = ("float32", "float16", "dynamic_int8", "int8")


def _convert(model: Path, output: Path, *names: str, signatures=("serving_default",), **options):
    data = {key: _rows() for key in signatures}
    made = tflite.convert(model, names or DEFAULT, output, representative=data, **options)
    return {each.name: each for each in made}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    model = _build(folder / "model")
    return model, folder / "out", _convert(model, folder / "out", signatures=("serving_default", "embed"))


def test_all_four_files_keep_every_signature(two):
    model, output, made = two
    assert sorted(path.name for path in output.iterdir()) == sorted(f"{name}.tflite" for name in DEFAULT)
    x = _rows().inputs["x"]
    with runtime.open(model) as original:
        for name, result in made.items():
            assert result.error is None and result.path == output / f"{name}.tflite"
            with runtime.open(result.path) as program:
                assert program.signatures.keys() == original.signatures.keys()
                for key, output_name in (("serving_default", "scores"), ("embed", "hidden")):
                    want, got = (each.run(key, {"x": x})[output_name] for each in (original, program))
                    tolerance = {"float32": 1e-5, "float16": 2e-3, "dynamic_int8": 0.05, "int8": 0.05}[name]
                    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


def test_files_shrink_and_quantized_ones_say_how_good_they_are(two):
    sizes = {name: result.path.stat().st_size for name, result in two[2].items()}
    assert sizes["dynamic_int8"] < sizes["float16"] < sizes["float32"]
    assert sizes["int8"] < 0.75 * sizes["float32"]
    assert tflite_cost(two[2]["int8"].path).flops == tflite_cost(two[2]["float32"].path).flops == 2 * (32 * 64 + 640)
    for name in ("float16", "dynamic_int8", "int8"):
        assert any("signal-to-noise ratio against float32, on 120 representative rows" in n for n in two[2][name].notes)
    for note in (two[2][name].notes[0] for name in ("float16", "dynamic_int8", "int8")):
        assert note.startswith("quantized by ") and "the converter" in note and "litert-quantizer" in note
    assert "not all-integer: 1 x SOFTMAX left in float" in two[2]["int8"].notes


def test_the_same_input_gives_the_same_bytes(two, tmp_path):
    model, _, made = two
    again = _convert(model, tmp_path, signatures=("serving_default", "embed"))
    assert {n: r.path.read_bytes() == made[n].path.read_bytes() for n, r in again.items()} == dict.fromkeys(made, True)


@pytest.mark.parametrize(("io_type", "dtype"), [("float32", np.float32), ("int8", np.int8)])
def test_io_type_of_the_integer_file(tmp_path, io_type, dtype):
    from ai_edge_litert.interpreter import Interpreter

    result = _convert(_build(tmp_path / "m", "one"), tmp_path, "int8", io_type=io_type)["int8"]
    runner = Interpreter(str(result.path)).get_signature_runner("serving_default")
    for details in (runner.get_input_details(), runner.get_output_details()):
        assert [detail["dtype"] for detail in details.values()] == [dtype]
    assert any("quantized by" in note and "dB" in note for note in result.notes)


def test_state_works_and_starts_afresh(tmp_path):
    made = _convert(_build(tmp_path / "m", "state"), tmp_path / "out", "float32", "int8")
    x = np.zeros((1, 32), "f4")
    with runtime.open(made["float32"].path) as program:
        calls = [program.run("serving_default", {"x": x})["y"][0, 0] for _ in range(3)]
    assert calls == [1, 2, 3]
    assert any("VARIABLE left in float" in note for note in made["int8"].notes)


def test_control_flow_converts(tmp_path):
    model = _build(tmp_path / "m", "cond")
    made = _convert(model, tmp_path / "out", "float32")["float32"]
    x = _rows(4).inputs["x"]
    with runtime.open(model) as original, runtime.open(made.path) as program:
        want, got = (each.run("serving_default", {"x": x})["y"] for each in (original, program))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.slow
def test_a_recurrent_layer_converts_with_its_loop(tmp_path):
    """Keras exports its states with an unknown batch, which the converter refuses until it is told that it is 1."""
    import keras

    from tfopt import model
    from tfopt.export import saved_model
    from tfopt.export.fixed_batch import fix_batch

    keras.utils.set_random_seed(0)
    steps = keras.Input((10, 8), name="x")
    keras.Model(steps, keras.layers.Dense(4)(keras.layers.LSTM(16)(steps))).export(tmp_path / "keras", verbose=False)
    saved_model.save(fix_batch(model.load(tmp_path / "keras", ["serving_default"]), 1), tmp_path / "m")
    made = _convert(tmp_path / "m", tmp_path / "out", "float32", "dynamic_int8", signatures=())
    assert any("the batch of 1" in note for note in made["float32"].notes)
    x = np.random.default_rng(0).normal(size=(5, 10, 8)).astype("f4")
    with runtime.open(tmp_path / "keras") as original:
        (want,) = original.run("serving_default", {"x": x}).values()
    for name, tolerance in (("float32", 1e-5), ("dynamic_int8", 0.03)):
        with runtime.open(made[name].path) as program:
            assert program.loader == runtime.LITERT
            (got,) = program.run("serving_default", {"x": x}).values()
        np.testing.assert_allclose(got, want, atol=tolerance)


def test_a_file_with_nothing_to_quantize_is_an_error_line(tmp_path):
    made = _convert(_build(tmp_path / "m", "weightless"), tmp_path / "out", "float32", "dynamic_int8")
    assert made["float32"].error is None
    assert made["dynamic_int8"].path is None and "nothing to quantize" in made["dynamic_int8"].error
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["float32.tflite"]


def test_ops_without_a_kernel_are_named(tmp_path):
    model = _build(tmp_path / "m", "select only")
    made = _convert(model, tmp_path / "out", "float32", "int8", signatures=())
    assert made["float32"].error == (
        "float32: no TFLite kernel for ParseExampleV2; allow Select TF ops to run them by the Flex delegate"
    )
    assert made["int8"].error == f"int8 stands on {made['float32'].error}"
    assert not (tmp_path / "out").exists()
    allowed = _convert(model, tmp_path / "out", "float32", signatures=(), allow_select_tf_ops=True)["float32"]
    assert allowed.path and "needs the Flex delegate for ParseExampleV2" in allowed.notes[0]
    with pytest.raises(TfoptError, match="Flex delegate"):
        runtime.open(allowed.path)


def test_a_signature_that_cannot_be_converted_is_left_out_with_its_reason(tmp_path):
    made = _convert(_build(tmp_path / "m", "select"), tmp_path / "out", "float32", "int8")
    for result in made.values():
        assert any("'examples' was left out: no TFLite kernel for ParseExampleV2" in n for n in result.notes)
        with runtime.open(result.path) as program:
            assert list(program.signatures) == ["serving_default"]


def test_int8_without_data_is_an_error_line_and_partial_data_a_note(tmp_path):
    model = _build(tmp_path / "m", "two")
    made = _convert(model, tmp_path / "out", "float32", "int8", signatures=())
    assert made["float32"].path and "representative data for signature 'embed'" in made["int8"].error
    made = _convert(model, tmp_path / "out", "int8", signatures=("serving_default",))
    assert "signature 'embed' was left out of int8: it has no representative data" in made["int8"].notes


@pytest.mark.slow
def test_a_crash_and_a_hang_cost_one_file_only(tmp_path, monkeypatch):
    """The child is replaced by one that dies while it makes float16, and hangs while it makes weight_int8."""
    (tmp_path / "sabotage.py").write_text(
        "import os, signal, time\n"
        "from tfopt.export import tflite_worker\n"
        "def worker():\n"
        "    answer = tflite_worker.worker()\n"
        "    def sabotaged(job):\n"
        "        if job.get('name') == 'float16': os.kill(os.getpid(), signal.SIGSEGV)\n"
        "        if job.get('name') == 'weight_int8': time.sleep(600)\n"
        "        return answer(job)\n"
        "    return sabotaged\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    child = tflite.Child
    monkeypatch.setattr(tflite, "Child", lambda worker: child("sabotage:worker"))
    model = _build(tmp_path / "m", "one")
    names = ("float32", "float16", "weight_int8", "dynamic_int8")
    made = _convert(model, tmp_path / "out", *names, signatures=(), timeout=45)
    assert made["float16"].error == "float16: died of SIGSEGV"
    assert made["weight_int8"].error == "weight_int8: gave no answer in 45 s, and was stopped"
    assert made["float32"].path and made["dynamic_int8"].path
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["dynamic_int8.tflite", "float32.tflite"]


@pytest.mark.parametrize(
    "options", [{"names": ["int7"]}, {"names": ["dynamic_int2"]}, {"runtime": "tflite-2.13"}, {"io_type": "uint8"}]
)
def test_unknown_names_are_bad_usage(tmp_path, options):
    with pytest.raises(TfoptError, match=r"choose from .*|2-bit weights are not made"):
        tflite.convert(tmp_path, output_dir=tmp_path, **options)


def test_what_is_no_saved_model_is_an_error_line(tmp_path):
    made = _convert(tmp_path / "none", tmp_path / "out", "float32", "int8")
    assert "none" in made["float32"].error and "\n" not in made["float32"].error


@pytest.mark.slow
def test_keyword_spotting_in_int8_is_as_good_and_smaller_than_the_reference(shared, tmp_path):
    """Accuracy within 0.5 point of the SavedModel, and no larger than MLPerf Tiny's own int8 file."""
    import tensorflow as tf
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    source = shared / "models/kws-ds-cnn"
    loaded = tf.saved_model.load(str(source / "saved_model"))
    frozen = convert_variables_to_constants_v2(loaded.signatures["serving_default"])
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        x = tf.compat.v1.placeholder(tf.float32, [1, 49, 10, 1], "x")
        (y,) = tf.import_graph_def(
            frozen.graph.as_graph_def(), {frozen.inputs[0].name: x}, [frozen.outputs[0].name], name=""
        )
        tf.compat.v1.saved_model.simple_save(session, str(tmp_path / "m"), {"input_1": x}, {"dense": y})
    data = np.load(shared / "data/kws/kws01_first500.npz")
    rows, labels = {"input_1": data["input_1"]}, data["label"]
    made = tflite.convert(
        tmp_path / "m", ["int8"], tmp_path, representative={"serving_default": Dataset(rows, None, "")}
    )
    accuracy = {}
    for path in (source / "saved_model", made[0].path):
        with runtime.open(path) as program:
            accuracy[path.name] = np.mean(program.run("serving_default", rows)["dense"].argmax(axis=1) == labels)
    assert accuracy["saved_model"] == pytest.approx(0.912)
    assert accuracy["int8.tflite"] >= accuracy["saved_model"] - 0.005
    assert made[0].path.stat().st_size < 0.85 * (source / "kws_ref_model.tflite").stat().st_size
    assert "not all-integer: 1 x SOFTMAX left in float" in made[0].notes
