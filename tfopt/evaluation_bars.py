"""Bars: what the artifacts of an evaluation must reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tfopt import metrics as known
from tfopt.errors import TfoptError
from tfopt.report import Metric

if TYPE_CHECKING:
    from tfopt.evaluation import Result


def check(
    artifacts: int,
    metrics: Sequence[str],
    *,
    max_accuracy_drop: float | None = None,
    max_error: float | None = None,
    min_agreement: float | None = None,
    bars: Mapping[str, float] | None = None,
) -> None:
    """Raises where a bar is on what is not measured; see `Evaluation.problems`.

    Args:
      artifacts: how many there are.
      metrics: names of those that are measured.
    """
    asked = {"max_accuracy_drop": max_accuracy_drop, "max_error": max_error, "min_agreement": min_agreement}
    for name, bar in asked.items():
        if bar is not None and artifacts < 2:
            raise TfoptError(f"{name}={bar:g} needs a second artifact, to compare with the first")
    if max_accuracy_drop is not None and not metrics:
        raise TfoptError(f"max_accuracy_drop={max_accuracy_drop:g} needs a metric: nothing is scored")
    for metric, bar in (bars or {}).items():
        if metric not in metrics:
            raise TfoptError(f"the bar {metric}={bar:g} is on what is not measured: {', '.join(metrics) or 'nothing'}")


def problems(
    results: Sequence[Result],
    *,
    max_accuracy_drop: float | None,
    max_error: float | None,
    min_agreement: float | None,
    bars: Mapping[str, float] | None,
) -> list[str]:
    """Why artifacts do not pass, one line each; see `Evaluation.problems`."""
    check(
        len(results),
        list(results[0].metrics),
        max_accuracy_drop=max_accuracy_drop,
        max_error=max_error,
        min_agreement=min_agreement,
        bars=bars,
    )
    found: list[str] = []
    for result in results[1:] or results:
        lines = [result.failure] if result.failure else []
        if not lines:
            lines += _of_metrics(results[0], result, max_accuracy_drop, bars or {})
            lines += _of_outputs(result, max_error, min_agreement)
        found += [line if line.startswith(f"{result.path}: ") else f"{result.path}: {line}" for line in lines]
    return found


def _of_metrics(first: Result, result: Result, most: float | None, bars: Mapping[str, float]) -> list[str]:
    found = []
    for name, metric in result.metrics.items():
        lost = known.drop(first.metrics[name], metric)
        if most is not None and not lost <= most:
            better = known.HIGHER_IS_BETTER[name]
            found.append(f"{name} {'falls' if better else 'rises'} by {lost:.6g}, more than max_accuracy_drop={most:g}")
        if name in bars and not _passes(metric, bars[name]):
            found.append(f"{name} is {metric.value:.6g}, worse than {bars[name]:g}")
    return found


def _of_outputs(result: Result, most: float | None, least: float | None) -> list[str]:
    apart, found = result.equivalence, []
    if apart is None:
        return []
    if most is not None and not apart.max_error <= most:
        found.append(f"the error is {apart.max_error:.3g}, more than max_error={most:g}")
    if least is not None and apart.agreement is None:
        found.append("min_agreement: no output holds class scores, (rows, 2 classes or more)")
    elif least is not None and apart.agreement is not None and apart.agreement < least:
        found.append(f"top-1 agreement is {apart.agreement:.4f}, less than min_agreement={least:g}")
    return found


def _passes(metric: Metric, bar: float) -> bool:
    return metric.value >= bar if known.HIGHER_IS_BETTER[metric.name] else metric.value <= bar
