"""Channels are scaled so that outputs stay the same, and quantization has less to lose."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from tests.origins import save_module, spec
from tests.passes.correct_bias_test import lossless, outputs, quantized, snr
from tfopt import calibration, data, model
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.graph import infer_shapes
from tfopt.passes import Data, equalize
from tfopt.quantization_sites import sites
from tfopt.rewrite import Log
from tfopt.rules import scale_groups
from tfopt.rules.linear import refine_shapes
from tfopt.rules.view import View

layers = keras.layers
IMAGE, ROW = (8, 8, 3), (12,)


def uneven(net: keras.Model) -> keras.Model:
    """Gives the output channels of every layer sizes from 1/4 to 4, and biases that are not 0."""
    draw = np.random.default_rng(2)
    for layer in net.layers:
        for weight in layer.weights:
            value = weight.numpy()
            scale = 2 ** draw.uniform(-2, 2, value.shape[-1])
            if "depthwise" in layer.name and value.ndim == 4:
                scale = 2 ** draw.uniform(-2, 2, (value.shape[2], 1))
            weight.assign(value * scale if value.ndim > 1 else 0.1 * draw.normal(size=value.shape))
    return net


def export(path, shape, *stack) -> model.Model:
    keras.utils.set_random_seed(4)
    x = image = keras.Input(shape, name="x")
    for layer in stack:
        x = layer(x)
    uneven(keras.Model(image, x)).export(path, verbose=False)
    return lossless(path)


def rows(shape: tuple[int, ...], count: int = 40, seed: int = 0) -> Dataset:
    return Dataset({"x": np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)}, None, "rows")


def relu() -> layers.Layer:
    return layers.ReLU()


def residual(x):
    return layers.Add()([layers.Conv2D(8, 3, padding="same")(x), layers.Conv2D(8, 1)(x)])


def both(x):
    return layers.Concatenate()([layers.Conv2D(4, 1)(x), layers.AveragePooling2D(3, 1, "same")(x)])


# name: (input shape, layers, groups that are scaled, layers that are not and why)
CHAINS = {
    "conv-relu-conv": (IMAGE, lambda: [layers.Conv2D(8, 3), relu(), layers.Conv2D(4, 3)], 1, ["result of the graph"]),
    "conv-conv": (IMAGE, lambda: [layers.Conv2D(8, 3), layers.Conv2D(4, 1)], 1, ["result"]),
    "conv-leaky-dense": (
        IMAGE,
        lambda: [layers.Conv2D(8, 3), layers.LeakyReLU(), layers.Flatten(), layers.Dense(4)],
        1,
        ["result"],
    ),
    "conv-depthwise-conv": (
        IMAGE,
        lambda: [
            layers.Conv2D(8, 1),
            relu(),
            layers.DepthwiseConv2D(3, depth_multiplier=2),
            relu(),
            layers.Conv2D(5, 1),
        ],
        2,
        ["result"],
    ),
    "pools": (
        IMAGE,
        lambda: [
            *(layers.Conv2D(8, 3), relu(), layers.MaxPooling2D(2), layers.Conv2D(6, 1)),
            *(layers.GlobalAveragePooling2D(), layers.Dense(5), relu(), layers.Dense(3)),
        ],
        3,
        ["result"],
    ),
    "transposed": (
        IMAGE,
        lambda: [layers.Conv2DTranspose(6, 3, strides=2), relu(), layers.Conv2DTranspose(4, 2)],
        1,
        ["result"],
    ),
    "branches": (
        IMAGE,
        lambda: [layers.Conv2D(6, 1), relu(), residual, relu(), both, layers.Conv2D(4, 1)],
        3,
        ["result"],
    ),
    "grouped": (
        IMAGE,
        lambda: [layers.Conv2D(8, 1), relu(), layers.Conv2D(6, 3, groups=2), relu(), layers.Conv2D(4, 1)],
        2,
        ["result"],
    ),
    "conv1d": ((12, 4), lambda: [layers.Conv1D(8, 3), relu(), layers.Conv1D(4, 3)], 1, ["result"]),
    "sigmoid": (ROW, lambda: [layers.Dense(8, activation="sigmoid"), layers.Dense(4)], 0, ["Sigmoid", "result"]),
    "relu6": (ROW, lambda: [layers.Dense(8), layers.ReLU(6.0), layers.Dense(4)], 0, ["Relu6", "result"]),
}


@pytest.mark.parametrize("by", equalize.BY)
@pytest.mark.parametrize("name", CHAINS)
def test_outputs_stay_the_same(name, by, tmp_path):
    shape, stack, groups, reasons = CHAINS[name]
    original = export(tmp_path / "m", shape, *stack())
    scaled, log = original.copy(), Log()
    nodes = len(original.graph.nodes)
    equalize.run(scaled, log, Data("serving_default", original, rows(shape)), by=by)
    assert sum(log.applied.values()) == groups
    assert len(log.refused) == len(reasons)
    assert all(reason in text for reason, text in zip(reasons, log.refused.values(), strict=True))
    scaled.check()
    assert len(scaled.graph.nodes) == nodes
    other = rows(shape, seed=1)
    wanted = outputs(original, other)
    np.testing.assert_allclose(outputs(scaled, other), wanted, atol=2e-6 * np.abs(wanted).max(), rtol=0)


def test_by_weights_the_two_sides_of_a_channel_become_equal(tmp_path):
    shape, stack = CHAINS["conv-depthwise-conv"][:2]
    net = export(tmp_path / "m", shape, *stack())
    equalize.run(net, Log(), Data("serving_default", net.copy()), by="weights")
    view = View(net.graph, infer_shapes(net.graph))
    refine_shapes(view)
    groups = scale_groups.find(view, Log(), "again")
    assert [group.size for group in groups] == [8, 16]
    for group in groups:
        up, down = (
            max_by_channel(view, [edge for edge in group.weights if edge.grows == grows], group.size)
            for grows in (True, False)
        )
        np.testing.assert_allclose(up, down, rtol=0.01)
    log = Log()
    equalize.run(net, log, Data("serving_default", net.copy()), by="weights")
    assert not log.applied and "equal already" in str(log.refused)


def max_by_channel(view, edges, size):
    (edge,) = edges
    return edge.largest(np.abs(view.value(scale_groups.source_of(view, edge.name))), size)


def test_by_activations_channels_share_the_range_of_a_tensor(tmp_path):
    shape, stack = CHAINS["conv-depthwise-conv"][:2]
    net = export(tmp_path / "m", shape, *stack())
    scaled = net.copy()
    equalize.run(scaled, Log(), Data("serving_default", net, rows(shape)))
    refs = [node.name for node in net.graph.nodes.values() if node.op == "Relu"]
    before, after = (next(iter(calibration.values(m, "serving_default", refs, rows(shape)))) for m in (net, scaled))
    for ref in refs:
        old, new = before[1][ref].max((0, 1, 2)), after[1][ref].max((0, 1, 2))
        assert np.std(np.log(new[old > 0])) < 0.8 * np.std(np.log(old[old > 0]))
    ranges = [calibration.ranges(m, "serving_default", refs, rows(shape)) for m in (net, scaled)]
    for ref in refs:
        assert ranges[1][ref][1] <= ranges[0][ref][1] * 1.0001


def int8(net: model.Model, representative: Dataset) -> model.Model:
    refs = [ref for ref, fixed in sites(net).activations.items() if fixed is None]
    return quantized(net, 8, calibration.ranges(net, "serving_default", refs, representative))


def test_int8_gains_on_a_trained_model(shared):
    """MLPerf Tiny's keyword spotter: calibrated on rows 0-99, judged on the rest."""
    original = lossless(shared / "models" / "kws-ds-cnn" / "saved_model")
    source = str(shared / "data" / "kws" / "kws01_first500.npz")
    spoken = data.load(source, {"input_1": data.TensorSpec("input_1", np.dtype("float32"), (None, 49, 10, 1))})
    seen, unseen = spoken.take(slice(0, 100)), spoken.take(slice(100, 500))
    scaled, log = original.copy(), Log()
    equalize.run(scaled, log, Data("serving_default", original, seen))
    assert sum(log.applied.values()) == 9 and len(log.refused) == 1  # all but the last layer
    wanted = outputs(original, unseen)
    np.testing.assert_allclose(outputs(scaled, unseen), wanted, atol=1e-5)
    assert snr(wanted, outputs(int8(scaled, seen), unseen)) > snr(wanted, outputs(int8(original, seen), unseen)) + 0.5


