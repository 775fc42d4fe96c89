"""Clusters are what k-means finds, zeros stay, training keeps both, and what is not clustered has its reason."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import rows as some_rows
from tests.origins import save_module, spec
from tfopt import model as models
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.fisher import fisher
from tfopt.function import Function
from tfopt.model import Model
from tfopt.passes import Data, cluster
from tfopt.rewrite import Log
from tfopt.weight_statistics import statistics

RANDOM = np.random.default_rng(0)


class Net(tf.Module):
    """Convolution, depthwise convolution, dense layer, and a table of lookups."""

    def __init__(self, sparse: bool = False):
        super().__init__()
        self.conv = tf.Variable(RANDOM.normal(size=(3, 3, 4, 24)).astype(np.float32) / 6, name="conv")
        self.depthwise = tf.Variable(RANDOM.normal(size=(3, 3, 24, 1)).astype(np.float32) / 3, name="depthwise")
        dense = RANDOM.laplace(size=(24, 64)).astype(np.float32) / 5
        self.dense = tf.Variable(np.where(np.abs(dense) < np.median(np.abs(dense)), 0, dense) if sparse else dense)
        self.last = tf.Variable(RANDOM.normal(size=(64, 5)).astype(np.float32) / 8, name="last")
        self.table = tf.Variable(RANDOM.normal(size=(100, 24)).astype(np.float32), name="table")
        self.bias = tf.Variable(RANDOM.normal(size=24).astype(np.float32), name="bias")

    @tf.function(input_signature=[spec(None, 6, 6, 4), tf.TensorSpec((None,), tf.int32, name="word")])
    def serving_default(self, x, word):
        h = tf.nn.relu(tf.nn.conv2d(x, self.conv, 1, "SAME") + self.bias)
        h = tf.nn.relu(tf.nn.depthwise_conv2d(h, self.depthwise, [1, 1, 1, 1], "SAME"))
        h = tf.reduce_mean(h, [1, 2]) + tf.gather(self.table, word)
        return {"y": tf.nn.softmax(tf.nn.relu(h @ self.dense) @ self.last)}


def build(tmp_path, sparse: bool = False) -> Model:
    save_module(tmp_path / "net", Net(sparse), "serving_default")
    return models.load(tmp_path / "net")


def rows(count: int = 256) -> Dataset:
    return Dataset({"x": some_rows(count, 6, 6, 4), "word": RANDOM.integers(0, 100, count).astype(np.int32)}, None, "")


def run(model: Model, data: Data | None = None, **options) -> Log:
    log = Log()
    cluster.run(model, log, data or Data("serving_default", model.copy()), **options)
    return log


def kernels(model: Model) -> dict[int, np.ndarray]:
    """The constants of two axes or more, by their size."""
    found = [model.graph.constant(name) for name in model.graph.nodes]
    return {value.size: value for value in found if value is not None and value.ndim > 1}


CONV, DEPTHWISE, DENSE, LAST, TABLE = 864, 216, 1536, 320, 2400


@pytest.mark.parametrize("init", cluster.STARTS)
def test_kernels_have_few_values_near_to_what_they_were(tmp_path, init):
    model = build(tmp_path)
    before = kernels(model)
    log = run(model, init=init, depthwise=0)
    assert log.applied == {"kernel clustered": 3}
    for size, value in kernels(model).items():
        if size in (CONV, DENSE, LAST):
            assert len(np.unique(value)) == 16
            assert np.mean((value - before[size]) ** 2) < 0.02 * before[size].var()
        else:
            np.testing.assert_array_equal(value, before[size])
    reasons = sorted(log.refused.values())
    assert "depthwise=0" in reasons[0] and "embeddings=true" in reasons[1]
    assert "3 kernels" not in str(log.notes) and "16 and 3." in log.notes[0]
    assert "not recovered" in log.warnings[0]


def test_by_channel_each_has_its_own(tmp_path):
    model = build(tmp_path)
    log = run(model, clusters=4, granularity="channel", embeddings=True)
    found = kernels(model)
    assert log.applied == {"kernel clustered by channel": 2}
    assert {len(np.unique(found[CONV][..., channel])) for channel in range(24)} == {4}
    assert {len(np.unique(found[LAST][:, channel])) for channel in range(5)} == {4}
    refused = sorted(log.refused.values())
    assert "a channel of it has 24 weights, fewer than 8 for each of 4 centroids" in refused
    assert "a channel of it has 9 weights, fewer than 8 for each of 2 centroids" in refused


@pytest.mark.parametrize(("depthwise", "count"), [(64, 27), (20, 20), (4, 16)])
def test_a_depthwise_kernel_has_more_values_but_no_fewer_weights_for_each(tmp_path, depthwise, count):
    model = build(tmp_path)
    run(model, depthwise=depthwise)
    assert len(np.unique(kernels(model)[DEPTHWISE])) == count  # of 216 weights


def test_zeros_of_a_sparse_kernel_stay_and_no_others_come(tmp_path):
    model = build(tmp_path, sparse=True)
    before = kernels(model)[DENSE]
    run(model, clusters=8)
    after = kernels(model)[DENSE]
    np.testing.assert_array_equal(after == 0, before == 0)
    assert len(np.unique(after)) == 8


@pytest.mark.parametrize("granularity", cluster.GRANULARITIES)
def test_recovery_trains_the_centroids_and_keeps_the_clusters(tmp_path, granularity):
    model = build(tmp_path, sparse=True)
    teacher, clustered, data = model.copy(), model.copy(), rows()
    options = {"clusters": 3, "granularity": granularity, "learning_rate": 1e-2}
    run(clustered, **options)
    log = run(model, Data("serving_default", teacher, data), epochs=8, **options)

    def distance(other: Model) -> float:
        with Function(teacher) as wanted, Function(other) as given:
            one, two = (f("serving_default", data.inputs)["y"] for f in (wanted, given))
        return float(np.mean((one - two) ** 2))

    assert distance(model) < 0.7 * distance(clustered)
    assert "trained" in " ".join(log.notes) or log.notes
    one, two = kernels(clustered), kernels(model)
    moved = 0
    for size, count in ((CONV, 3 if granularity == "tensor" else 72), (LAST, 3 if granularity == "tensor" else 15)):
        assert len(np.unique(two[size])) <= count
        pairs = np.unique(np.stack([one[size].ravel(), two[size].ravel()]), axis=1)
        assert pairs.shape[1] == len(np.unique(one[size]))  # each old value became one new value
        moved += np.any(pairs[0] != pairs[1])
    assert moved
    np.testing.assert_array_equal(two[DENSE] == 0, one[DENSE] == 0)


def test_importance_keeps_what_matters(tmp_path):
    model = build(tmp_path)
    plain, weighted = model.copy(), model.copy()
    data = Data("serving_default", model.copy(), rows())
    run(plain, clusters=4)
    run(weighted, data, clusters=4, weighting="fisher", epochs=0)
    name = next(name for name, value in model.weights.items() if value.size == DENSE)
    importance = fisher(model, data, [name])[name]
    assert importance.shape == model.weights[name].shape and importance.min() >= 0 and importance.max() > 0

    def error(other: Model) -> float:
        return float(np.sum(importance * (other.weights[name] - model.weights[name]) ** 2))

    assert error(weighted) < 0.95 * error(plain)


def test_entropy_makes_what_is_stored_smaller(tmp_path):
    model = build(tmp_path)
    plain, coded = model.copy(), model.copy()
    run(plain)
    run(coded, entropy=2.0)
    one, two = (statistics([kernels(each)[DENSE]]).bits for each in (plain, coded))
    assert two < 0.95 * one


def test_the_same_seed_gives_the_same(tmp_path):
    model = build(tmp_path)
    other = model.copy()
    for each in (model, other):
        run(each, init="kmeans++")
    for size, value in kernels(model).items():
        np.testing.assert_array_equal(value, kernels(other)[size])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clusters": 1}, "'clusters' must be from 2 to 256, received 1"),
        ({"init": "forgy"}, "'init' is one of optimal, linear, density, kmeans"),
        ({"granularity": "row"}, "'granularity' is one of tensor, channel"),
        ({"weighting": "hessian"}, "'weighting' is one of none, fisher"),
        ({"depthwise": 300}, "'depthwise' must be from 0 to 256"),
        ({"entropy": -1.0}, "'entropy' must be from 0 to 100"),
        ({"skip": "nothing"}, "matches no node"),
        ({"skip": "("}, "no regular expression"),
        ({"skip": ".*"}, "as skip wants it"),
        ({"clusters": 256, "depthwise": 0}, "fewer than 8 for each of 256 centroids"),
        ({"weighting": "fisher"}, "weighting=fisher learns from data"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, options, words):
    with pytest.raises(TfoptError, match=words):
        run(build(tmp_path), **options)
