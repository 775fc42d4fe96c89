"""A load test as one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any, NamedTuple

from tfopt.report_chart import Axis, Chart, Point, scatter
from tfopt.serving.loadtest import text
from tfopt.serving.loadtest.plan import CLOSED
from tfopt.serving.loadtest.result import Result
from tfopt.serving.loadtest.self_test import Limit
from tfopt.serving.loadtest.sweep import Sweep


class Line(NamedTuple):
    """A line of a plot: its name, its CSS class, and its points as SVG wants them."""

    name: str
    style: str
    points: str


class Plot(NamedTuple):
    """A plot, ready to draw, with lines through its points."""

    chart: Chart
    lines: list[Line]
    hint: str


def draw(found: Result | Sweep, limit: Limit | None = None, warnings: Sequence[str] = ()) -> str:
    """Returns the page; every text is escaped.

    Args:
      found: a run, or a sweep.
      limit: of the generator, where it was measured.
      warnings: about the data.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("tfopt")
    style = folder.joinpath("report.html.j2").read_text("utf-8").partition("<style>")[2].partition("</style>")[0]
    template = folder.joinpath("serving/loadtest/loadtest.html.j2").read_text("utf-8")
    steps = sorted(found.steps, key=lambda step: step.plan.rate) if isinstance(found, Sweep) else [found]
    main = (found.knee or steps[0]) if isinstance(found, Sweep) else found
    return environment.from_string(template).render(
        style=style,
        headline=text.knee_text(found) if isinstance(found, Sweep) else _headline(found),
        main=main,
        steps=steps,
        knee=found.knee if isinstance(found, Sweep) else None,
        is_sweep=isinstance(found, Sweep),
        closed=main.plan.mode == CLOSED,
        tiles=_tiles(main),
        plots=[*(_sweep_plots(steps) if isinstance(found, Sweep) else []), *_run_plots(main)],
        warnings=[*main.warnings, *warnings],
        limit=limit,
        facts=_facts(main),
        ms=text.milliseconds,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _headline(result: Result) -> str:
    p99 = text.milliseconds(result.latency.p99)
    if result.plan.mode == CLOSED:
        return f"{result.achieved:,.1f} requests/s from {result.plan.concurrency} clients, p99 {p99} ms"
    if not result.kept_up:
        return f"{result.offered:,.1f} requests/s were too many: {result.achieved:,.1f} were answered"
    return f"{result.offered:,.1f} requests/s, p99 {p99} ms"


def _tiles(result: Result) -> list[tuple[str, str, str]]:
    latency, ms = result.latency, text.milliseconds
    slo = ""
    if result.plan.slo_ms is not None:
        verdict = "missed" if result.missed_slo else "met"
        slo = f"; SLO p{result.plan.slo_percentile:g} {result.plan.slo_ms:g} ms {verdict}"
    return [
        ("Median latency", f"{ms(latency.p50)} ms", f"mean {ms(latency.mean)} ms"),
        ("p99 latency", f"{ms(latency.p99)} ms", f"p99.9 {ms(latency.p999)} ms, max {ms(latency.max)} ms{slo}"),
        ("Achieved", f"{result.achieved:,.1f}/s", f"{result.offered:,.1f}/s offered, {latency.count:,} good answers"),
        ("Failed", f"{result.failed:,}", ", ".join(f"{k} {v}" for k, v in result.errors.items()) or "no errors"),
    ]


def _plot(
    title: str, series: Sequence[tuple[str, str, Sequence[tuple[float, float]]]], x: Axis, y: Axis, hint: str
) -> Plot:
    """Lays out lines; each is (name, CSS class, points)."""
    points = [Point("", px, py, style) for _, style, line in series for px, py in line]
    chart = scatter(title, points, x, y)
    lines, start = [], 0
    for name, style, line in series:
        marks = chart.points[start : start + len(line)]
        start += len(line)
        lines.append(Line(name, style, " ".join(f"{mark.x},{mark.y}" for mark in marks)))
    return Plot(chart, lines, hint)


def _run_plots(result: Result) -> list[Plot]:
    """Returns latency by percentile, and the greatest latency over time."""
    plots = []
    percent = Axis("percentile", lambda v: f"{100 * (1 - 1 / v):.5g}%", log=True)
    latency = Axis("latency in ms", text.milliseconds)
    if result.latency.count:
        curves = [("from when it was due", "due", result.latency), ("from when it was sent", "sent", result.from_send)]
        if result.plan.mode == CLOSED:
            curves = curves[1:]
        series = [(name, style, [(1 / (1 - p / 100), ms) for p, ms in each.curve]) for name, style, each in curves]
        if result.plan.slo_ms is not None:
            ends = [series[0][2][0][0], series[0][2][-1][0]]
            series.append(("SLO", "slo", [(x, result.plan.slo_ms) for x in ends]))
        hint = f"At {result.plan.rate:,.4g} requests/s offered." if result.plan.mode != CLOSED else "Closed loop."
        plots.append(_plot("Latency by percentile", series, percent, latency, hint))
    if len(result.timeline) > 2:
        worst = [(second, ms) for second, count, ms in result.timeline if count]
        axis = Axis("seconds after the start", lambda v: f"{v:g}", log=False, from_zero=True)
        series = [("greatest of a tenth of a second", "due", worst)]
        hint = "By when requests were due: a stall of the server is a slope."
        plots.append(
            _plot("Latency over time", series, axis, Axis("latency in ms", text.milliseconds, from_zero=True), hint)
        )
    return plots


def _sweep_plots(steps: Sequence[Result]) -> list[Plot]:
    """Returns latency and achieved rate by offered rate; of runs at the same rate the last one, which decided."""
    steps = list({step.plan.rate: step for step in steps if step.latency.count}.values())
    if len(steps) < 2:
        return []
    rate = Axis("offered requests per second", lambda v: f"{v:,.4g}")
    series = [
        ("p50", "sent", [(s.offered, s.latency.p50) for s in steps]),
        ("p99", "due", [(s.offered, s.latency.p99) for s in steps]),
        ("p99.9", "far", [(s.offered, s.latency.p999) for s in steps]),
    ]
    slo = steps[0].plan.slo_ms
    if slo is not None:
        series.append(("SLO", "slo", [(steps[0].offered, slo), (steps[-1].offered, slo)]))
    achieved = [
        ("achieved", "due", [(s.offered, s.achieved) for s in steps]),
        ("offered", "slo", [(s.offered, s.offered) for s in (steps[0], steps[-1])]),
    ]
    x = Axis(rate.title, rate.text, log=False, from_zero=True)
    y = Axis("requests per second", rate.text, log=False, from_zero=True)
    return [
        _plot("Latency by offered rate", series, rate, Axis("latency in ms", text.milliseconds), ""),
        _plot("Achieved by offered rate", achieved, x, y, ""),
    ]


def _facts(result: Result) -> list[tuple[str, list[tuple[str, Any]]]]:
    plan, target, server = result.plan, result.target, result.server
    loop = f"closed, {plan.concurrency} clients" if plan.mode == CLOSED else f"open, {plan.arrivals} arrivals"
    run = [
        ("server", f"{target.server} ({target.protocol})"),
        ("model", f"{target.model_name}, signature {target.signature_name}"),
        ("loop", loop),
        ("measured", f"{result.window_s:.4g} s after {plan.warmup_s:g} s of warmup"),
        ("seed", plan.seed),
        ("request", f"{result.request_bytes:,.0f} bytes, {result.rows:.4g} rows"),
        ("answer", f"{result.response_bytes:,.0f} bytes"),
        ("generator", f"{result.generator_cpu:.2f} CPUs"),
    ]
    said: list[tuple[str, Any]] = [(name, f"{value:,.6g}") for name, value in server.metrics.items()]
    if server.cpu_seconds is not None and result.server_cpu_ms is not None:
        said.insert(0, ("CPU", f"{server.cpu_seconds:.2f} s, {result.server_cpu_ms:.3g} ms a request"))
    return [("Run", run), ("What the server says", said)]
