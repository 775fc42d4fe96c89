"""The load test against a server whose faults are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.serving.loadtest.fake_server import serving
from tfopt.errors import TfoptError
from tfopt.serving.loadtest.plan import Plan, Request, Target
from tfopt.serving.loadtest.run import run
from tfopt.serving.loadtest.sweep import sweep

REQUESTS = [Request("Predict", bytes([i])) for i in range(3)]


@pytest.fixture(scope="module")
def server():
    with serving() as fake:
        yield fake


@pytest.fixture
def fake(server):
    server.reset()
    return server


def test_all_are_sent_in_turn_and_on_time(fake):
    fake.delay_s = 0.02
    found = run(Target(fake.address), REQUESTS, Plan(rate=100, warmup_s=0.5, duration_s=1.5))
    assert found.answered == found.sent == len(fake.bodies) and not found.errors
    counts = [fake.bodies.count(request.body) for request in REQUESTS]
    assert max(counts) - min(counts) <= 1
    assert found.latency.p50 >= 20 and found.from_send.p50 >= 20
    assert found.kept_up and found.achieved == pytest.approx(found.offered, rel=0.1)


def test_a_stall_shows_in_an_open_loop_and_hides_in_a_closed_one(fake):
    # 1 s in 3 is a third of the requests of an open loop, and one single request of a closed loop with one client.
    plan = Plan(rate=100, warmup_s=0, duration_s=3)
    fake.stall = (1.0, 1.0)
    opened = run(Target(fake.address), REQUESTS, plan)
    fake.reset()
    fake.stall = (1.0, 1.0)
    closed = run(Target(fake.address), REQUESTS, Plan(mode="closed", warmup_s=0, duration_s=3))
    assert opened.latency.p99 > 800 and opened.latency.p90 > 300
    assert closed.latency.count > 200 and closed.latency.p99 < 100 and closed.latency.max > 800
    # Every request of the second of the stall is there, the later the shorter it waited.
    waited = [ms for second, _, ms in opened.timeline if 1.1 <= second < 1.9]
    assert len(waited) >= 7 and all(later < earlier for earlier, later in itertools.pairwise(waited))
    assert any("closed loop" in warning for warning in closed.warnings)


def test_errors_are_counted_by_code(fake):
    fake.fail = 4
    found = run(Target(fake.address), REQUESTS, Plan(rate=100, warmup_s=0, duration_s=1))
    assert found.errors["UNAVAILABLE"] == len(fake.bodies) // 4
    assert found.messages["UNAVAILABLE"] == "the queue is full"
    assert found.latency.count == len(fake.bodies) - found.failed and not found.good


def test_deadlines(fake):
    fake.delay_s = 0.5
    found = run(Target(fake.address, timeout_s=0.1), REQUESTS, Plan(rate=20, warmup_s=0, duration_s=0.5))
    assert set(found.errors) == {"DEADLINE_EXCEEDED"} and not found.latency.count


def test_too_many_outstanding_are_not_sent_and_said(fake):
    fake.delay_s = 0.5
    plan = Plan(rate=100, arrivals="constant", warmup_s=0, duration_s=0.4, max_outstanding=10)
    found = run(Target(fake.address), REQUESTS, plan)
    assert found.errors == {"NOT_SENT": 30} and found.answered == 10
    assert any("--max_outstanding" in warning for warning in found.warnings)


def test_check(fake):
    plan = Plan(rate=50, warmup_s=0, duration_s=0.5)
    found = run(Target(fake.address), REQUESTS, plan, check=lambda i, body: "no good" if i == 1 else None)
    assert found.errors["WRONG_ANSWER"] == pytest.approx(len(fake.bodies) / 3, abs=1)
    assert found.messages["WRONG_ANSWER"] == "no good"


def test_closed_loop_keeps_as_many_in_flight_as_it_has_clients(fake):
    fake.delay_s = 0.05
    found = run(Target(fake.address), REQUESTS, Plan(mode="closed", concurrency=5, warmup_s=0.2, duration_s=1.5))
    assert found.outstanding == pytest.approx(5, rel=0.15)
    # Little's law: clients = throughput x latency.
    assert found.achieved * found.latency.mean / 1e3 == pytest.approx(5, rel=0.15)


def test_the_number_of_requests_is_capped(fake):
    for mode in ("open", "closed"):
        fake.reset()
        found = run(Target(fake.address), REQUESTS, Plan(mode=mode, rate=500, warmup_s=0, requests=20))
        assert found.sent == found.latency.count == len(fake.bodies) == 20


def test_the_knee_is_the_capacity(fake):
    fake.answer_s = 1 / 60
    target, plan = Target(fake.address), Plan(warmup_s=0.2, duration_s=1, arrivals="constant")
    found = sweep(lambda p: run(target, REQUESTS, p), plan, start=20, resolution=0.5, attempts=1)
    assert found.bounded and found.knee is not None
    assert 35 <= found.knee.plan.rate <= 66
    rates = [step.plan.rate for step in found.steps]
    assert rates[:3] == [20, 40, 80] and np.all(np.array(rates[3:]) < 80)


def test_the_sweep_goes_down_and_gives_up(fake):
    fake.fail = 1
    target, plan = Target(fake.address), Plan(warmup_s=0, duration_s=0.2)
    found = sweep(lambda p: run(target, REQUESTS, p), plan, start=40, attempts=2)
    assert found.knee is None and found.bounded
    assert [step.plan.rate for step in found.steps] == [40, 40, 20, 20, 10, 10, 5, 5]


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_nobody_there(protocol):
    with pytest.raises(TfoptError, match=r"--server=127.0.0.1:9: no .* server answers there"):
        run(Target("127.0.0.1:9", protocol), REQUESTS, Plan())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Target("localhost"), "--server=localhost: wants host:port"),
        (lambda: Target("http://a:1"), "--server=http://a:1: wants host:port"),
        (lambda: Plan(rate=0), "--rate=0: wants more than 0"),
        (lambda: Plan(slo_ms=-1), "--slo_ms=-1: wants more than 0"),
        (lambda: Plan(warmup_s=-1), "--warmup_s=-1: wants 0 or more"),
        (lambda: Plan(rate=1e9), "more than 20 million requests"),
        (lambda: Plan(slo_percentile=100), "--slo_percentile=100"),
    ],
)
def test_bad_plans(make, message):
    with pytest.raises(TfoptError, match=message):
        make()
