"""Results for a terminal."""

from __future__ import annotations

import textwrap

from tfopt.serving.loadtest.plan import CLOSED
from tfopt.serving.loadtest.result import Latency, Result
from tfopt.serving.loadtest.sweep import Sweep

WIDTH = 120
_COUNTERS = 8  # of the server that are shown; the JSON file has all


def draw(result: Result) -> str:
    """Returns one run as text."""
    plan, target = result.plan, result.target
    lines = [f"{target.model_name}:{target.signature_name} at {target.server} over {target.protocol}"]
    if plan.mode == CLOSED:
        lines.append(
            f"closed loop, {plan.concurrency} clients, {result.window_s:.3g} s after {plan.warmup_s:g} s of warmup"
        )
        lines.append(f"throughput   {result.achieved:,.1f} requests/s")
    else:
        lines.append(
            f"open loop, {plan.arrivals} arrivals, {result.window_s:.3g} s after {plan.warmup_s:g} s of warmup; "
            "latency from when each request was due"
        )
        lines.append(f"offered      {result.offered:,.1f} requests/s")
        lines.append(f"achieved     {result.achieved:,.1f} requests/s{'' if result.kept_up else '  (did not keep up)'}")
    if result.rows != 1:
        lines.append(f"rows         {result.achieved * result.rows:,.1f} /s, {result.rows:.4g} in a request")
    lines.append(f"bytes        {result.request_bytes:,.0f} a request, {result.response_bytes:,.0f} an answer")
    lines += ["", _row("ms", ["mean", "p50", "p90", "p99", "p99.9", "max"])]
    lines.append(_row("latency", _figures(result.latency)))
    if plan.mode != CLOSED:
        lines += [_row("from send", _figures(result.from_send)), _row("sent late by", _figures(result.lateness))]
    lines.append("")
    lines.append(f"errors       {_errors(result)}")
    lines += [f"  {code}: {result.messages[code]}" for code in result.errors if result.messages.get(code)]
    if plan.slo_ms is not None:
        verdict = "MISSED" if result.missed_slo else "met"
        lines.append(
            f"SLO          p{plan.slo_percentile:g} <= {plan.slo_ms:g} ms: {verdict} ({result.slo_latency:.3g} ms)"
        )
    lines.append(f"generator    {result.generator_cpu:.2f} CPUs")
    lines += _server(result)
    lines += [line for warning in result.warnings for line in _wrap(f"WARNING: {warning}")]
    return "\n".join(lines) + "\n"


def draw_sweep(sweep: Sweep) -> str:
    """Returns a sweep as a table, the rates in order."""
    head = ["offered/s", "achieved/s", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms", "max ms", "errors", "late p99", "held"]
    rows = [head]
    for step in sorted(sweep.steps, key=lambda step: step.plan.rate):
        took = step.latency
        why = "yes" if step.good else "errors" if step.failed else "no: SLO" if step.kept_up else "no"
        rows.append(
            [
                f"{step.offered:,.1f}",
                f"{step.achieved:,.1f}",
                *map(milliseconds, (took.p50, took.p90, took.p99, took.p999, took.max)),
                str(step.failed),
                milliseconds(step.lateness.p99),
                why + (" <- knee" if step is sweep.knee else ""),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        lines.append("  ".join([*cells, row[-1]]))
    lines.append("")
    lines += _wrap(knee_text(sweep))
    late = [step for step in sweep.steps if step.lateness.p99 > 0.1 * step.latency.p99]
    if late:
        lines += _wrap(
            f"WARNING: at {len(late)} of {len(sweep.steps)} steps the generator itself was late by more than a tenth "
            "of the p99 latency; that is in the latencies"
        )
    return "\n".join(lines) + "\n"


def knee_text(sweep: Sweep) -> str:
    """Says in one sentence what a sweep found."""
    if sweep.knee is None:
        slowest = min((step.plan.rate for step in sweep.steps), default=0.0)
        return f"no rate was held, down to {slowest:,.3g} requests/s"
    knee = sweep.knee
    slo = f", p{knee.plan.slo_percentile:g} {milliseconds(knee.slo_latency)} ms"
    text = f"the knee is at {knee.plan.rate:,.1f} requests/s ({knee.achieved * knee.rows:,.1f} rows/s{slo})"
    return text if sweep.bounded else f"{text}; no higher rate was tried: it may be higher"


def milliseconds(value: float) -> str:
    """A time in ms with three digits; "-" for none."""
    if value != value:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 10 else f"{value:.2f}"


def _figures(latency: Latency) -> list[str]:
    return [milliseconds(v) for v in (latency.mean, latency.p50, latency.p90, latency.p99, latency.p999, latency.max)]


def _row(name: str, cells: list[str]) -> str:
    return name.ljust(13) + "".join(cell.rjust(10) for cell in cells)


def _errors(result: Result) -> str:
    text = ", ".join(f"{code} {count}" for code, count in sorted(result.errors.items())) or "none"
    return text + (f" ({result.warmup_errors} in the warmup)" if result.warmup_errors else "")


def _server(result: Result) -> list[str]:
    server = result.server
    lines = []
    if server.cpu_seconds is not None and result.server_cpu_ms is not None:
        lines.append(f"server       {server.cpu_seconds:.2f} s of CPU, {result.server_cpu_ms:.3g} ms a request")
    if server.metrics:
        most = list(server.metrics.items())
        lines.append("server's counters, what the run added:")
        lines += [f"  {value:>14,.6g}  {name}" for name, value in most[:_COUNTERS]]
        if len(most) > _COUNTERS:
            lines.append(f"  and {len(most) - _COUNTERS} more in --output_json")
    return lines


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
