from __future__ import annotations

import numpy as np
import pytest

from tfopt.serving.loadtest import arrivals
from tfopt.serving.loadtest.plan import Plan


def test_constant_arrivals_are_evenly_spaced():
    due = arrivals.times(Plan(rate=50, arrivals="constant", warmup_s=1, duration_s=3))
    np.testing.assert_allclose(due, np.arange(200) / 50)


def test_poisson_gaps_are_exponential():
    due = arrivals.times(Plan(rate=1000, warmup_s=0, duration_s=50))
    gaps = np.diff(due)
    assert due[0] > 0 and due[-1] < 50 and (gaps >= 0).all()
    assert len(due) == 50_000
    # Mean and standard deviation of an exponential are the same, and 1/e of the gaps are longer than the mean.
    assert gaps.mean() == pytest.approx(1e-3, rel=0.02)
    assert gaps.std() == pytest.approx(1e-3, rel=0.03)
    assert (gaps > 1e-3).mean() == pytest.approx(np.exp(-1), abs=0.01)


def test_the_seed_decides():
    plans = [Plan(rate=100, seed=seed) for seed in (1, 1, 2)]
    one, same, other = map(arrivals.times, plans)
    np.testing.assert_array_equal(one, same)
    assert len(one) == len(other) == 1200 and (one != other).any()
    assert (one < 2).sum() == 200 and (one[1:] >= one[:-1]).all()


def test_requests_are_capped():
    assert len(arrivals.times(Plan(rate=100, requests=17))) == 17
