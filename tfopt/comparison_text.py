"""A comparison as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

from tfopt import report_words as words
from tfopt.comparison import Comparison, Output, Side

WIDTH = 120


def draw(found: Comparison) -> str:
    """Returns the two artifacts, what they cost, and how far their outputs are apart."""
    a, b = found.a, found.b
    rows = [
        ["", "A", "B", "B against A"],
        _row("raw bytes", words.size, a.bytes, b.bytes, words.percent_of(b.bytes, a.bytes)),
        _row("gzip bytes", words.size, a.gzip_bytes, b.gzip_bytes, words.percent_of(b.gzip_bytes, a.gzip_bytes)),
        _row("parameters", words.count, a.parameters, b.parameters, words.percent_of(b.parameters, a.parameters)),
        _row("FLOPs", words.count, a.flops, b.flops, words.percent_of(b.flops, a.flops)),
    ]
    if a.latency_ms_p50 or b.latency_ms_p50:
        rows += [_time("latency p50, ms", a.latency_ms_p50, b.latency_ms_p50)]
        rows += [_time("latency p95, ms", a.latency_ms_p95, b.latency_ms_p95)]
        share = words.percent_of(b.peak_memory_bytes, a.peak_memory_bytes)
        rows += [_row("peak memory", words.size, a.peak_memory_bytes, b.peak_memory_bytes, share)]
    if a.metric and b.metric:
        change = "the same" if a.metric.value == b.metric.value else f"{b.metric.value - a.metric.value:+.4g}"
        rows += [_row(f"{a.metric.name}, n={a.metric.samples:,}", words.quality, a.metric, b.metric, change)]
    lines = [*_head("A", a), *_head("B", b), "", *_columns(rows), ""]
    lines += [f"Outputs of B against A on {found.rows:,} row{'s' * (found.rows != 1)} ({found.source})"]
    for output in found.outputs:
        lines += _wrap(_output(output), "  ")
    if found.notes:
        lines += ["", *(line for note in found.notes for line in _wrap(f"note: {note}", ""))]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _head(name: str, side: Side) -> list[str]:
    return _wrap(f"{name}  {side.path}  ({side.signature}, by {side.loader})", "")


def _row(title: str, word: Callable[[Any], str], a: Any, b: Any, change: str) -> list[str]:
    return [title, word(a), word(b), change or words.UNKNOWN]


def _time(title: str, a: float | None, b: float | None) -> list[str]:
    change = words.times_as_fast(b, a)
    return _row(title, words.milliseconds, a, b, f"{change} as fast" if change else "")


def _output(output: Output) -> str:
    name = output.a if output.a == output.b or not output.b else f"{output.a} (B: {output.b})"
    text = f"{name}  {output.dtype} {' x '.join(map(str, output.shape)) or 'scalar'}"
    if output.problem:
        return f"{name}: {output.problem}"
    if output.equal is not None:
        return f"{text}: {'equal' if output.equal == 1 else f'{output.equal:.2%} of the values are equal'}"
    text += f": max error {words.error(output.max_abs_error)}, {words.error(output.max_rel_error)} of its scale"
    return text if output.agreement is None else f"{text}; top-1 agreement {words.share(output.agreement)}"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ") or [indent]
