"""Quantization without training: file and graph agree, the best of what was tried is kept, errors name themselves."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

from pipelines.train_digits import split
from tests.conftest import REPO
from tests.quantized_nets import NETS, ROW, answers, build, data, lossless, w
from tfopt import fake_quant, runtime
from tfopt.clipping import METHODS
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export import saved_model, tflite
from tfopt.export.fake_quant_form import for_converter
from tfopt.export.fixed_batch import fix_batch
from tfopt.export.tflite_file import TfliteFile
from tfopt.passes import Data, quantize
from tfopt.passes.quantize import decibel
from tfopt.rewrite import Log


@pytest.fixture(scope="module")
def digits():
    """The trained convnet, and (training images, labels, held-out images, labels)."""
    return lossless(REPO / "saved_models" / "digits"), split(0)


def learning(net, images, **options) -> Data:
    return Data("serving_default", net.copy(), Dataset({"image": images}, None, "digits"), **options)


def device_file(made, folder, name, trained=False, rows=None):
    """The file of a model with fake-quant ops, as the optimizer has it made."""
    plain = fix_batch(fake_quant.strip(made, snap=trained), 1)
    saved_model.save(plain, folder / "device", max_constant_bytes=1 << 31)
    formed = fix_batch(made, 1)
    for_converter(formed)
    saved_model.save(formed, folder / "quantized", max_constant_bytes=1 << 31)
    (result,) = tflite.convert(
        folder / "device",
        [name],
        folder,
        fake_quantized=folder / "quantized",
        trained=trained,
        representative=None if rows is None else {"serving_default": rows},
    )
    assert result.path, result.error
    return result


def classes(path, images) -> np.ndarray:
    with runtime.open(path) as program:
        calls = [program.run("serving_default", {"image": images[i : i + 1]}) for i in range(len(images))]
    return np.concatenate([next(iter(call.values())) for call in calls]).argmax(1)


def graph_classes(model, images) -> np.ndarray:
    return answers(model, Dataset({"image": images}, None, "digits")).argmax(1)


@pytest.mark.parametrize("bits", [8, 4])
def test_file_and_graph_agree_on_trained_digits(digits, bits, tmp_path):
    net, (train, _, held, labels) = digits
    made, log = net.copy(), Log()
    quantize.run(made, log, learning(net, train[:200]), bits=bits)
    made.check()
    result = device_file(made, tmp_path, {8: "int8", 4: "int4"}[bits])
    assert result.engine == "the ranges in the graph"
    file, graph, plain = (classes(result.path, held), graph_classes(made, held), graph_classes(net, held))
    assert len(held) >= 400
    assert np.mean(file == graph) >= 0.995
    drop = np.mean(plain == labels) - np.mean(file == labels)
    assert drop <= {8: 0.005, 4: 0.05}[bits]
    assert TfliteFile(result.path).weights("INT4") == (log.applied["weight in 4 bits"] if bits == 4 else 0)


def test_every_calibrator_and_best_is_the_best(digits):
    net, (train, *_) = digits
    given = learning(net, train[:128])
    ratios = {}
    for calibrator in METHODS:
        made, log = net.copy(), Log()
        quantize.run(made, log, given, calibrator=calibrator, correct_biases=False)
        assert not log.notes
        ratios[calibrator] = decibel(net, made, "serving_default", given.rows)
    made, log = net.copy(), Log()
    quantize.run(made, log, given, correct_biases=False)
    best = max(ratios, key=ratios.get)
    assert decibel(net, made, "serving_default", given.rows) == pytest.approx(ratios[best], abs=1e-6)
    (note,) = log.notes
    assert note.startswith(f"calibrated by {best} on 128 rows (signal-to-noise ratio in dB: ")
    assert [f"{ratio:.1f}" for ratio in ratios.values()] == re.findall(r" (-?[\d.]+)[,)]", note)
    assert min(ratios.values()) > 15


def test_what_is_tried_beyond_calibration_is_kept_where_it_is_better(digits):
    net, (train, *_) = digits
    given = learning(net, train[:128])
    plain, tried, log = net.copy(), net.copy(), Log()
    quantize.run(plain, Log(), given, correct_biases=False)
    quantize.run(tried, log, given)
    ratios = [decibel(net, model, "serving_default", given.rows) for model in (plain, tried)]
    assert ratios[1] >= ratios[0]
    listed = dict(
        re.findall(
            r"(as calibrated|with biases corrected|equalized, with biases corrected) ([\d.]+)",
            log.notes[-1].partition("(")[2],
        )
    )
    assert listed["as calibrated"] == f"{ratios[0]:.1f}" and len(listed) >= 2
    assert f"{max(map(float, listed.values())):.1f}" == f"{ratios[1]:.1f}"


def test_the_same_rows_give_the_same_graph(digits):
    net, (train, *_) = digits
    twice = [net.copy(), net.copy()]
    for made in twice:
        quantize.run(made, Log(), learning(net, train[:64]), bits=4)
    one, two = (
        {name: node.SerializeToString(deterministic=True) for name, node in made.graph.nodes.items()} for made in twice
    )
    assert one == two
    for name, value in twice[0].weights.items():
        np.testing.assert_array_equal(value, twice[1].weights[name])


def test_the_log_says_what_was_done_and_what_was_not(tmp_path):
    net = build(tmp_path / "m", NETS["layer norm"].shape, NETS["layer norm"].compute)
    log = Log()
    given = Data("serving_default", net.copy(), data(NETS["layer norm"].shape))
    quantize.run(net, log, given, calibrator="minmax")
    assert log.applied == {"weight in 8 bits": 2, "constant in 8 bits": 0, "activation in 8 bits": 4}
    assert len(log.refused) == 8
    assert {rule for rule, _ in log.refused} == {"int8"}
    assert all("layer norm" in reason for reason in log.refused.values())


def test_a_weight_without_a_4_bit_kernel_has_8(tmp_path):
    net = build(tmp_path / "m", NETS["transposed convolution"].shape, NETS["transposed convolution"].compute)
    log = Log()
    given = Data("serving_default", net.copy(), data(NETS["transposed convolution"].shape))
    quantize.run(net, log, given, bits=4, calibrator="minmax")
    assert log.applied["weight in 4 bits"] == 0 and log.applied["constant in 8 bits"] == 1


def test_labelled_rows_calibrate_too(digits):
    net, (train, labels, *_) = digits
    made = net.copy()
    labelled = Dataset({"image": train[:64]}, labels[:64], "digits")
    quantize.run(made, Log(), Data("serving_default", net, labelled=labelled), calibrator="minmax")
    assert fake_quant.is_quantized(made)


def test_bad_options_and_missing_rows_end_in_one_line(tmp_path):
    net = build(tmp_path / "m", ROW, lambda x: tf.nn.relu(x @ w(24, 8)))
    given = Data("serving_default", net.copy(), data(ROW))
    for options, message in (
        ({"bits": 2}, "quantize: option 'bits' must be 8 or 4, received 2"),
        ({"bits": 16}, "quantize: option 'bits' must be 8 or 4, received 16"),
        (
            {"calibrator": "magic"},
            "quantize: unknown calibrator 'magic'; choose from best, minmax, percentile, mse, entropy",
        ),
    ):
        with pytest.raises(TfoptError, match=re.escape(message)):
            quantize.run(net.copy(), Log(), given, **options)
    with pytest.raises(TfoptError, match="quantize learns from data: give --representative_data"):
        quantize.run(net.copy(), Log(), Data("serving_default", net))
    without = build(tmp_path / "n", ROW, lambda x: tf.nn.relu(x))
    with pytest.raises(TfoptError, match="quantize: there is nothing to quantize: no convolution or product"):
        quantize.run(without, Log(), given)
    bad = data(ROW)
    bad.inputs["x"][3, 2] = np.nan
    with pytest.raises(TfoptError, match="rows: input 'x' holds NaN or infinity in row 3: no range can be calibrated"):
        quantize.run(net.copy(), Log(), Data("serving_default", net, bad))


def test_decibel_of_models(tmp_path):
    net = build(tmp_path / "m", ROW, lambda x: x @ w(24, 8))
    rows = data(ROW)
    assert decibel(net, net.copy(), "serving_default", rows) == np.inf
    other = net.copy()
    (weight,) = [node for node in other.graph.nodes.values() if node.op == "MatMul"]
    other.graph.set_constant(weight.input[1], other.graph.constant(weight.input[1]) * np.float32(1.1))
    assert decibel(net, other, "serving_default", rows) == pytest.approx(20, abs=0.01)
    other.graph.set_constant(weight.input[1], other.graph.constant(weight.input[1]) * np.float32(np.nan))
    assert decibel(net, other, "serving_default", rows) == -np.inf


def test_a_keyword_spotter(shared):
    """MLPerf Tiny's DS-CNN: calibrated on rows 0-99; int8 answers as float does on the other 400."""
    from tfopt import data as source

    net = lossless(shared / "models" / "kws-ds-cnn" / "saved_model")
    rows = source.load(
        str(shared / "data" / "kws" / "kws01_first500.npz"),
        {"input_1": source.TensorSpec("input_1", np.dtype("float32"), (None, 49, 10, 1))},
    )
    seen, unseen = rows.take(slice(0, 100)), rows.take(slice(100, 500))
    made = net.copy()
    quantize.run(made, Log(), Data("serving_default", net, seen))
    agree = answers(made, unseen).argmax(1) == answers(net, unseen).argmax(1)
    assert len(agree) == 400 and agree.mean() >= 0.97


