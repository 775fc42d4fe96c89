"""Ranges of a model's inner tensors and of its weights."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import save_module, spec
from tfopt import calibration, clipping, model
from tfopt.calibration import observe, ranges, values, weight_scale
from tfopt.data import Dataset
from tfopt.errors import TfoptError


class Net(tf.Module):
    """log of the rows' first element, and a product."""

    @tf.function(input_signature=[spec(None, 4)])
    def open(self, x):
        y = tf.nn.relu(tf.matmul(x, tf.constant([[1.0], [-2.0], [0.5], [0.0]])), name="hidden")
        return {"y": y + tf.math.log(x[:, :1], name="logarithm")}

    @tf.function(input_signature=[spec(4, 4)])
    def fixed(self, x):
        return {"y": tf.nn.relu(x, name="positive")}

    @tf.function(input_signature=[spec(None, dtype=tf.string)])
    def text(self, x):
        return {"y": tf.strings.upper(x, name="upper"), "n": tf.strings.length(x, name="length")}


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "net"
    save_module(path, Net(), "open", "fixed", "text")
    return model.load(path)


def node(net, op: str) -> str:
    (name,) = (n.name for n in net.graph.nodes.values() if n.op == op)
    return name


def data(*shape: int, low: float = 0.1) -> Dataset:
    return Dataset({"x": np.random.default_rng(1).uniform(low, 3, shape).astype(np.float32)}, None, "rows.npz")


@pytest.mark.parametrize("method", calibration.METHODS)
def test_ranges_of_inner_tensors(net, method):
    rows = data(300, 4)
    x = rows.inputs["x"]
    product = x @ np.array([[1.0], [-2.0], [0.5], [0.0]])
    product_ref, log_ref = node(net, "MatMul") + ":0", node(net, "Log")
    found = ranges(net, "open", [product_ref, log_ref], rows, method)
    if method == "minmax":
        np.testing.assert_allclose(found[product_ref], (product.min(), product.max()), rtol=1e-5)
        np.testing.assert_allclose(found[log_ref], (np.log(x[:, 0]).min(), np.log(x[:, 0]).max()), rtol=1e-5)
    else:
        values = np.ravel(product)
        seen = clipping.Observed(float(values.min()), float(values.max()))
        seen.add(values.astype(np.float32))
        np.testing.assert_allclose(found[product_ref], clipping.clipped(seen, method), rtol=1e-3)


def test_every_row_is_seen_once_in_few_calls(net):
    rows = data(300, 4)
    ref = node(net, "MatMul")
    calls = [(start, len(tensors[ref])) for start, tensors in values(net, "open", [ref], rows)]
    assert sum(count for _, count in calls) == 300
    assert [start for start, _ in calls] == list(np.cumsum([0, *[count for _, count in calls[:-1]]]))
    assert len(calls) <= 4
    seen = observe(net, "open", [ref], rows)[ref]
    assert seen.negative.sum() + seen.positive.sum() + seen.zeros == 300


def test_a_fixed_batch_is_filled_up_with_the_first_rows(net):
    rows = data(10, 4, low=-3)
    (relu,) = (n.name for n in net.graph.nodes.values() if n.op == "Relu" and "MatMul" not in n.input[0])
    calls = list(values(net, "fixed", [relu], rows))
    assert [start for start, _ in calls] == [0, 4, 8]
    np.testing.assert_array_equal(calls[2][1][relu], np.maximum(rows.inputs["x"][[8, 9, 0, 1]], 0))
    few = rows.take(slice(0, 1))
    assert next(values(net, "fixed", [relu], few))[1][relu].shape == (4, 4)


def test_a_large_tensor_lowers_the_rows_of_a_call(net, monkeypatch):
    monkeypatch.setattr(calibration, "_CALL_BYTES", 40)
    ref = node(net, "MatMul")
    sizes = [len(tensors[ref]) for _, tensors in values(net, "open", [ref], data(31, 4))]
    assert sizes == [10, 10, 10, 1]
    assert calibration.call_rows(net, "open", [ref], data(31, 4)) == 10
    assert [len(t[ref]) for _, t in values(net, "open", [ref], data(31, 4), 20)] == [20, 11]


