"""A report as one HTML page that needs no other file and no network."""

from __future__ import annotations

import json
from importlib import resources
from math import inf
from typing import Any

from tfopt import report_words as words
from tfopt.report import Artifact, Report, Step, group_refusals
from tfopt.report_chart import Axis, Chart, Point, ranked, scatter

_NAMES = 6  # nodes that are named for a reason
_OPEN = 4  # reasons that show without a click
_BARS = 40  # layers of a ranked plot

_KINDS = {"saved_model": "TensorFlow SavedModel", "tflite": "TFLite"}


def draw(report: Report) -> str:
    """Returns the page; every text of the report is escaped."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(resources.files("tfopt").joinpath("report.html.j2").read_text("utf-8"))
    metrics = [a.accuracy for a in report.artifacts if a.accuracy]
    return template.render(
        report=report,
        words=words,
        title=report.model.get("path", "model"),
        headline=words.headline(report),
        tiles=_tiles(report),
        rejected=[a for a in report.artifacts if a.rejected],
        rows=_rows(report),
        metric=metrics[0].name if metrics else None,
        has_agreement=any(a.agreement is not None for a in report.artifacts),
        charts=_charts(report),
        steps=_steps(report.steps),
        signatures=_signatures(report.model),
        facts=_facts(report),
        kinds=_KINDS,
    )


def _tiles(report: Report) -> list[tuple[str, str, str]]:
    """Returns the figures on top: (what, value, remark)."""
    tiles = []
    original = report.original()
    emitted = [a for a in report.artifacts if a is not original and not a.rejected]
    if report.steps:
        first, last = report.steps[0].nodes_before, report.steps[-1].nodes_after
        tiles.append(("Nodes in the graph", f"{first:,} → {last:,}", "fewer is less to run and to load"))
    if emitted and original:
        small = min(emitted, key=lambda a: a.bytes)
        tiles.append(
            (
                "Smallest artifact",
                words.size(small.bytes),
                f"{small.name}; the original is {words.size(original.bytes)}",
            )
        )
        timed = [a for a in emitted if a.latency_ms_p50]
        if timed and original.latency_ms_p50:
            fast = min(timed, key=lambda a: a.latency_ms_p50 or 0)
            remark = f"{fast.name}; the original takes {words.milliseconds(original.latency_ms_p50)} ms"
            tiles.append(("Fastest artifact", f"{words.milliseconds(fast.latency_ms_p50)} ms", remark))
    lossless = next((a for a in emitted if a.kind == "saved_model" and a.max_rel_error is not None), None)
    if lossless:
        remark = f"{lossless.name} against the original, relative to the scale of its outputs"
        tiles.append(("Largest difference", words.error(lossless.max_rel_error), remark))
    return tiles


def _rows(report: Report) -> list[dict[str, Any]]:
    """Returns what the table of artifacts shows beside the artifacts themselves: shares and lengths of bars."""
    original = report.original() or Artifact("", "")
    largest = max((a.bytes for a in report.artifacts), default=0) or 1
    slowest = max((a.latency_ms_p50 or 0 for a in report.artifacts), default=0) or 1
    return [
        {
            "artifact": a,
            "raw": words.percent_of(a.bytes, original.bytes),
            "gzip": words.percent_of(a.gzip_bytes, original.gzip_bytes),
            "speed": words.times_as_fast(a.latency_ms_p50, original.latency_ms_p50),
            "raw_bar": 100 * a.bytes / largest,
            "gzip_bar": 100 * a.gzip_bytes / largest,
            "time_bar": 100 * (a.latency_ms_p50 or 0) / slowest,
        }
        for a in report.artifacts
    ]


def _charts(report: Report) -> list[Chart]:
    """Returns size against quality (or error, where there is none) and size against latency."""
    original = report.original()
    sized = [a for a in report.artifacts if a.bytes]
    size_axis = Axis("size on disk", words.size)
    charts = []
    metric = next((a.accuracy.name for a in sized if a.accuracy), None)
    if metric:
        points = [_point(a, a.accuracy.value, original) for a in sized if a.accuracy and a.accuracy.name == metric]
        share = metric in words.SHARES
        axis = Axis(metric, words.share if share else words.significant, highest=1 if share or metric == "auc" else inf)
        charts.append(scatter(f"Size and {metric}", points, size_axis, axis))
    else:
        points = [_point(a, a.max_rel_error, original) for a in sized if a.max_rel_error is not None]
        axis = Axis("largest difference to the original, relative", words.error, log=True)
        charts.append(scatter("Size and error", points, size_axis, axis))
    points = [_point(a, a.latency_ms_p50, original) for a in sized if a.latency_ms_p50]
    axis = Axis("median latency in ms", words.milliseconds, from_zero=True)
    charts.append(scatter("Size and latency", points, size_axis, axis))
    return [chart for chart in charts if len(chart.points) > 1]


def _point(artifact: Artifact, y: float, original: Artifact | None) -> Point:
    style = "original" if artifact is original else artifact.kind
    return Point(artifact.name, artifact.bytes, y, f"{style} rejected" if artifact.rejected else style)


def _steps(steps: list[Step]) -> list[dict[str, Any]]:
    """Returns the steps with their bars, groups and the sentence on how they ended."""
    most = max((s.nodes_before for s in steps), default=0) or 1
    views = []
    for step in steps:
        groups = [
            {
                "rule": g.rule,
                "reason": g.reason,
                "count": len(g.nodes),
                "nodes": g.nodes[:_NAMES],
                "more": max(0, len(g.nodes) - _NAMES),
            }
            for g in group_refusals(step.refused)
        ]
        bars = ranked(step.sensitivity)
        views.append(
            {
                "bars": bars[:_BARS],
                "more_bars": max(0, len(bars) - _BARS),
                "widths": sorted({bar.bits for bar in bars}),
                "step": step,
                "before": 100 * step.nodes_before / most,
                "after": 100 * step.nodes_after / most,
                "options": ", ".join(f"{name}={_text(value)}" for name, value in step.options.items()),
                "applied": sorted(step.applied.items(), key=lambda item: -item[1]),
                "groups": groups,
                "open": len(groups) <= _OPEN,
            }
        )
    return views


def _signatures(model: dict[str, Any]) -> list[dict[str, Any]]:
    def tensors(items: list[dict[str, Any]]) -> list[tuple[str, str]]:
        return [(item.get("name", ""), f"{item.get('dtype', '')} {_shape(item.get('shape'))}") for item in items]

    return [
        {"name": s.get("name", ""), "inputs": tensors(s.get("inputs", [])), "outputs": tensors(s.get("outputs", []))}
        for s in model.get("signatures", [])
    ]


def _facts(report: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns the small print, section by section: (name, text) pairs."""
    model = {name: value for name, value in report.model.items() if name != "signatures"}
    run = {"created": report.created, "seed": report.seed, "recipe": report.recipe, "verification": report.verify}
    sections = [("Model", model), ("Run", run), ("Data", report.data), ("Environment", report.environment)]
    return [
        (title, [(name.replace("_", " "), _text(value)) for name, value in facts.items() if value not in (None, "")])
        for title, facts in sections
    ]


def _shape(shape: Any) -> str:
    if shape is None:
        return "of any shape"
    return "(" + ", ".join("?" if size is None else str(size) for size in shape) + ")"


def _text(value: Any) -> str:
    """Returns any value of a report in a reader's words."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list):
        return ", ".join(_text(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_text(item)}" for name, item in value.items()) or "none"
    return value if isinstance(value, str) else json.dumps(value)
