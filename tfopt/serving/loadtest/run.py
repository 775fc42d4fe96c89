"""One load test: sends, and makes a result of the record."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tfopt.errors import TfoptError
from tfopt.serving.loadtest import server_side
from tfopt.serving.loadtest.engine import NOT_SENT, Check, Record, Sender
from tfopt.serving.loadtest.plan import CLOSED, Plan, Request, Target
from tfopt.serving.loadtest.result import Latency, Result
from tfopt.serving.loadtest.transport import connect

_TICK_S = 0.1


def run(
    target: Target,
    requests: Sequence[Request],
    plan: Plan,
    *,
    check: Check | None = None,
    metrics: str | None = None,
    server_pid: int | None = None,
    progress: bool = False,
) -> Result:
    """Load tests a server.

    Args:
      target: whom to ask.
      requests: what to ask, in turn, from the start again when all were sent.
      plan: how often, and for how long.
      check: what is wrong with an answer (index of the request, body), or None; it runs while the clock does.
      metrics: "host:port/path" of Prometheus metrics, read before and after.
      server_pid: the server's process, where it is on this machine: its CPU time is read before and after.
      progress: show a bar on standard error.

    Raises:
      TfoptError: nobody answers at the target, there are no requests, or `metrics` or `server_pid` name nothing.
    """
    if not requests:
        raise TfoptError("there are no requests to send")
    with connect(target) as transport:
        before = server_side.read(metrics, server_pid)
        record = Sender(transport, requests, plan, target.timeout_s, check).run(progress)
        after = server_side.read(metrics, server_pid)
    return summary(target, requests, plan, record, server_side.difference(before, after))


def summary(
    target: Target, requests: Sequence[Request], plan: Plan, record: Record, server: server_side.ServerSide
) -> Result:
    """Makes a result of a record; see `Result` for what the figures mean."""
    due, sent, done = (np.array(values, np.float64) for values in (record.due, record.sent, record.done))
    good = np.array([code is None for code in record.code], bool)
    end = plan.warmup_s + plan.duration_s
    if plan.requests is not None and len(due) and len(due) >= plan.requests:
        last = due[-1] if plan.mode != CLOSED else max(due[-1], np.nanmax(np.append(done, -np.inf)))
        end = max(float(last), plan.warmup_s) + 1e-6
    measured = (due >= plan.warmup_s) & (due < end)
    window = end - plan.warmup_s
    answered = good & (done >= plan.warmup_s) & (done < end)
    took = measured & good
    used = [requests[i % len(requests)] for i in range(min(len(due), len(requests)))]
    sizes = np.array(record.size)[good]
    waited = np.where(np.isfinite(done), np.minimum(done, end), end) - np.maximum(sent, plan.warmup_s)
    result = Result(
        target=target,
        plan=plan,
        offered=float(measured.sum() / window),
        achieved=float(answered.sum() / window),
        window_s=window,
        sent=int(np.isfinite(sent).sum()),
        answered=int(good.sum()),
        errors=dict(Counter(code for code, inside in zip(record.code, measured, strict=True) if inside and code)),
        messages=record.messages,
        warmup_errors=int((~good & (due < plan.warmup_s)).sum()),
        latency=Latency.of((done - due)[took]),
        from_send=Latency.of((done - sent)[took]),
        lateness=Latency.of(np.maximum(sent - due, 0)[measured & np.isfinite(sent)]),
        outstanding=float(np.nansum(np.maximum(waited, 0)) / window),
        request_bytes=float(np.mean([len(request.body) for request in used])) if used else 0.0,
        response_bytes=float(sizes.mean()) if sizes.size else 0.0,
        rows=float(np.mean([request.rows for request in used])) if used else 0.0,
        generator_cpu=record.cpu_seconds / max(record.seconds, 1e-9),
        timeline=_timeline(due, (done - due) * 1e3, good),
        server=server,
    )
    return _with_warnings(result)


def _timeline(due: np.ndarray, ms: np.ndarray, good: np.ndarray) -> tuple[tuple[float, int, float], ...]:
    if not good.any():
        return ()
    ticks = (due[good] / _TICK_S).astype(int)
    counts, worst = np.bincount(ticks), np.zeros(ticks.max() + 1)
    np.maximum.at(worst, ticks, ms[good])
    return tuple((round(i * _TICK_S, 1), int(n), float(w)) for i, (n, w) in enumerate(zip(counts, worst, strict=True)))


def _with_warnings(result: Result) -> Result:
    """Says what makes the figures other than they seem."""
    late, latency, warnings = result.lateness, result.latency, []
    if result.plan.mode != CLOSED and late.p99 > 0.1 * latency.p99:
        warnings.append(
            f"the generator itself was late: by {late.p99:.3g} ms at p99, where the latency is {latency.p99:.3g} ms; "
            "that is in the latencies (see 'from send'): lower the rate, or free CPUs on this machine"
        )
    if result.generator_cpu > 0.9:
        warnings.append(
            f"the generator used {result.generator_cpu:.2f} CPUs, about all that one process can: it may be the limit"
        )
    if result.plan.mode == CLOSED:
        warnings.append("a closed loop asks less while the server stalls, and so hides stalls; an open loop does not")
    if 0 < latency.count < 1000:
        warnings.append(f"{latency.count} answers are too few for p99.9: it is the greatest of them")
    if not result.kept_up and not result.errors and result.plan.mode != CLOSED:
        warnings.append(
            f"the server did not keep up: {result.achieved:.4g} of {result.offered:.4g} requests/s were answered; "
            "the latencies grow with the length of the run"
        )
    if NOT_SENT in result.errors:
        warnings.append(f"{result.errors[NOT_SENT]} requests were not sent: too many waited (--max_outstanding)")
    return dataclasses.replace(result, warnings=tuple(warnings))