def test_signatures_with_inputs_of_their_own(tmp_path):
    """Rows are of one signature; what only another one computes stays in float, and shared weights are quantized."""
    module = tf.Module()
    module.shared, module.own = (tf.Variable(w(*shape)) for shape in ((8, 40), (40, 5)))

    @tf.function(input_signature=[tf.TensorSpec((None, 8), tf.float32, "x")])
    def main(x):
        return {"y": tf.matmul(tf.nn.relu(tf.matmul(x, module.shared)), module.own)}

    @tf.function(input_signature=[tf.TensorSpec((None, 8), tf.float32, "z")])
    def other(z):
        return {"y": tf.matmul(2 * z, module.shared)}

    tf.saved_model.save(module, tmp_path / "m", signatures={"serving_default": main, "other": other})
    net, log = lossless(tmp_path / "m"), Log()
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype("f4")
    made = net.copy()
    quantize.run(made, log, Data("serving_default", net, Dataset({"x": rows}, None, "rows")))
    assert any("other by what they share" in note for note in log.notes)
    assert decibel(net, made, "serving_default", Dataset({"x": rows}, None, "rows")) > 30
    assert decibel(net, made, "other", Dataset({"z": rows}, None, "rows")) > 30
    assert "y" in made.signatures["other"].outputs
