"""Choosing and checking, on curves and servers whose best setting is known."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import REPO
from tests.serving.loadtest.fake_server import serving
from tests.serving.loadtest.result_test import made
from tests.serving.tuning.simulation_test import curve
from tfopt.errors import TfoptError
from tfopt.serving.loadtest.plan import Plan
from tfopt.serving.tuning import check as checks
from tfopt.serving.tuning import curve as tuning_curve
from tfopt.serving.tuning import text as tuning_text
from tfopt.serving.tuning import tune as tuning
from tfopt.serving.tuning.choice import Workload, choose
from tfopt.serving.tuning.simulation import Overhead
from tfopt.serving.tuning.tune import Tuning, _decided, _with_choices, tune

DIGITS = REPO / "saved_models" / "digits"
SIZES = (1, 2, 4, 8, 16)


def decided(made, workload):
    off, best = choose(made, workload, [1, 2], Overhead())
    found = Tuning("m", "s", workload, None, "", made)
    return _decided(_with_choices(found, off, best, Overhead()))


def test_batching_is_chosen_where_larger_batches_cost_nothing():
    found = decided(curve(0.010, 0.0, SIZES), Workload(None, 60))
    assert found.parameters is not None and found.parameters.max_batch_size == 16
    chosen = next(c for c in found.expected.values() if c.parameters == found.parameters)
    assert chosen.rate > 5 * found.expected["off"].rate
    assert " requests/s within the SLO, " in found.reason and " requests/s within the SLO off, " in found.reason
    assert found.parameters.batch_timeout_micros == 0  # nothing is gained by waiting


def test_batching_is_left_off_where_a_batch_costs_as_much_as_its_rows():
    for workload in (Workload(None, 100), Workload(20, None)):
        found = decided(curve(0.0, 0.010, SIZES), workload)
        assert found.parameters is None and found.reason.startswith("leave batching off: larger batches bring 1.00")


def test_the_rate_decides():
    measured = curve(0.010, 0.001, SIZES, contention=1.0)
    assert decided(measured, Workload(5, None)).parameters is None  # requests hardly ever meet
    assert decided(measured, Workload(300, None)).parameters is not None  # more than they can be served one by one


def test_allowed_sizes_are_multiples_of_the_rows_of_a_request():
    found = decided(curve(0.010, 0.0, (4, 8, 16)), Workload(None, 60, rows=4))
    assert found.parameters is not None and all(size % 4 == 0 for size in found.parameters.allowed_batch_sizes)


def test_the_queue_is_no_longer_than_the_slo_allows():
    (best, *_) = choose(curve(0.010, 0.0, SIZES), Workload(None, 60), [1], Overhead())[1]
    assert best.parameters is not None and best.parameters.max_enqueued_batches == 7  # 60 ms of 10 ms, and one


def test_curve_of_a_model():
    x = np.random.default_rng(0).random((64, 8, 8, 1), np.float32)
    found = tuning_curve.measure(DIGITS, "serving_default", lambda n: {"image": x[:n]}, smallest=2, largest=8, cpus=2)
    assert found.sizes == (2, 4, 8)[: len(found.sizes)] and len(found.sizes) >= 2 and found.parallel == (1, 2)
    assert all(0 < seconds < 1 for seconds in found.times.values())


def test_what_is_checked_decides(monkeypatch):
    """A server that is four times as fast with one batch thread, whatever the model of the batcher says."""

    @contextlib.contextmanager
    def serve(name, parameters):
        with serving() as fake:
            fake.answer_s = 1 / 200 if parameters is not None and parameters.num_batch_threads == 1 else 1 / 50
            yield fake.address

    monkeypatch.setattr(tuning_curve, "measure", lambda *_, **__: curve(0.010, 0.001, (1, 2)))
    found = tune(DIGITS, Workload(60, 100), serve=serve, check_s=0.5)
    assert found.parameters is not None and found.parameters.num_batch_threads == 1
    one = found.checked["tuned, 1 thread"]
    assert one.p99 < min(c.p99 for name, c in found.checked.items() if name != "tuned, 1 thread")
    text = tuning_text.draw(found)
    for phrase in (
        "The batch curve",
        "measured: requests/s",
        "Verdict: tuned, 1 thread",
        "num_batch_threads { value: 1 }",
    ):
        assert phrase in text
    facts = found.to_dict()
    assert facts["curve"][0].keys() == {"rows", "parallel", "ms", "rows_per_second"}
    assert set(facts["checked"]) == set(found.settings) and facts["settings"]["off"] is None


def test_knees_are_found_in_turns():
    order = []

    def server(name, capacity):
        def measure(plan):
            order.append((name, round(plan.rate)))
            return made(plan.rate, capacity, seconds=4, warmup=1)

        return measure

    found = checks.knees(
        {"slow": server("slow", 80), "fast": server("fast", 200), "none": server("none", 20)}, Plan(), 50
    )
    for name, capacity in (("slow", 80), ("fast", 200)):
        assert capacity / 1.2 < found[name].rate <= 1.02 * capacity
    assert 10 < found["none"].rate <= 23 and found["none"].p99 > 0
    assert order[:2] == [("slow", 50), ("fast", 50)]
    # All at one rate before the next; the one that failed three times is out.
    assert order[2:5] == [("none", 50)] * 3 and {rate for _, rate in order[5:7]} == {round(50 * 1.15)}
    assert found["fast"].runs == sum(name == "fast" for name, _ in order)


def test_inputs_that_do_not_share_dimension_0(tmp_path):
    class Ranker(tf.Module):
        @tf.function(
            input_signature=[tf.TensorSpec((1, 2), tf.float32, name="user"), tf.TensorSpec((None, 2), name="items")]
        )
        def score(self, user, items):
            return {"score": tf.reduce_sum(user * items, 1)}

    module = Ranker()
    tf.saved_model.save(module, str(tmp_path / "1"), signatures={"serving_default": module.score})
    found = tune(tmp_path, Workload(None, 100))
    assert found.parameters is None and found.curve is None
    assert "leave batching off: it cannot work, since input 'user' has shape [1, 2]" in found.reason
    assert "Verdict: leave batching off" in tuning_text.draw(found)


def test_versions():
    assert tuning.version_directory(DIGITS) == DIGITS


@pytest.mark.parametrize(
    "workload, signature, message",
    [
        (Workload(None, None), "serving_default", "--rate, --slo_ms: give at least one"),
        (Workload(1, 1), "nope", "--signature_name=nope: .* has no such signature; it has: serve, serving_default"),
    ],
)
def test_bad_input(workload, signature, message):
    with pytest.raises(TfoptError, match=message):
        tune(DIGITS, workload, signature=signature)
