"""What OptimizationValidator holds models to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from tfopt import metrics
from tfopt.errors import TfoptError
from tfopt.evaluation import Evaluation
from tfopt.tfx import artifacts


@dataclasses.dataclass(frozen=True)
class Bars:
    """What a model must hold; a bar that is None is not looked at.

    Attributes:
      metrics: names of `tfopt.metrics.METRICS`, measured on labelled rows; those of `floors` are measured too.
      label: feature of the examples that holds the labels.
      max_accuracy_drop: how much worse than the original each metric may be, in the metric's own units.
      max_error: largest max|a - b| / max|a| of any output of the Serving model; values that are no floats must be
        equal.
      tflite_max_error: the same for TFLite files, which are rarely as near.
      min_agreement: smallest share of rows with the same top class, of outputs that hold class scores.
      floors: metric -> the worst value that is accepted: the least where higher is better, else the largest.
      signature: what is compared; None takes serving_default, or the first that all have.
      output: what the metrics score; None where one alone is of floats.
    """

    metrics: tuple[str, ...] = ()
    label: str = "label"
    max_accuracy_drop: float | None = None
    max_error: float | None = None
    tflite_max_error: float | None = None
    min_agreement: float | None = None
    floors: dict[str, float] = dataclasses.field(default_factory=dict)
    signature: str | None = None
    output: str | None = None

    def problems(self, evaluation: Evaluation, tflite: bool) -> list[str]:
        """Why the second and later artifacts of an evaluation do not pass; one line each."""
        own = "tflite_max_error" if tflite else "max_error"
        asked = {
            "max_accuracy_drop": self.max_accuracy_drop,
            "max_error": getattr(self, own),
            "min_agreement": self.min_agreement,
        }
        if not self.floors and all(bar is None for bar in asked.values()):
            names = ", ".join(result.path for result in evaluation.results[1:])
            return [f"{names}: no bar is for it; give {own}, max_accuracy_drop, min_agreement or floors"]
        return [line.replace(" max_error=", f" {own}=") for line in evaluation.problems(**asked, bars=self.floors)]


def parse_bars(given: str | Mapping[str, Any]) -> Bars:
    """Reads bars from a mapping or its JSON.

    Raises:
      TfoptError: a bar that there is not, or of another type; none at all; a drop without a metric.
    """
    bars = Bars(**artifacts.fields(Bars, given, "bars", {}))
    bars = dataclasses.replace(bars, metrics=tuple(dict.fromkeys([*bars.metrics, *bars.floors])))
    for metric in bars.metrics:
        if metric not in metrics.METRICS:
            raise TfoptError(f"bars: unknown metric {metric!r}; choose from {', '.join(metrics.METRICS)}")
    if bars.max_accuracy_drop is not None and not bars.metrics:
        raise TfoptError("bars: max_accuracy_drop needs metrics, such as metrics=['auc']")
    asked = (bars.max_accuracy_drop, bars.max_error, bars.tflite_max_error, bars.min_agreement)
    if not bars.floors and all(bar is None for bar in asked):
        raise TfoptError(
            "bars: none is given, so that everything would be blessed; choose from max_accuracy_drop, max_error, "
            "tflite_max_error, min_agreement, floors"
        )
    return bars
