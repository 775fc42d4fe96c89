from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.low_rank.edit_test import layer_of, weight
from tests.origins import rows
from tests.passes.int8_weights_test import _build
from tfopt.data import Dataset
from tfopt.low_rank.inputs import moments

# With so many rows that there are some 4,000 positions, of which all are taken.
CONVOLUTIONS = [
    ("SAME", (1, 1), (1, 1), "NHWC", 64),
    ("SAME", (2, 3), (1, 1), "NHWC", 340),
    ("VALID", (2, 2), (1, 1), "NHWC", 340),
    ("SAME", (1, 1), (2, 1), "NHWC", 64),
    ([[0, 0], [2, 1], [0, 3], [0, 0]], (1, 2), (1, 1), "NHWC", 100),
    ([[0, 0], [0, 0], [2, 1], [0, 3]], (2, 2), (1, 1), "NCHW", 200),
]


@pytest.mark.parametrize(("padding", "strides", "dilations", "layout", "count"), CONVOLUTIONS, ids=str)
def test_patches_under_a_convolution(padding, strides, dilations, layout, count, tmp_path):
    """p'W must be what the convolution gives: its mean square over all positions follows from the moment."""
    shape = (None, 7, 9, 16) if layout == "NHWC" else (None, 16, 7, 9)
    loaded = _build(
        tmp_path / "m",
        shape,
        lambda x: tf.nn.conv2d(x, weight(3, 3, 16, 24), strides, padding, layout, dilations),
    )
    x = rows(count, *shape[1:]) + 3 * rows(*shape[1:], seed=4)  # each place has a mean of its own
    layer = layer_of(loaded)
    found = moments(loaded, "serving_default", [layer], Dataset({"x": x}, None, "rows"), 0)[layer.weight]
    if layout == "NCHW":
        x = x.transpose(0, 2, 3, 1)
        padding = [padding[0], padding[2], padding[3], padding[1]]
    y = tf.nn.conv2d(x, rows(3, 3, 16, 24, seed=1), strides, padding, "NHWC", dilations).numpy()
    matrix = rows(3, 3, 16, 24, seed=1).reshape(-1, 24)
    expected = np.mean(y.astype(np.float64) ** 2, axis=(0, 1, 2))
    np.testing.assert_allclose(np.sum((found.root @ matrix) ** 2, axis=0), expected, rtol=0.05)
    mean = y.mean(axis=(0, 1, 2))
    np.testing.assert_allclose(found.mean @ matrix, mean, atol=0.1 * np.abs(mean).max())
    assert found.root.shape == (144, 144) and found.mix.shape == (16, 16)


PRODUCTS = {
    "dense": ((None, 48), (48, 40), lambda x, w: x @ w),
    "weights first": ((48, 200), (40, 48), lambda x, w: tf.matmul(w, x)),
    "heads": ((None, 4, 12), (4, 12, 40), lambda x, w: tf.einsum("acd,cde->ae", x, w)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_what_a_product_reads(name, tmp_path):
    shape, w_shape, compute = PRODUCTS[name]
    loaded = _build(tmp_path / "m", shape, lambda x: compute(x, weight(*w_shape)))
    x = rows(*[size or 200 for size in shape])
    layer = layer_of(loaded)
    fed = Dataset({"x": x}, None, "rows", frozenset(("x",) if shape[0] else ()))
    found = moments(loaded, "serving_default", [layer], fed, 0)[layer.weight]
    vectors = x.T if name == "weights first" else x.reshape(200, 48)
    second = vectors.T @ vectors / 200
    # The diagonal is hardly changed, and what differs from it by chance is drawn towards the identity.
    made = found.root.T @ found.root
    np.testing.assert_allclose(np.trace(made), np.trace(second), rtol=1e-4)
    off = ~np.eye(48, dtype=bool)
    assert np.linalg.norm(made[off]) < 0.3 * np.linalg.norm(second[off])


def test_few_rows_are_drawn_towards_the_identity_and_many_are_not(tmp_path):
    loaded = _build(tmp_path / "m", (None, 48), lambda x: x @ weight(48, 40))
    layer = layer_of(loaded)
    mixed = rows(3000, 48) @ (np.geomspace(3, 0.01, 48)[:, None] * rows(48, 48, seed=5))

    def distance(count):
        given = Dataset({"x": mixed[:count].astype(np.float32)}, None, "rows")
        made = moments(loaded, "serving_default", [layer], given, 0)[layer.weight].root
        true = mixed.T @ mixed / len(mixed)
        return np.linalg.norm(made.T @ made - true) / np.linalg.norm(true)

    assert distance(512) < 0.15 < distance(8)
    assert np.isfinite(distance(1))


def test_ids_that_are_looked_up(tmp_path):
    loaded = _build(tmp_path / "m", (None, 3), lambda x: tf.gather(weight(100, 24), x), tf.int32)
    layer = layer_of(loaded)
    ids = np.repeat([[5, 5, 7]], 50, axis=0).astype(np.int32)
    found = moments(loaded, "serving_default", [layer], Dataset({"x": ids}, None, "rows"), 0)[layer.weight]
    assert found.root.shape == (100,) and found.mean.sum() == pytest.approx(1)
    assert found.mean[5] == pytest.approx(101 / 250) and found.mean[7] == pytest.approx(51 / 250)
    assert found.mean[0] == pytest.approx(1 / 250)
