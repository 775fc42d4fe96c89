"""Every name of a TFLite file on one small net: what is made, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tfopt import runtime
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export import tflite
from tfopt.export.tflite_file import TfliteFile
from tfopt.export.tflite_kinds import NAMES, STATIC, engines
from tfopt.export.tflite_old_runtime import problems

MADE = [name for name in NAMES if name not in ("mixed", "dynamic_int4_b32", "dynamic_int4_b256")]
QUANTIZED = [name for name in MADE if name != "float32"]
OLD = ("dynamic_int8", "dynamic_int4_b64", "weight_int4", "int16x8", "int4")


def _net(path: Path, *, wrong: bool = False, fake: bool = False) -> Path:
    """Convolution, depthwise convolution, two dense layers; `wrong` ends in an op that no integer kernel has."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    v1 = tf.compat.v1

    def weights(*shape: int):
        value = tf.constant((random.normal(size=shape) / np.sqrt(np.prod(shape[:-1]))).astype("f4"))
        return tf.quantization.fake_quant_with_min_max_vars(value, -1, 1, 8, narrow_range=True) if fake else value

    def act(x, low: float, high: float):
        return tf.quantization.fake_quant_with_min_max_vars(x, low, high) if fake else x

    with tf.Graph().as_default(), v1.Session() as session:
        image = v1.placeholder(tf.float32, [1, 8, 8, 8], "image")
        x = act(tf.nn.relu(tf.nn.conv2d(act(image, -4, 4), weights(3, 3, 8, 32), 2, "SAME")), 0, 6)
        if not fake:
            x = tf.nn.depthwise_conv2d(x, weights(3, 3, 32, 1), [1, 1, 1, 1], "SAME")
        x = act(tf.nn.relu(tf.matmul(tf.reshape(x, [1, 512]), weights(512, 64))), 0, 4)
        y = act(tf.matmul(x, weights(64, 10)), -4, 4)
        if wrong:
            y = tf.math.sin(y)
        v1.saved_model.simple_save(session, str(path), {"image": image}, {"y": y})
    return path


def _rows(count: int = 24) -> dict[str, Dataset]:
    images = np.random.default_rng(1).normal(size=(count, 8, 8, 8)).astype("f4")
    return {"serving_default": Dataset({"image": images}, None, "random")}


