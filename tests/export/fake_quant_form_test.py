"""What the graph says with fake-quant ops is what the file computes, kernel by kernel."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import tensorflow as tf

from tests.quantized_nets import NETS, ROW, SEQUENCE, answers, build, data, quantized, snr, w
from tfopt import runtime
from tfopt.export import saved_model, tflite_converter
from tfopt.export.fake_quant_form import for_converter
from tfopt.export.fixed_batch import fix_batch
from tfopt.export.tflite_file import TfliteFile
from tfopt.quantization_sites import LAST, sites

# What only moves or casts values.
_MOVES = ("RESHAPE", "QUANTIZE", "DEQUANTIZE", "STRIDED_SLICE", "EXPAND_DIMS", "SQUEEZE")
# How far a result may be off, in steps of an int8 of the result; a rounding in every kernel adds up.
_STEPS = 3.01


def convert(model, folder, io_type="float32"):
    """The file of a model with fake-quant ops, by the converter alone: nothing goes back to float for speed."""
    fixed = fix_batch(model, 1)
    for_converter(fixed)
    saved_model.save(fixed, folder / "fake_quantized", max_constant_bytes=1 << 31)
    job = {"name": "int8", "saved_model": str(folder / "fake_quantized"), "signatures": ["serving_default"]}
    job |= {
        "rows": "",
        "io_type": io_type,
        "select": False,
        "all_integer": True,
        "path": str(folder / "m.tflite"),
        "ranges": True,
    }
    tflite_converter.convert(job)
    return folder / "m.tflite"


def run(path, rows):
    x = rows.inputs["x"]
    with runtime.open(path) as program:
        calls = [program.run("serving_default", {"x": x[i : i + 1]}) for i in range(len(x))]
    return np.concatenate([next(iter(call.values())) for call in calls])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NETS)
def test_the_file_is_what_the_graph_says(name, bits, tmp_path):
    net = NETS[name]
    model, rows = build(tmp_path / "m", net.shape, net.compute), data(net.shape)
    made = quantized(model, rows, bits)
    path = convert(made, tmp_path)
    wanted, received = answers(made, rows), run(path, rows)
    assert np.abs(received - wanted).max() <= (_STEPS + 1) * np.ptp(wanted) / 255
    assert snr(wanted, received) > 33
    file = TfliteFile(path)
    kernels = sorted(op.name for op in file.operators() if op.name not in _MOVES)
    if net.kernels is not None:
        assert kernels == sorted(net.kernels)
    if not net.left:
        assert not file.float_ops()
    weights = {(weight.ref, weight.layout) for weight in sites(model).weights if weight.linear and weight.low}
    if name != "loop":
        assert file.weights("INT4") == (len(weights) if bits == 4 else 0)
        assert not file.weights("FLOAT32") or net.left
    if bits == 8:
        per_channel = [
            op.name
            for op in file.operators()
            if any(t.constant and t.per_channel for t in op.inputs) and op.name != "CONV_2D"
        ]
        assert set(per_channel) <= {"DEPTHWISE_CONV_2D"}


@pytest.mark.parametrize("name", ["conv bias relu", "last softmax", "concat and pools"])
def test_results_are_integers_where_they_are_to_be(name, tmp_path):
    net = NETS[name]
    model, rows = build(tmp_path / "m", net.shape, net.compute), data(net.shape)
    made = quantized(model, rows, where=sites(model, integer_outputs=True))
    path = convert(made, tmp_path, io_type="int8")
    operators = list(TfliteFile(path).operators())
    assert {t.type for op in operators for t in (*op.inputs, *op.outputs) if not t.constant} == {"INT8"}
    wanted = answers(made, rows)
    assert np.abs(run(path, rows) - wanted).max() <= _STEPS * np.ptp(wanted) / 255


ORDERS = {
    "rows of a sequence": (SEQUENCE, lambda x: tf.nn.relu(x @ w(16, 8) + w(8)) @ w(8, 4)),
    "shape before activation": (SEQUENCE, lambda x: tf.nn.relu(tf.reshape(x @ w(16, 8), [-1, 48]))),
    "bias of one number": (ROW, lambda x: tf.nn.relu(x @ w(24, 8) + 0.25)),
    "bias of another shape": (SEQUENCE, lambda x: x @ w(16, 8) + w(6, 1)),
    "residual behind": (SEQUENCE, lambda x: tf.nn.relu(x + x @ w(16, 16))),
    "two readers": (ROW, lambda x: tf.concat([tf.nn.relu(h := x @ w(24, 8)), tf.sigmoid(h)], -1)),
    "input transposed, bias": (SEQUENCE, lambda x: tf.nn.relu(tf.transpose(x, [0, 2, 1]) @ w(6, 4) + w(4))),
}


@pytest.mark.parametrize("name", ORDERS)
def test_dense_layers_become_convolutions_of_the_same_results(name, tmp_path):
    shape, compute = ORDERS[name]
    model, rows = build(tmp_path / "m", shape, compute), data(shape)
    made = quantized(model, rows)
    products = sum(weight.layout == LAST for weight in sites(model).weights)
    fixed = fix_batch(made, 1)
    formed = fixed.copy()
    for_converter(formed)
    formed.check()
    ops = Counter(node.op for node in formed.graph.nodes.values())
    assert ops["Conv2D"] == products and not ops["MatMul"] + ops["BatchMatMulV2"]
    one = data(shape, 1)
    np.testing.assert_allclose(answers(formed, one), answers(fixed, one), atol=1e-5)
    assert formed.signatures == fixed.signatures
    wanted = answers(made, rows)
    assert np.abs(run(convert(made, tmp_path), rows) - wanted).max() <= _STEPS * np.ptp(wanted) / 255


def test_an_open_batch(tmp_path):
    model, rows = build(tmp_path / "m", ROW, lambda x: tf.nn.relu(x @ w(24, 8) + w(8)) @ w(8, 4)), data(ROW)
    made = quantized(model, rows)
    wanted = answers(made, rows)
    for_converter(made)
    np.testing.assert_allclose(answers(made, rows), wanted, atol=1e-5)


def test_an_unknown_number_of_rows_is_named(tmp_path):
    model = build(tmp_path / "m", (None, None, 16), lambda x: x @ w(16, 8))
    made = model.copy()
    from tfopt.fake_quant import insert

    insert(made, sites(model), dict.fromkeys(sites(model).activations, (-1.0, 1.0)))
    with pytest.raises(ValueError, match=r"dense layer '.*' has the shape .*: its number of rows must be known"):
        for_converter(made)
