"""Bits that fit the bar, on a net in which one layer needs more of them than the others."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import pytest

from tfopt import model, recipe
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.fake_quant import OPS, is_quantized
from tfopt.function import Function
from tfopt.optimize import run_pass
from tfopt.passes import Data, get, quantize
from tfopt.passes.quantize import decibel
from tfopt.rewrite import Log

layers = keras.layers


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """The weights of `fine` have outliers in every channel, which 4 bits round the rest away for."""
    keras.utils.set_random_seed(5)
    image = keras.Input((10, 10, 2), name="image")
    x = layers.Conv2D(12, 3, activation="relu", name="first")(image)
    x = layers.DepthwiseConv2D(3, activation="relu", name="depthwise")(x)
    fine = layers.Conv2D(16, 1, name="fine", use_bias=False)
    x = layers.GlobalAveragePooling2D()(fine(x))
    net = keras.Model(image, layers.Dense(5, name="scores")(layers.Dense(64, activation="relu", name="wide")(x)))
    kernel = fine.get_weights()[0]
    kernel[:, :, 0] *= 12
    fine.set_weights([kernel])
    path = tmp_path_factory.mktemp("mixed_precision") / "net"
    net.export(path, verbose=False)
    loaded = model.load(path)
    for name, options in recipe.read("lossless").steps:
        get(name).run(loaded, Log(), **options)
    return loaded


@pytest.fixture(scope="module")
def data(net):
    rows = np.random.default_rng(0).gamma(2.0, size=(64, 10, 10, 2)).astype(np.float32)
    return Data(signature="serving_default", teacher=net, rows=Dataset({"image": rows}, None, "rows"))


def mixed(net, data, **options):
    made, log = net.copy(), Log()
    get("mixed_precision").run(made, log, data, **options)
    made.check()
    return made, log


def bits(made) -> list[int]:
    """Of the weights, in the graph itself: what has a scale for each channel, and the activations are 8 bits."""
    return sorted(node.attr["num_bits"].i for node in made.graph.nodes.values() if node.op == OPS[1])


def noise(net, made, data) -> float:
    return 10 ** (-decibel(net, made, data.signature, data.rows) / 10)


@pytest.mark.parametrize("bar", [1.0, 0.02, 0.003])
def test_the_bar_is_met_by_the_noise_where_there_are_no_labels(net, data, bar):
    made, log = mixed(net, data, max_drop=bar)
    assert not log.warnings
    assert noise(net, made, data) <= bar * 1.001
    chosen = {layer["node"].split("/")[-2].rstrip("_1"): layer["bits"] for layer in log.sensitivity}
    assert bits(made) == sorted(chosen.values())
    assert len(chosen) == 5 and sum(v for k, v in log.applied.items() if k.startswith("layer")) == 5
    if bar == 1.0:
        assert set(chosen.values()) == {4} and "1 models scored" in log.notes[-2]


def test_the_layers_and_the_search_are_in_the_record(net, data):
    lowest, _ = mixed(net, data, max_drop=1.0)
    made, log = mixed(net, data, max_drop=0.5 * noise(net, lowest, data))
    assert {8, 4} == {layer["bits"] for layer in log.sensitivity} == set(bits(made))
    assert all(layer["bytes"] > 0 and 0 < layer["error"] < 1 for layer in log.sensitivity)
    sizes = {layer["node"]: 8 * layer["bytes"] // layer["bits"] for layer in log.sensitivity}
    assert sorted(sizes.values()) == [12 * 9, 12 * 16, 2 * 12 * 9, 64 * 5, 16 * 64]
    assert f"{sum(sizes.values()):,} with 8 bits for all" in log.notes[-1]


def test_the_score_of_the_owner_counts_and_the_owners_bar(net, data):
    """The score falls by half of the noise; the bar of the run goes before the pass's own."""
    asked = []

    def score(candidate):
        asked.append(candidate)
        return 1 - noise(net, candidate, data) / 2 if is_quantized(candidate) else 1.0

    made, log = mixed(net, dataclasses.replace(data, score=score, max_drop=0.001), max_drop=0.5)
    assert 0.5 * noise(net, made, data) <= 0.001
    assert "drop of the score" in log.notes[1] and len(asked) <= 20


def test_the_nearest_miss_comes_with_a_warning(net, data):
    made, log = mixed(net, data, max_drop=0.0)
    assert bits(made) == [8] * 5
    (warning,) = log.warnings
    assert "within the bar of 0:" in warning and "8 bits for all" in warning
    chosen, step = run_pass(net, "mixed_precision", {"max_drop": 0.0}, None, data)
    assert step.warnings == [warning] and step.sensitivity == log.sensitivity and is_quantized(chosen)


def test_biases_are_corrected_and_the_model_is_left_alone(net, data):
    before = {name: value.copy() for name, value in net.weights.items()}
    made, _ = mixed(net, data, max_drop=1.0)
    assert any(name.endswith("/corrected") for name in made.graph.nodes)
    assert all((net.weights[name] == value).all() for name, value in before.items())
    with Function(made) as function:
        first, again = (function("serving_default", data.rows.inputs) for _ in range(2))
    assert all((first[name] == again[name]).all() for name in first)


@pytest.mark.parametrize(("low", "expected"), [(0.5, {4}), (0.99, {8}), (None, {8})])
def test_latency_takes_4_bits_only_where_they_are_faster(net, data, monkeypatch, low, expected):
    def timed(plain, models, signature, inputs):
        if low is None:
            raise TfoptError("no such kernel")
        assert set(models) == {"4", "8"} and bits(models["4"]) == [4] * 5 and len(inputs["image"]) == 1
        return {"4": low, "8": 1.0}

    monkeypatch.setattr("tfopt.passes.mixed_precision.device_latency", timed)
    made, log = mixed(net, dataclasses.replace(data, minimize="latency"), max_drop=1.0)
    assert set(bits(made)) == expected
    assert any("latency" in note for note in log.notes)


def test_no_rows_is_one_clear_line(net, data):
    with pytest.raises(TfoptError, match="mixed_precision learns from data: give --representative_data"):
        mixed(net, dataclasses.replace(data, rows=None))


@pytest.mark.parametrize("integers", [True, False])
def test_integer_outputs_reach_the_calibration(net, data, monkeypatch, integers):
    seen = []

    def calibrate(*arguments):
        seen.append(arguments[6])
        return quantize.calibrate(*arguments)

    monkeypatch.setattr("tfopt.passes.mixed_precision.calibrate", calibrate)
    mixed(net, dataclasses.replace(data, integer_outputs=integers), max_drop=1.0)
    assert seen == [integers]
