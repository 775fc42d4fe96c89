"""An evaluation as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from tfopt import report_words as words
from tfopt.data import STRING
from tfopt.equivalence import Output
from tfopt.evaluation import Evaluation, Result, letters
from tfopt.report import Metric

WIDTH = 120


def draw(found: Evaluation, worst: int = 0) -> str:
    """Returns a table of the artifacts.

    Args:
      found: what to show.
      worst: how many of the rows that differ most are named for each output.
    """
    first, *others = found.results
    head = ["rows", *(cell for name in first.metrics for cell in (name, "against A"))]
    rows = [[*head, *(["max error", "agreement"] if others else [])]]
    for result in found.results:
        cells = [f"{found.rows:,}"]
        for name, reference in first.metrics.items():
            cells += _metric(result.metrics.get(name), reference, result is first)
        apart = result.equivalence
        if others:
            cells += [words.error(apart.max_error), words.share(apart.agreement)] if apart else [words.UNKNOWN] * 2
        rows.append(cells)
    figures = _columns(rows)
    names = letters(len(found.results))
    room = max(WIDTH - len(figures[0]) - len(names[-1]) - 4, 12)
    paths = ["artifact", *(_shortened(result.path, room) for result in found.results)]
    widest = max(map(len, paths))
    lines = [f"{found.rows:,} row{'s' * (found.rows != 1)} of {found.source}", ""]
    for letter, path, line in zip(["", *names], paths, figures, strict=True):
        lines.append(f"{letter:{len(names[-1])}}  {path:{widest}}  {line}")
    for letter, result in zip(names, found.results, strict=True):
        lines += _details(letter, result, worst)
    if found.notes:
        lines += ["", *(line for note in found.notes for line in _wrap(f"note: {note}", ""))]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _details(letter: str, result: Result, worst: int) -> list[str]:
    """Counts, outputs and their worst rows, or why there are none."""
    lines = []
    if result.failure:
        return _wrap(f"{letter}: FAILED: {result.failure}", "")
    for name, counts in result.counts.items():
        listed = ", ".join(f"{what} {count:,}" for what, count in counts.items() if what != "rows")
        lines += _wrap(f"{letter}: {name}: {listed}", "") if listed else []
    for name, output in result.equivalence.outputs.items() if result.equivalence else ():
        problem = output.broken(name) if output.missing or output.changed else None
        text = problem or f"output {name!r} {_dtype(output)}: {output.unequal:,} of {output.elements:,} values differ"
        if not problem and output.unequal and output.distance:
            text += f", max error {words.error(output.absolute)}, {words.error(output.relative)} of its scale"
        if output.not_finite:
            text += f"; {output.not_finite:,} are not finite on one side alone"
        lines += _wrap(f"{letter}: {text}", "")
        named = ", ".join(f"{row:,} ({words.error(error)})" for error, row in output.worst[:worst])
        lines += _wrap(f"worst rows (error): {named}", "     ") if named else []
    return ["", *lines] if lines else []


def _dtype(output: Output) -> str:
    return STRING if output.dtype == "object" else output.dtype


def _metric(metric: Metric | None, reference: Metric, is_first: bool) -> list[str]:
    if metric is None:
        return [words.UNKNOWN, words.UNKNOWN]
    change = "" if is_first else "the same" if metric.value == reference.value else None
    return [f"{metric.value:.6g}", f"{metric.value - reference.value:+.3g}" if change is None else change]


def _shortened(path: str, length: int) -> str:
    """The end of a path tells more than its beginning."""
    return path if len(path) <= length else "..." + path[-length + 3 :]


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(map(str.rjust, row, widths)) for row in rows]


def _wrap(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + "   ") or [indent]
