"""Coefficients: their one form, and how they move through shapes."""

from __future__ import annotations

import numpy as np
import pytest

from tfopt.rewrite import Refused
from tfopt.rules.coefficients import (
    along,
    canonical,
    compact,
    divide,
    dropped,
    fits,
    raised,
    regrouped,
    same,
    stored,
    times,
    vector_of,
)


@pytest.mark.parametrize(
    "given, wanted",
    [
        (3.0, ()),
        (np.full((2, 3), 5), ()),
        (np.arange(3).reshape(1, 3), (1, 3)),
        (np.tile(np.arange(3), (4, 1)), (1, 3)),
        (np.arange(6).reshape(2, 3), (2, 3)),
    ],
)
def test_canonical_keeps_only_axes_that_vary(given, wanted):
    k = canonical(given)
    assert k.shape == wanted and k.dtype == np.float64
    np.testing.assert_array_equal(np.broadcast_to(k, np.shape(given)), given)


@pytest.mark.parametrize(
    "shape, x, wanted",
    [
        ((), None, True),
        ((3,), None, False),
        ((3,), (None, 3), True),
        ((3,), (3, None), False),
        ((3,), (None, 1), False),
        ((1, 1, 3), (None, 3), False),
        ((4, 1), (4, 3), True),
    ],
)
def test_fits(shape, x, wanted):
    assert fits(shape, x) == wanted


@pytest.mark.parametrize(
    "source, target",
    [
        ((2, 3, 4), (6, 4)),
        ((6, 4), (2, 3, 4)),
        ((2, 3, 4), (2, 12)),
        ((2, 12), (2, 3, 4)),
        ((2, 3, 1, 4), (2, 3, 4)),
        ((2, 3, 4), (1, 2, 1, 3, 4, 1)),
        ((6, 4), (4, 6)),
    ],
)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_reshape_moves_a_coefficient_as_it_moves_the_tensor(source, target, axis):
    rng = np.random.default_rng(0)
    axis %= len(source)
    k = along(rng.normal(size=source[axis]), axis, len(source))
    x = rng.normal(size=source)
    moved = regrouped(k, source, target)
    np.testing.assert_allclose((k * x).reshape(target), moved * x.reshape(target))
    assert same(regrouped(moved, target, source), k)


def test_a_reshape_with_an_unknown_batch():
    k = along(np.arange(1, 5), 3, 4)
    assert regrouped(k, (None, 2, 3, 4), (None, 4)).shape == (1, 4)
    assert regrouped(k, (None, 2, 3, 4), (None, 24)).shape == (1, 24)
    assert regrouped(along(np.arange(1, 5), 1, 2), (None, 4), (None, 2, 3, 4)).shape == (1, 1, 1, 4)
    with pytest.raises(Refused, match="unknown size"):
        regrouped(along([1, 2, 3], 2, 4), (None, None, 3, 4), (None, 24))


def test_broadcast_operands():
    k = along(np.arange(4), 1, 2)
    assert dropped(k, (4,)).shape == (4,)
    with pytest.raises(Refused, match="broadcast"):
        dropped(k, (3, 1))
    with pytest.raises(Refused, match="broadcast"):
        dropped(along(np.arange(3), 0, 2), (4,))
    assert dropped(np.ones(()), None).shape == ()


def test_zero_wins_over_infinity():
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(times(np.array([0.0, 2.0]), divide(np.ones(2), np.array([0.0, 4.0]))), [0, 0.5])


def test_a_vector_must_be_per_channel():
    np.testing.assert_array_equal(vector_of(np.float64(2) * np.ones(()), 1, 3), [2, 2, 2])
    with pytest.raises(Refused, match="per channel"):
        vector_of(along([1, 2], 0, 2), 1, 2)
    assert compact(raised(np.arange(3), 4)).shape == (3,)


@pytest.mark.parametrize("exact", [1e39, -1e300, np.inf, np.nan, 1e-44])
def test_what_cannot_be_stored_is_refused(exact):
    with pytest.raises(Refused):
        stored(np.array([1.0, exact]), np.array([1, 1], "float32"))


def test_a_value_that_was_as_good_as_zero_may_underflow():
    assert stored(np.array([1.0, 1e-46]), np.array([1, 1e-30], "float32"))[1] == 0
