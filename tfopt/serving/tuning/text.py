"""The result of batch tuning for a terminal."""

from __future__ import annotations

import textwrap

from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.loadtest.text import milliseconds
from tfopt.serving.tuning.curve import Curve
from tfopt.serving.tuning.tune import OFF, Tuning


def draw(found: Tuning) -> str:
    """Returns the curve, the settings, and the verdict."""
    lines = [f"{found.model}: {found.signature}, {_workload(found)}"]
    if found.curve is not None:
        lines += ["", *_curve(found.curve)]
    if found.settings:
        lines += ["", *_settings(found), "", *_table(found)]
    lines += ["", *textwrap.wrap(f"Verdict: {found.reason}", 120, subsequent_indent="  ")]
    if found.parameters is not None:
        lines += ["", found.parameters.text().rstrip()]
    return "\n".join(lines) + "\n"


def _workload(found: Tuning) -> str:
    w = found.workload
    parts = [f"{w.rows} rows a request" if w.rows != 1 else "1 row a request"]
    if w.rate is not None:
        parts.append(f"{w.rate:g} requests/s")
    if w.slo_ms is not None:
        parts.append(f"p99 within {w.slo_ms:g} ms")
    return ", ".join(parts)


def _curve(curve: Curve) -> list[str]:
    head = ["rows"]
    for k in curve.parallel:
        head += [f"ms, {k} at once", "rows/s"]
    rows = [head]
    for size in curve.sizes:
        row = [str(size)]
        for k in curve.parallel:
            row += [milliseconds(1e3 * curve.times[size, k]), f"{curve.throughput(size, k):,.1f}"]
        rows.append(row)
    return ["The batch curve of the model alone:", *_columns(rows)]


def _settings(found: Tuning) -> list[str]:
    rows = [["setting", "max_batch_size", "allowed sizes", "timeout us", "threads", "queued batches"]]
    for name, parameters in found.settings.items():
        rows.append([name, *_parameters(parameters)])
    return _columns(rows)


def _parameters(parameters: BatchingParameters | None) -> list[str]:
    if parameters is None:
        return ["-"] * 5
    p = parameters.filled()
    sizes = p.allowed_batch_sizes
    text = ",".join(map(str, sizes)) if len(sizes) <= 8 else f"{sizes[0]},{sizes[1]},...,{sizes[-1]}"
    return [
        str(p.max_batch_size),
        text or "any",
        str(p.batch_timeout_micros),
        str(p.num_batch_threads),
        f"{p.max_enqueued_batches:,}",
    ]


def _table(found: Tuning) -> list[str]:
    at_slo = found.workload.rate is None
    head = ["setting", "expected: " + ("requests/s" if at_slo else "p50 ms"), "p99 ms", "rows a batch", "padding"]
    if found.checked:
        head += ["measured: requests/s", "p50 ms", "p99 ms", "failed"]
    rows = [head]
    for name, choice in found.expected.items():
        e = choice.expected
        row = [name, f"{choice.rate:,.1f}" if at_slo else milliseconds(e.p50)]
        row += [f"{e.failed:.0%} fail" if e.failed else milliseconds(e.p99)]
        row += ["-", "-"] if name == OFF else [f"{e.mean_batch:.1f}", f"{e.padding:.0%}"]
        if found.checked:
            c = found.checked[name]
            row += [
                f"{c.rate:,.1f}" if c.rate else "none held",
                milliseconds(c.p50),
                milliseconds(c.p99),
                str(c.failed),
            ]
        rows.append(row)
    return _columns(rows)


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
