from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tfopt.serving.loadtest.engine import NOT_SENT, Record
from tfopt.serving.loadtest.plan import Plan, Request, Target
from tfopt.serving.loadtest.result import Latency, ServerSide, to_json
from tfopt.serving.loadtest.run import summary

TARGET = Target("localhost:1")


def test_percentiles_are_those_of_the_values():
    values = np.random.default_rng(0).lognormal(-5, 1, 20_000)
    found = Latency.of(values)
    for got, percent in ((found.p50, 50), (found.p90, 90), (found.p99, 99), (found.p999, 99.9)):
        assert got == pytest.approx(np.percentile(values, percent) * 1e3, rel=2e-3)
    assert found.max == values.max() * 1e3 and found.mean == pytest.approx(values.mean() * 1e3)
    assert found.count == 20_000 and found.percentile(75) == pytest.approx(np.percentile(values, 75) * 1e3, rel=2e-3)


def test_histograms_add_up():
    from hdrh.histogram import HdrHistogram

    total = HdrHistogram(1, 3_600_000_000, 3)
    for values in (np.full(30, 0.001), np.full(70, 0.010)):
        total.decode_and_add(Latency.of(values).histogram)
    assert total.get_total_count() == 100
    assert total.get_value_at_percentile(50) == pytest.approx(10_000, rel=2e-3)


def test_no_values():
    assert Latency.of([]).count == 0 and math.isnan(Latency.of([]).p99)


def made(rate: float, capacity: float, seconds: float = 10.0, warmup: float = 2.0):
    """A record of a server that answers `capacity` requests per second, one after the other."""
    due = np.arange(int(rate * (warmup + seconds))) / rate
    done, free = [], 0.0
    for at in due:
        free = max(free, at) + 1 / capacity
        done.append(free)
    record = Record(list(due), list(due), done, [None] * len(due), [10] * len(due), seconds=12, cpu_seconds=1)
    plan = Plan(rate=rate, warmup_s=warmup, duration_s=seconds)
    return summary(TARGET, [Request("Predict", b"abc", 2)], plan, record, ServerSide(cpu_seconds=6.0))


def test_a_server_that_keeps_up():
    found = made(100, 200)
    assert found.offered == 100 and found.achieved == pytest.approx(100, abs=0.2) and found.kept_up and found.good
    assert found.latency.p99 == pytest.approx(5, rel=2e-3) and found.outstanding == pytest.approx(0.5, abs=0.01)
    assert found.sent == found.answered == 1200 and found.latency.count == 1000
    assert found.server_cpu_ms == pytest.approx(5.0) and found.request_bytes == 3 and found.rows == 2


@pytest.mark.parametrize("capacity", [97, 90, 50])
def test_a_server_that_does_not_keep_up(capacity):
    found = made(100, capacity)
    assert found.achieved == pytest.approx(capacity, rel=0.01) and not found.kept_up and not found.good
    assert any("did not keep up" in warning for warning in found.warnings)


def test_latency_counts_from_when_a_request_was_due():
    record = Record([2.0, 2.5, 3.0], [2.0, 2.9, 3.0], [2.1, 3.0, math.nan], [None, None, NOT_SENT], [1, 1, 0])
    found = summary(TARGET, [Request("Predict", b"")], Plan(rate=1, duration_s=10), record, ServerSide())
    assert found.latency.max == pytest.approx(500) and found.from_send.max == pytest.approx(100)
    assert found.lateness.max == pytest.approx(400)
    assert found.errors == {NOT_SENT: 1} and not found.good
    assert any("the generator itself was late" in warning for warning in found.warnings)


def test_json_has_no_nan():
    record = Record([2.0], [2.0], [math.nan], ["UNAVAILABLE"], [0], {"UNAVAILABLE": "why"})
    found = summary(TARGET, [Request("Predict", b"")], Plan(), record, ServerSide())
    facts = json.loads(to_json(found.to_dict()))
    assert facts["latency"]["p99"] is None and facts["errors"] == {"UNAVAILABLE": 1} and facts["good"] is False


def test_slo():
    assert not made(100, 200).missed_slo
    record = Record([2.0, 2.1], [2.0, 2.1], [2.01, 2.2], [None, None], [1, 1])
    for slo, missed in ((50, True), (101, False)):
        plan = Plan(rate=1, slo_ms=slo)
        assert summary(TARGET, [Request("Predict", b"")], plan, record, ServerSide()).missed_slo is missed
