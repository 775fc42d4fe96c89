"""The error of one change against what it is by hand."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from tfopt import model
from tfopt.data import Dataset
from tfopt.sensitivity import sensitivity


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    keras.utils.set_random_seed(0)
    net = keras.Sequential([keras.Input((40,), name="x"), keras.layers.Dense(30, use_bias=False)])
    path = tmp_path_factory.mktemp("sensitivity") / "net"
    net.export(path, verbose=False)
    return model.load(path), net.get_weights()[0]


@pytest.mark.parametrize("count", [1, 300])
def test_noise_over_signal(dense, count):
    loaded, weight = dense
    (name,) = (key for key, value in loaded.weights.items() if value.shape == weight.shape)
    x = np.random.default_rng(1).normal(size=(count, 40)).astype(np.float32)
    noise = 0.01 * np.random.default_rng(2).normal(size=weight.shape).astype(np.float32)
    changes = {"same": {name: weight}, "noisy": {name: weight + noise}, "none": {}, "nan": {name: weight * np.nan}}
    found = sensitivity(loaded, "serving_default", Dataset({"x": x}, None, "rows"), changes)
    assert found["same"] == found["none"] == 0 and found["nan"] == np.inf
    x = x.astype(np.float64)
    assert found["noisy"] == pytest.approx(np.sum((x @ noise) ** 2) / np.sum((x @ weight) ** 2), rel=1e-3)
    assert (loaded.weights[name] == weight).all()
