"""The model of the batcher, by hand and against queues whose waiting times are known."""

from __future__ import annotations

import numpy as np
import pytest

from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.tuning.curve import Curve
from tfopt.serving.tuning.simulation import Overhead, _batched, _sharing, capacity, simulate


def curve(fixed, per_row, sizes=(1, 2, 4, 8), contention=2.0):
    """T(b, 1) = fixed + per_row b; two batches at once take `contention` times as long."""
    times = {(b, k): (fixed + per_row * b) * (1 if k == 1 else contention) for b in sizes for k in (1, 2)}
    return Curve(sizes, (1, 2), times)


def batcher(most, timeout_s=0.0, threads=1, queue=100, sizes=()):
    return BatchingParameters(
        max_batch_size=most,
        batch_timeout_micros=round(timeout_s * 1e6),
        num_batch_threads=threads,
        max_enqueued_batches=queue,
        allowed_batch_sizes=sizes,
    )


def test_the_curve_between_and_beyond_what_was_measured():
    made = curve(1, 0.5)
    assert made.seconds(3) == 2.5 and made.seconds(8, 2) == 10
    assert made.seconds(16) == 10  # twice the largest takes twice as long
    assert made.seconds(8, 4) == 20 and made.seconds(3, 1) == 2.5
    assert made.throughput(8) == pytest.approx(1.6) and made.best(8) == pytest.approx(1.6)


@pytest.mark.parametrize(
    "parameters, ends",
    [
        (batcher(2), [1, 2, 2, 6]),  # the first starts alone, the next two together when it is done
        (batcher(1), [1, 2, 3, 6]),
        (batcher(2, timeout_s=0.15), [1.1, 1.1, 2.1, 6.15]),  # full at 0.1; the last waits in vain
        (batcher(4, timeout_s=0.15), [1.15, 1.15, 2.15, 6.15]),
        (batcher(1, queue=1), [1, 2, np.nan, 6]),  # one runs, one waits, one is refused
    ],
)
def test_batches_by_hand(parameters, ends):
    made, _, _ = _batched(curve(1, 0), parameters, np.array([0, 0.1, 0.2, 5]), 1, 0.0)
    np.testing.assert_allclose(made, ends)


def test_two_threads_run_at_once_and_slow_each_other_down():
    made, _, _ = _batched(curve(1, 0), batcher(1, threads=2), np.array([0, 0.1]), 1, 0.0)
    np.testing.assert_allclose(made, [1, 2.1])


def test_what_a_request_costs_is_paid_for_each_of_a_batch():
    made, _, _ = _batched(curve(1, 0), batcher(2), np.array([0, 0.1, 0.2]), 1, 0.25)
    np.testing.assert_allclose(made, [1.25, 2.75, 2.75])


def test_padding_is_what_was_computed_for_nothing():
    _, computed, batches = _batched(curve(1, 0), batcher(4, 1, sizes=(2, 4)), np.array([0, 0.1, 0.2, 5]), 1, 0.0)
    assert (computed, batches) == (6, 2)  # 3 rows as 4, 1 as 2


def test_sharing_by_hand():
    # Half of the first is done when the second comes; then each goes at half speed.
    np.testing.assert_allclose(_sharing(curve(1, 0), np.array([0, 0.5, 9]), 1, 0.0), [1.5, 2, 10])


def test_one_at_a_time_is_the_queue_of_lindley():
    gaps = np.random.default_rng(0).exponential(1 / 0.7, 3000)  # what simulate draws
    waits = [0.0]
    for gap in gaps[1:]:
        waits.append(max(0.0, waits[-1] + 1 - gap))
    expected = 1e3 * np.percentile(np.array(waits)[300:] + 1, [50, 99])
    found = simulate(curve(1, 0, sizes=(1, 2)), batcher(1, queue=10_000), 0.7)
    np.testing.assert_allclose([found.p50, found.p99], expected)
    assert found.mean_batch == 1 and found.padding == 0 and found.failed == 0


def test_enough_processors_make_no_queue():
    made = curve(1, 0, contention=1.0)
    found = simulate(made, None, 0.02, overhead=Overhead(0.5))
    assert found.p50 == found.p99 == pytest.approx(1500)


def test_capacity_is_below_what_the_curve_allows_and_near_it():
    made = curve(1, 0, sizes=(1, 2, 4, 8))
    found = capacity(lambda rate: simulate(made, batcher(8), rate), 20_000, 0.1, 8)
    assert 5 < found < 8  # full batches of 8 a second
    assert capacity(lambda rate: simulate(made, batcher(8), rate), 500, 0.1, 8) == 0  # one alone takes 1000 ms