def test_relu6_by_rows_spares_what_comes_near_the_6(tmp_path):
    net = export(tmp_path / "m", ROW, layers.Dense(32), layers.ReLU(6.0), layers.Dense(4))
    seen, other = rows(ROW, 200), rows(ROW, 200, seed=1)
    for by in equalize.BY:
        scaled, log = net.copy(), Log()
        equalize.run(scaled, log, Data("serving_default", net, seen), by=by, relu6="rows")
        assert sum(log.applied.values()) == 1 and "32 channels came near the 6" in log.notes[0]
        wanted = outputs(net, other)
        np.testing.assert_allclose(outputs(scaled, other), wanted, atol=2e-6 * np.abs(wanted).max())
        (clip,) = (node.name for node in net.graph.nodes.values() if node.op == "Relu6")
        old, new = (next(iter(calibration.values(m, "serving_default", [clip], seen)))[1][clip] for m in (net, scaled))
        # The first call is one row: a channel at 6 in it must be as it was.
        np.testing.assert_array_equal(old == 6, new == 6)


class SharedKernel(tf.Module):
    """A layer whose weights a product of other tensors uses too."""

    def __init__(self):
        super().__init__()
        draw = np.random.default_rng(5).normal(size=(3, 40, 40)).astype(np.float32)
        self.a, self.b, self.c = (tf.Variable(part) for part in draw)

    @tf.function(input_signature=[spec(None, 40)])
    def score(self, x):
        return {"y": tf.nn.relu(x @ self.a) @ self.b, "z": tf.nn.sigmoid(x @ self.b) @ self.c}


def test_weights_of_others_are_refused_by_name(tmp_path):
    save_module(tmp_path / "m", SharedKernel(), "score")
    net, log = lossless(tmp_path / "m"), Log()
    equalize.run(net, log, Data("score", net.copy()), by="weights")
    assert not log.applied
    assert any("uses the weights of" in reason and "too" in reason for reason in log.refused.values()), log.refused


def test_what_is_missing_or_unknown_ends_in_one_line(tmp_path):
    net = export(tmp_path / "m", ROW, layers.Dense(8, activation="relu"), layers.Dense(4))
    with pytest.raises(TfoptError, match="equalize learns from data: give --representative_data"):
        equalize.run(net.copy(), Log(), Data("serving_default", net))
    for options in ({"by": "magic"}, {"relu6": "drop"}):
        with pytest.raises(TfoptError, match=r"equalize: option .* is one of"):
            equalize.run(net.copy(), Log(), Data("serving_default", net), **options)