def test_the_row_of_an_error_is_that_of_the_source(net):
    rows = data(20, 4)
    rows.inputs["x"][13] = 0
    with pytest.raises(TfoptError, match="becomes NaN or infinite on row 13 of rows"):
        observe(net, "open", [node(net, "Log")], rows.take(slice(10, 20)))
    rows.inputs["x"][13] = np.nan
    with pytest.raises(TfoptError, match="input 'x' holds NaN or infinity in row 13"):
        observe(net, "open", [node(net, "Log")], rows.take(slice(10, 20)))


def test_what_cannot_be_calibrated_ends_in_one_line(net):
    bad = data(20, 4)
    bad.inputs["x"][13, 2] = np.nan
    product, log = node(net, "MatMul"), node(net, "Log")
    with pytest.raises(TfoptError, match="input 'x' holds NaN or infinity in row 13"):
        ranges(net, "open", [product], bad)
    zero = data(200, 4)
    zero.inputs["x"][150, 0] = 0
    with pytest.raises(TfoptError, match=f"tensor '{log}' becomes NaN or infinite on row 150 of rows.npz"):
        ranges(net, "open", [product, log], zero)
    with pytest.raises(TfoptError, match="unknown calibration method 'kl'"):
        ranges(net, "open", [product], data(2, 4), "kl")
    with pytest.raises(TfoptError, match="there is no tensor 'nowhere'"):
        ranges(net, "open", ["nowhere"], data(2, 4))
    with pytest.raises(TfoptError, match="no signature 'none'"):
        ranges(net, "none", [product], data(2, 4))
    with pytest.raises(TfoptError, match="holds no values"):
        ranges(net, "open", [product], data(0, 4))
    text = Dataset({"x": np.array([b"ab", b"c"], object)}, None, "words")
    with pytest.raises(TfoptError, match="holds no real numbers"):
        ranges(net, "text", [node(net, "StringUpper")], text)
    assert ranges(net, "text", [node(net, "StringLength")], text) == {node(net, "StringLength"): (0, 2)}
    with pytest.raises(TfoptError, match="cannot be run"):  # nothing feeds it from this signature
        ranges(net, "open", [node(net, "StringLength")], data(2, 4))


@pytest.mark.parametrize("axis", [None, 3, -1, (2, 3)])
@pytest.mark.parametrize("bits", [4, 8])
def test_weight_scale_of_least_error(axis, bits):
    weight = np.random.default_rng(3).laplace(size=(3, 3, 5, 7)).astype(np.float32)
    weight[..., 2] *= 100
    largest, best = (weight_scale(weight, axis, bits, method) for method in ("max", "mse"))
    kept = tuple(a for a in range(4) if axis is not None and a in np.atleast_1d(axis) % 4)
    others = tuple(a for a in range(4) if a not in kept)
    np.testing.assert_array_equal(largest, np.abs(weight).max(others))

    def error(m):
        step = np.expand_dims(m, others) / (2 ** (bits - 1) - 1)
        return np.square(
            weight - step * np.clip(np.round(weight / step), 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
        ).sum(others)

    assert np.all(error(best) <= error(largest) * 1.0001) and np.all(best <= largest)
    grid = np.min([error(f * largest) for f in np.linspace(0.2, 1, 81)], axis=0)
    assert np.all(error(best) <= grid * 1.0001)
    if bits == 4 and axis == 3:
        assert error(best)[0] < 0.98 * error(largest)[0]


def test_weight_scale_of_zeros_is_positive():
    weight = np.zeros((4, 3), np.float32)
    weight[0, 1] = 2.0
    np.testing.assert_allclose(weight_scale(weight, 1), [2e-7, 2, 2e-7], rtol=1e-5)
    np.testing.assert_array_equal(weight_scale(0 * weight, 1, method="mse"), [1, 1, 1])
    with pytest.raises(TfoptError, match="unknown method 'best'"):
        weight_scale(weight, 1, method="best")


def test_the_scale_of_clusters_puts_them_on_steps():
    values = np.array([0.011, 0.3, -0.52, 1.0], np.float32)
    kernel = np.random.default_rng(0).choice(values, (30, 40))
    found = calibration.cluster_scale(kernel)
    assert found.shape == () and found.dtype == np.float32 and 1 <= found <= 2

    def noise(largest):
        step = largest / 127
        return np.mean((kernel - step * np.round(kernel / step)) ** 2)

    assert noise(found) < 0.1 * noise(np.float32(1))
    assert calibration.cluster_scale(np.zeros((4, 4), np.float32)) > 0