def _convert(model: Path, output: Path, *names: str, **options) -> dict[str, tflite.Converted]:
    return {each.name: each for each in tflite.convert(model, names, output, **options)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(scope="module")
def net(folder):
    return _net(folder / "net")


@pytest.fixture(scope="module")
def made(net, folder):
    return _convert(net, folder / "litert", *MADE, representative=_rows())


@pytest.fixture(scope="module")
def old(net, folder):
    return _convert(net, folder / "old", *OLD, representative=_rows(), runtime="tflite-2.14")


@pytest.mark.parametrize("name", QUANTIZED)
def test_outputs_are_near_those_of_float32(net, made, name):
    inputs = {"image": _rows()["serving_default"].inputs["image"][:8]}
    assert made[name].error is None
    with runtime.open(net) as original, runtime.open(made[name].path) as program:
        want, got = (each.run("serving_default", inputs)["y"] for each in (original, program))
    error = np.sqrt(np.mean((want - got) ** 2) / np.mean(want**2))
    assert error < (0.25 if "int4" in name else 1e-3 if name == "float16" else 0.03)
    assert made[name].snr == pytest.approx(-20 * np.log10(error), abs=3)


def test_sizes(made):
    size = {name: made[name].path.stat().st_size for name in MADE}
    assert size["dynamic_int4_b128"] < size["dynamic_int4_b64"] < 0.22 * size["float32"]
    assert size["dynamic_int8"] < 0.35 * size["float32"] < size["float16"] < 0.6 * size["float32"]
    assert size["dynamic_int4"] <= size["weight_int4"] < 0.24 * size["float32"]
    assert size["int4"] < 0.65 * size["int8"]


@pytest.mark.parametrize(("name", "types"), [("weight_int4", "INT4"), ("int4", "INT4"), ("weight_int8", "INT8")])
def test_weights_have_the_type_that_the_name_says(made, name, types):
    assert TfliteFile(made[name].path).weights(types) >= 3


def test_integer_files_are_all_integer_and_int16x8_has_int16_activations(made):
    for name in ("int8", "int16x8", "int4"):
        assert not TfliteFile(made[name].path).float_ops()
    types = {t.type for op in TfliteFile(made["int16x8"].path).operators() for t in op.outputs if not t.constant}
    assert "INT16" in types and "INT8" not in types


def test_the_report_says_who_made_it_and_what_the_others_gave(made):
    (note,) = [note for note in made["int8"].notes if note.startswith("quantized by")]
    assert made["int8"].engine in note and "the converter" in note and "litert-quantizer" in note
    assert note.count(" dB in ") >= 2 and note.count(" bytes") >= 2


def test_layers_without_a_4_bit_kernel_have_8_bits_and_are_named(made):
    assert any("8 bits for DEPTHWISE_CONV_2D 1x3x3x32" in note for note in made["dynamic_int4"].notes)
    notes = made["dynamic_int4_b128"].notes
    assert any("4 bits for FULLY_CONNECTED 10x64" in n and "not 4 bits in blocks of 128" in n for n in notes)
    blocks = [t.shape for op in TfliteFile(made["dynamic_int4_b128"].path).operators() for t in op.inputs if t.blocks]
    assert blocks == [(64, 512)]


def test_two_bits_are_refused_by_name(tmp_path):
    with pytest.raises(TfoptError, match="2-bit weights are not made, since CONV_2D gives NaN"):
        tflite.convert(tmp_path, ["dynamic_int2"], tmp_path)


@pytest.mark.parametrize("name", OLD)
def test_the_old_runtime_gets_only_what_it_runs(old, name):
    result = old[name]
    if "int4" in name:
        assert result.path is None and "tflite-runtime 2.14 cannot run it: " in result.error
        assert " version " in result.error and "4-bit weights" in result.error
    else:
        assert result.error is None and problems(TfliteFile(result.path)) == []


def test_the_default_runtime_gets_a_note(made):
    for name in QUANTIZED:
        assert bool(problems(TfliteFile(made[name].path))) == any("tflite-runtime 2.14" in n for n in made[name].notes)


def test_the_same_input_gives_the_same_bytes(net, made, tmp_path):
    names = ("dynamic_int4", "int16x8", "int4")
    again = _convert(net, tmp_path, *names, representative=_rows())
    assert all(again[name].path.read_bytes() == made[name].path.read_bytes() for name in names)


def test_an_op_without_an_integer_kernel(tmp_path):
    model = _net(tmp_path / "net", wrong=True)
    left = _convert(model, tmp_path / "a", "int8", representative=_rows())["int8"]
    assert left.path and "not all-integer: 1 x SIN left in float" in left.notes
    strict = _convert(model, tmp_path / "b", "int8", representative=_rows(), all_integer=True)["int8"]
    assert strict.error == "int8: no integer kernel for 1 x SIN, and all_integer leaves no op in float"


def test_without_rows_weights_are_quantized_and_activations_are_not(net, tmp_path):
    made = _convert(net, tmp_path, "dynamic_int8", "weight_int4", "int8", "mixed", "dynamic_int4_b256")
    assert made["dynamic_int8"].engine == "the converter" and made["dynamic_int8"].snr is None
    assert made["weight_int4"].engine == "litert-quantizer" and made["weight_int4"].path
    assert made["int8"].error == "int8 needs representative data for signature 'serving_default'; give it, or drop int8"
    assert made["mixed"].error == "mixed needs a graph with fake-quant nodes; choose a recipe that makes one"
    assert made["dynamic_int4_b256"].path


def test_rows_that_are_not_finite_are_named(net, tmp_path):
    rows = _rows()
    rows["serving_default"].inputs["image"][[5, 7], 0, 0, 0] = np.nan
    made = _convert(net, tmp_path, "weight_int8", "int8", representative=rows)
    assert made["int8"].error == (
        "int8 cannot be calibrated: the representative data (random) are bad: input 'image' of signature "
        "'serving_default' is NaN or infinite in row 5 and 1 more rows; leave these out"
    )
    assert made["weight_int8"].path


def test_ranges_of_the_graph_need_no_rows(tmp_path):
    model = _net(tmp_path / "net", fake=True)
    made = _convert(model, tmp_path / "o", "int8", "mixed", fake_quantized=model, trained=True, io_type="int8")
    for result in made.values():
        assert result.error is None and result.engine == "the ranges in the graph"
        file = TfliteFile(result.path)
        assert not file.float_ops() and all(op.name != "QUANTIZE" for op in file.operators())
    inputs = _rows(8)["serving_default"].inputs
    with runtime.open(model) as graph, runtime.open(made["int8"].path) as program:
        want, got = (each.run("serving_default", inputs)["y"] for each in (graph, program))
    step = 8 / 255
    assert np.mean(np.abs(want - got) < 1.5 * step) > 0.99


def test_each_name_has_engines_and_the_first_needs_no_choice():
    for name in NAMES:
        found = engines(name)
        assert len({engine.by for engine in found}) == len(found)
        assert name == "mixed" or found
        assert name in STATIC or not found[0].needs_rows
    assert len(engines("dynamic_int8", "tflite-2.14")) == len(engines("dynamic_int8")) - 1
