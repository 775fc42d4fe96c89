"""k-means on a line: the best of all clusterings, and the local ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tfopt import kmeans

RANDOM = np.random.default_rng(0)


def error(values, book):
    return float(np.sum((values - book.assign(values)) ** 2))


def entropy(values):
    _, counts = np.unique(values, return_counts=True)
    return float(-np.sum(counts / len(values) * np.log2(counts / len(values))))


def best(values, importance, count):
    """The least error of all ways to cut sorted numbers into `count` intervals."""
    order = np.argsort(values)
    x, h = values[order], importance[order]
    least = np.inf
    for cuts in itertools.combinations(range(1, len(x)), count - 1):
        total = 0.0
        for part in np.split(np.arange(len(x)), cuts):
            mean = np.average(x[part], weights=h[part])
            total += np.sum(h[part] * (x[part] - mean) ** 2)
        least = min(least, total)
    return least


@pytest.mark.parametrize("weighted", [False, True])
def test_optimal_is_the_best_of_all(weighted):
    values = RANDOM.laplace(size=14)
    importance = RANDOM.random(14) if weighted else np.ones(14)
    found = kmeans.kmeans(values, 4, "optimal", importance)
    assert len(found.centroids) == 4
    edges = kmeans.Line(values, importance).edges(found.borders)
    cost = kmeans.Line(values, importance).error(edges[:-1], edges[1:]).sum()
    assert cost == pytest.approx(best(values, importance, 4), rel=1e-9)


@pytest.mark.parametrize("start", kmeans.STARTS)
def test_every_start_ends_where_each_centroid_is_the_mean_of_its_own(start):
    values = RANDOM.laplace(size=5000).astype(np.float32)
    found = kmeans.kmeans(values, 16, start)
    assert len(found.centroids) == 16 and np.all(np.diff(found.centroids) > 0)
    nearest = np.abs(values[:, None] - found.centroids).argmin(1)
    means = [values[nearest == i].mean(dtype=np.float64) for i in range(16)]
    np.testing.assert_allclose(found.centroids, means, rtol=1e-6)
    np.testing.assert_array_equal(found.assign(values), found.centroids.astype(np.float32)[nearest])
    assert error(values, found) >= 0.999 * error(values, kmeans.kmeans(values, 16, "optimal"))


def test_as_scipy_from_the_same_beginning():
    vq = pytest.importorskip("scipy.cluster.vq")
    values = RANDOM.normal(size=3000)
    begin = np.linspace(values.min(), values.max(), 8)
    theirs, _ = vq.kmeans2(values[:, None], begin[:, None], iter=300, minit="matrix")
    np.testing.assert_allclose(kmeans.kmeans(values, 8, "linear").centroids, np.sort(theirs.ravel()), rtol=1e-6)


@pytest.mark.parametrize("start", kmeans.STARTS)
def test_few_distinct_values_are_kept_as_they_are(start):
    values = RANDOM.choice([-1.0, 0.5, 2.0], 100)
    np.testing.assert_array_equal(kmeans.kmeans(values, 16, start).centroids, [-1, 0.5, 2])


def test_importance_moves_a_centroid_to_what_counts():
    values = np.array([0.0, 1.0, 10.0, 11.0])
    np.testing.assert_allclose(kmeans.kmeans(values, 2, importance=np.array([3.0, 1, 1, 1])).centroids, [0.25, 10.5])
    np.testing.assert_allclose(kmeans.kmeans(values, 2, importance=np.zeros(4)).centroids, [0.5, 10.5])


def test_one_seed_one_result():
    values = RANDOM.normal(size=1000)
    one, other, third = (kmeans.kmeans(values, 8, "kmeans++", seed=seed).centroids for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, other)
    assert not np.array_equal(one, third)


def test_what_a_rate_leaves_is_smaller_to_code_and_not_worse_than_fewer_centroids():
    values = RANDOM.laplace(size=20_000)
    plain, coded = (kmeans.kmeans(values, 16, rate=rate) for rate in (0.0, 1.0))
    bits, fewer_bits = (entropy(book.assign(values)) for book in (plain, coded))
    assert fewer_bits < bits - 0.15 and error(values, coded) < 1.3 * error(values, plain)
    books = (kmeans.kmeans(values, count) for count in range(16, 2, -1))
    fewer = next(book for book in books if entropy(book.assign(values)) < fewer_bits)
    assert error(values, coded) < 0.9 * error(values, fewer)


def test_the_cheapest_centroids_are_an_envelope():
    centroids = np.sort(RANDOM.normal(size=12))
    bits = RANDOM.exponential(3, 12)
    kept, borders = kmeans._cheapest(centroids, bits, 0.05)
    x = np.linspace(-3, 3, 2001)
    cost = (x[:, None] - centroids) ** 2 + 0.05 * bits
    np.testing.assert_array_equal(kmeans.Codebook(kept, borders).assign(x), centroids[cost.argmin(1)])
