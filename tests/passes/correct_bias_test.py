"""Mean errors of quantized weights move into biases, and nothing else does."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.origins import save_module, spec
from tfopt import calibration, model, recipe
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.fake_quant import insert, strip
from tfopt.function import Function
from tfopt.passes import Data, correct_bias, get
from tfopt.quantization_sites import sites
from tfopt.rewrite import Log

layers = keras.layers


def lossless(path) -> model.Model:
    loaded = model.load(path)
    for name, options in recipe.read("lossless").steps:
        get(name).run(loaded, Log(), **options)
    return loaded


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    keras.utils.set_random_seed(3)
    image = keras.Input((12, 12, 3), name="image")
    x = layers.Conv2D(16, 3, use_bias=False, activation="relu")(image)
    x = layers.DepthwiseConv2D(3, activation="relu")(x)
    x = layers.Conv2D(24, 1, activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    net = keras.Model(image, layers.Dense(10, name="scores")(layers.Dense(16, activation="relu", use_bias=False)(x)))
    path = tmp_path_factory.mktemp("correct_bias") / "net"
    net.export(path, verbose=False)
    return lossless(path)


def data(count: int, seed: int = 0) -> Dataset:
    # Positive, as images are: what makes rounding errors add up to a mean.
    rows = np.random.default_rng(seed).gamma(2.0, size=(count, 12, 12, 3)).astype(np.float32)
    return Dataset({"image": rows}, None, "rows")


def outputs(net: model.Model, rows: Dataset) -> np.ndarray:
    with Function(net) as function:
        return next(iter(function("serving_default", rows.inputs).values())).astype(np.float64)


def quantized(net: model.Model, bits: int, ranges: dict | None = None) -> model.Model:
    """With fake quantization of the weights, and of the activations that have a range."""
    made = net.copy()
    where = sites(made)
    if ranges is None:
        linear = tuple(weight for weight in where.weights if weight.linear)
        where = dataclasses.replace(where, weights=linear, activations={}, tied=())
    insert(made, where, ranges or {}, bits)
    return made


def snr(wanted: np.ndarray, received: np.ndarray) -> float:
    return 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - received) ** 2))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_means_of_the_quantized_model_become_those_of_the_float_one(net, bits):
    rows, other = data(150), data(100, seed=1)
    corrected, log = net.copy(), Log()
    correct_bias.run(corrected, log, Data("serving_default", net, rows), bits=bits)
    assert not log.refused and sum(log.applied.values()) == 5
    assert [node.op for node in corrected.graph.nodes.values()].count("BiasAdd") == 5  # two layers had none
    wanted = outputs(net, rows).mean(0)
    before = outputs(quantized(net, bits), rows).mean(0)
    after = outputs(quantized(corrected, bits), rows).mean(0)
    assert np.abs(after - wanted).max() < 0.2 * np.abs(before - wanted).max()
    gain = snr(outputs(net, other), outputs(quantized(corrected, bits), other))
    assert gain > snr(outputs(net, other), outputs(quantized(net, bits), other)) + 3


def test_weights_stay_as_they_are(net):
    corrected = net.copy()
    correct_bias.run(corrected, Log(), Data("serving_default", net, data(20)))
    layers_of = ("Conv2D", "DepthwiseConv2dNative", "MatMul")
    kernels = {node.name: node.input[1] for node in net.graph.nodes.values() if node.op in layers_of}
    assert len(kernels) == 5
    for name, ref in kernels.items():
        kept = corrected.graph.constant(corrected.graph.nodes[name].input[1])
        np.testing.assert_array_equal(kept, net.graph.constant(ref))
    assert not [node for node in corrected.graph.nodes.values() if node.op.startswith("FakeQuant")]
    corrected.check()


def test_a_model_with_quantized_activations_is_corrected_as_it_is(net):
    rows = data(150)
    where = sites(net)
    refs = [ref for ref, fixed in where.activations.items() if fixed is None]
    made = quantized(net, 4, calibration.ranges(net, "serving_default", refs, rows))
    before = outputs(made, rows)
    inside = {node.name for node in made.graph.nodes.values() if node.op.startswith("FakeQuant")}
    log = Log()
    correct_bias.correct(made, "serving_default", rows, log)
    assert inside == {node.name for node in made.graph.nodes.values() if node.op.startswith("FakeQuant")}
    wanted = outputs(net, rows)
    assert (
        np.abs(outputs(made, rows).mean(0) - wanted.mean(0)).max() < 0.2 * np.abs(before.mean(0) - wanted.mean(0)).max()
    )
    assert snr(wanted, outputs(made, rows)) > snr(wanted, before) + 3
    assert "on 150 rows" in log.notes[0]
    float_again = strip(made)
    assert snr(wanted, outputs(float_again, rows)) < 60  # the correction stays


class Shared(tf.Module):
    """Two layers whose biases are one constant, and a product that is no layer."""

    def __init__(self):
        super().__init__()
        draw = np.random.default_rng(5).normal(size=(8, 8)).astype(np.float32)
        self.a, self.b, self.c = (tf.Variable(draw + shift) for shift in (0, 1, 2))

    @tf.function(input_signature=[spec(None, 8)])
    def score(self, x):
        y = tf.nn.relu(tf.nn.bias_add(x @ self.a, self.c[0]))
        return {"y": tf.matmul(tf.nn.bias_add(y @ self.b, self.c[0]), y, transpose_b=True)}


def test_a_shared_bias_becomes_two(tmp_path):
    save_module(tmp_path / "m", Shared(), "score")
    loaded = lossless(tmp_path / "m")
    rows = Dataset({"x": np.random.default_rng(1).gamma(1.0, size=(64, 8)).astype(np.float32)}, None, "rows")
    log = Log()
    correct_bias.run(loaded, log, Data("score", loaded.copy(), rows), bits=4)
    assert log.applied == {"bias of MatMul": 2}
    values = [loaded.graph.constant(n.input[1]) for n in loaded.graph.nodes.values() if n.op == "BiasAdd"]
    assert len(values) == 2 and not np.array_equal(*values)


def test_without_rows_it_ends_in_one_line(net):
    with pytest.raises(TfoptError, match="correct_bias learns from data: give --representative_data"):
        correct_bias.run(net.copy(), Log(), Data("serving_default", net))
