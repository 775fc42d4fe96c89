"""A report as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tfopt import report_words as words
from tfopt.report import Artifact, Report, Step, group_refusals
from tfopt.report_chart import ranked

WIDTH = 120
_RULES = 12  # rules of a step that are named
_REASONS = 5  # refusals of a step that are spelt out
_NAMES = 3  # nodes that are named for each
_LAYERS = 5  # most sensitive layers that are named


def draw(report: Report) -> str:
    """Returns the warnings, the steps and the artifacts of a run."""
    title = (
        f"{report.model.get('path', 'model')}  recipe {report.recipe.get('name', words.UNKNOWN)}  seed {report.seed}"
    )
    lines = [*_wrap(title), *(line for sentence in words.headline(report) for line in _wrap(sentence))]
    lines += [line for warning in report.warnings for line in _wrap(f"WARNING: {warning}", "  ")]
    if report.steps:
        lines += ["", *_steps(report.steps)]
    if report.artifacts:
        lines += ["", *_artifacts(report)]
    if report.verify:
        lines += _wrap(f"Verified: {report.verify}")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _steps(steps: Sequence[Step]) -> list[str]:
    rows = [["step", "nodes", "weights", "applied", "refused", "error", "status", "time"]]
    for s in steps:
        weights = words.size(s.weight_bytes_after)
        if s.weight_bytes_before != s.weight_bytes_after:
            weights = f"{words.size(s.weight_bytes_before)} -> {weights}"
        rows.append(
            [
                _clip(s.name, 24),
                f"{s.nodes_before} -> {s.nodes_after}",
                weights,
                str(sum(s.applied.values())),
                str(len(s.refused)),
                words.error(s.max_error),
                s.status,
                f"{s.seconds:.1f} s",
            ]
        )
    lines = _columns(rows, left=(0, 6))
    out = lines[:1]
    for step, line in zip(steps, lines[1:], strict=True):
        out += [line, *_details(step)]
    return out


def _details(step: Step) -> list[str]:
    """Returns what a step did, refused and noted, indented under its row."""
    lines = []
    if step.applied:
        most = sorted(step.applied.items(), key=lambda item: -item[1])
        more = f", and {len(most) - _RULES} more" if len(most) > _RULES else ""
        lines += _wrap("applied: " + ", ".join(f"{rule} {n}" for rule, n in most[:_RULES]) + more, "    ")
    groups = group_refusals(step.refused)
    for group in groups[:_REASONS]:
        names = ", ".join(group.nodes[:_NAMES]) + (", ..." if len(group.nodes) > _NAMES else "")
        lines += _wrap(f"refused {len(group.nodes)}x {group.rule}: {group.reason} ({names})", "    ")
    if len(groups) > _REASONS:
        lines += _wrap(f"and {len(groups) - _REASONS} more reasons, which the HTML report lists", "    ")
    lines += [line for note in step.notes for line in _wrap(f"note: {note}", "    ")]
    bars = ranked(step.sensitivity)
    if bars:
        lines.append("    error of the outputs when this layer alone has 4 bits, bits and bytes chosen:")
        lines += [
            f"    {words.share(bar.error):>8}  {words.bits(bar.bits):>6}  {words.size(bar.bytes):>8}  {bar.name}"
            for bar in bars[:_LAYERS]
        ]
    if len(bars) > _LAYERS:
        lines.append(f"    and {len(bars) - _LAYERS} more layers, which the HTML report draws")
    return lines


def _artifacts(report: Report) -> list[str]:
    original = report.original() or Artifact("", "")
    metrics = [a.accuracy for a in report.artifacts if a.accuracy]
    samples = {metric.samples for metric in metrics}
    # Without labels, the agreement with the original is the next best thing to know.
    name = "\n" + metrics[0].name if metrics else "top-1\nagreement"
    if len(samples) == 1:
        name = f"{metrics[0].name}\nn={samples.copy().pop()}"
    head = [
        "\nartifact",
        "raw\nbytes",
        "of\norig.",
        "gzip\nbytes",
        "of\norig.",
        "\nparams",
        "\nFLOPs",
        "relative\nerror",
    ]
    rows = [[*head, name, "p50\nms", "\nspeed", "p95\nms", "peak\nmemory"]]
    for a in report.artifacts:
        value = words.quality(a.accuracy) if metrics else words.share(a.agreement)
        if len(samples) > 1 and a.accuracy:
            value += f" n={a.accuracy.samples}"
        rows.append(
            [
                _clip(a.name, 14),
                words.size(a.bytes or None),
                words.percent_of(a.bytes, original.bytes),
                words.size(a.gzip_bytes or None),
                words.percent_of(a.gzip_bytes, original.gzip_bytes),
                words.count(a.parameters),
                words.count(a.flops),
                words.error(a.max_rel_error),
                value,
                words.milliseconds(a.latency_ms_p50),
                words.times_as_fast(a.latency_ms_p50, original.latency_ms_p50),
                words.milliseconds(a.latency_ms_p95),
                words.size(a.peak_memory_bytes),
            ]
        )
    heads = [[cell.split("\n")[line] for cell in rows[0]] for line in (0, 1)]
    lines = _columns([*heads, *rows[1:]], left=(0,))
    out = lines[:2]
    for artifact, line in zip(report.artifacts, lines[2:], strict=True):
        out.append(line)
        if artifact.rejected:
            out += _wrap(f"REJECTED: {artifact.rejected}", "    ")
        out += _wrap(contents, "    ") if (contents := words.weights(artifact)) else []
        out += [line for note in artifact.notes for line in _wrap(f"note: {note}", "    ")]
    return out


def _columns(rows: Sequence[Sequence[str]], left: Sequence[int]) -> list[str]:
    """Aligns cells to the right, those of the columns in `left` to the left; narrows the gaps to fit the width."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    gap = "  " if sum(widths) + 2 * (len(widths) - 1) <= WIDTH else " "
    return [
        gap.join(
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _wrap(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ") or [indent]


def _clip(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
