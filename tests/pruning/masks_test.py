"""When masks change, and what of a weight learns."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfopt.errors import TfoptError
from tfopt.pruning.masks import Masks, Timing
from tfopt.pruning.sparsity import Layer, Layout, Pattern, Rule, zeros

RANDOM = np.random.default_rng(0)


def test_polynomial_by_formula():
    timing = Timing("polynomial", 0.1, 0.6, 10)
    shares = {step: timing.share(step, 1000, 0.2, 0.8) for step in range(1000)}
    changed = {step: share for step, share in shares.items() if share is not None}
    assert list(changed) == [*range(100, 599, 10), 599]
    for step, share in changed.items():
        assert share == pytest.approx(0.8 - 0.6 * (1 - (step - 100) / 499) ** 3)
    assert changed[100] == pytest.approx(0.2) and changed[599] == 0.8


@pytest.mark.parametrize(("total", "changes"), [(1, [0]), (2, [0]), (3, [0, 1]), (10, [0, 1, 2, 3, 4])])
def test_short_trainings_end_at_the_target(total, changes):
    timing = Timing("polynomial", 0.0, 0.5, 0)
    shares = [timing.share(step, total, 0.0, 0.8) for step in range(total)]
    assert [step for step, share in enumerate(shares) if share is not None] == changes
    assert shares[changes[-1]] == 0.8


def test_some_fifty_changes_where_the_frequency_is_left_open():
    shares = [Timing("constant", 0.0, 0.5, 0).share(step, 10_000, 0.0, 0.8) for step in range(10_000)]
    assert 50 <= len([share for share in shares if share is not None]) <= 55
    assert set(shares) == {None, 0.8}


def _masks(kind, weights, pattern="", share=0.8):
    layers = {"w": Layer(Layout((0,)))}
    return Masks(weights, layers, Rule(pattern=Pattern.parse(pattern)), share, Timing(kind, 0.0, 0.5, 1))


def _gradient(masks, variables):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(masks.transform(variables)["w"])
    return tape.gradient(loss, variables["w"]).numpy()


def test_only_what_stays_learns():
    weights = {"w": RANDOM.normal(size=(20, 10)).astype(np.float32), "b": np.ones(10, np.float32)}
    variables = {name: tf.Variable(value) for name, value in weights.items()}
    masks = _masks("polynomial", weights)
    np.testing.assert_array_equal(masks.transform(variables)["w"], weights["w"])
    found = []
    for step in range(10):
        masks.schedule.update(step, 10, variables)
        w = masks.transform(variables)["w"].numpy()
        found.append(zeros([w]))
        assert not np.signbit(w[w == 0]).any()
        np.testing.assert_array_equal(_gradient(masks, variables), w != 0)
    assert found[0] == 0 and np.all(np.diff(found) >= 0) and found[4:] == [0.8] * 6


def test_what_was_cut_comes_back():
    weights = {"w": RANDOM.normal(size=(20, 10)).astype(np.float32)}
    variables = {"w": tf.Variable(weights["w"])}
    masks = _masks("constant", weights, share=0.5)
    masks.schedule.update(0, 10, variables)
    before = masks.transform(variables)["w"].numpy()
    variables["w"].assign(np.where(before == 0, weights["w"], weights["w"] / 1000))  # what stayed shrinks
    masks.schedule.update(1, 10, variables)
    after = masks.transform(variables)["w"].numpy()
    assert np.count_nonzero((after != 0) & (before == 0)) > 90 and zeros([after]) == 0.5


def test_at_once_and_for_good():
    weights = {"w": RANDOM.normal(size=(20, 10)).astype(np.float32)}
    variables = {"w": tf.Variable(weights["w"])}
    masks = _masks("one_shot", weights)
    w = masks.transform(variables)["w"].numpy()
    assert zeros([w]) == 0.8 and masks.schedule.settled == 0
    np.testing.assert_array_equal(_gradient(masks, variables), w != 0)
    variables["w"].assign(-1 / variables["w"])
    masks.schedule.update(0, 10, variables)
    np.testing.assert_array_equal(masks.transform(variables)["w"].numpy() != 0, w != 0)


def test_a_kernel_that_is_sparse_goes_on_from_there():
    w = RANDOM.normal(size=(20, 10)).astype(np.float32)
    w[np.abs(w) < np.quantile(np.abs(w), 0.4)] = 0
    masks = _masks("polynomial", {"w": w})
    masks.schedule.update(0, 100, {"w": tf.Variable(w)})
    assert zeros([masks.transform({"w": tf.Variable(w)})["w"].numpy()]) == pytest.approx(0.4)


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_two_of_four_in_steps(share):
    w = RANDOM.normal(size=(20, 10)).astype(np.float32)
    masks = _masks("one_shot", {"w": w}, "2:4", share)
    assert zeros([masks.transform({"w": tf.Variable(w)})["w"].numpy()]) == pytest.approx(share / 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("linear", 0.0, 0.5, 0), "schedule must be one of polynomial, constant, one_shot; received 'linear'"),
        (("constant", 0.6, 0.5, 0), "begin at most end"),
        (("constant", 0.0, 1.5, 0), r"must be in \[0, 1\]"),
        (("constant", 0.0, 0.5, -1), "frequency at least 0"),
    ],
)
def test_timings_that_cannot_be(values, message):
    with pytest.raises(TfoptError, match=message):
        Timing(*values)
