"""Zeros stay zeros and clusters stay clusters, whatever trains."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfopt import invariants

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    ("value", "sparse"),
    [
        (np.where(RANDOM.random((40, 50)) < 0.2, 0, 1.5), True),
        (np.where(RANDOM.random((40, 50)) < 0.02, 0, 1.5), False),
        (np.zeros(64), False),  # a bias that was never trained
        (np.zeros((0, 4)), False),
    ],
)
def test_sparse(value, sparse):
    assert invariants.is_sparse(value) is sparse


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (RANDOM.choice(np.linspace(-1, 1, 16), (40, 50)), 16),
        (RANDOM.normal(size=(40, 50)), None),
        (np.concatenate([RANDOM.choice([0.5, 1.5], 2000), RANDOM.normal(size=2000)]).reshape(40, 100), None),
        (np.where(RANDOM.random((64, 12)) < 0.8, 0, RANDOM.normal(size=(64, 12))), None),  # pruned, no value twice
        (np.where(RANDOM.random((64, 12)) < 0.8, 0, RANDOM.choice([0.5, 1.5], (64, 12))), 3),
        (np.arange(8.0).reshape(2, 4), None),  # so small that all differ by chance
        (RANDOM.choice([0.5, 1.5], 2000), None),  # a vector
    ],
)
def test_clusters(value, count):
    found = invariants.clusters(value)
    assert (found and len(found[0])) == count
    if found:
        np.testing.assert_array_equal(found[0][found[1]], value)


def test_hold_keeps_zeros_and_clusters_whatever_the_variables_become():
    weights = {
        "free": RANDOM.normal(size=(8, 8)),
        "sparse": np.where(RANDOM.random((8, 8)) < 0.5, 0, RANDOM.normal(size=(8, 8))),
        "clustered": RANDOM.choice([-1.0, 0.0, 0.25], (8, 8)),
        "bias": np.zeros(8),
    }
    initial, keep = invariants.hold(weights)
    assert initial["clustered"].shape == (3,)
    variables = {name: tf.Variable(value) for name, value in initial.items()}
    for name, kept in keep(variables).items():
        np.testing.assert_array_equal(kept, weights[name])
    for variable in variables.values():
        variable.assign_add(tf.random.normal(variable.shape, dtype=variable.dtype, seed=1))
    kept = keep(variables)
    assert set(kept) == {"sparse", "clustered"}
    np.testing.assert_array_equal(kept["sparse"].numpy() == 0, weights["sparse"] == 0)
    np.testing.assert_array_equal(kept["clustered"].numpy() == 0, weights["clustered"] == 0)
    assert len(np.unique(kept["clustered"])) == 3
