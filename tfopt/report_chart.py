"""Plots for the HTML report: where every mark, tick and label goes, in pixels; and layers in their order, as bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 18, 52
_LETTER, _LINE = 6.6, 14.0  # size of a label's letters
_NAME = 48  # letters of the name of a layer
_LOG_FROM = 8.0  # a longer range than this factor gets a logarithmic axis


class Point(NamedTuple):
    """What to plot: a name, its values and a CSS class."""

    name: str
    x: float
    y: float
    style: str


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: with the unit.
        text: a value in words.
        log: logarithmic; by default where the range is long and all values are positive.
        from_zero: a linear axis starts at 0.
        highest: no tick above it.
    """

    title: str
    text: Callable[[float], str]
    log: bool | None = None
    from_zero: bool = False
    highest: float = math.inf


class Mark(NamedTuple):
    """A point on paper, with the place of its label."""

    point: Point
    x: float
    y: float
    label_x: float
    label_y: float
    anchor: str


class Chart(NamedTuple):
    """A plot, ready to draw; ticks are (pixel, text)."""

    title: str
    x: Axis
    y: Axis
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    points: list[Mark]


class Bar(NamedTuple):
    """One layer of a ranked plot: the end of its name, and its part of the longest bar in percent."""

    name: str
    full_name: str
    error: float
    bits: int
    bytes: int
    length: float


def ranked(layers: Sequence[Mapping[str, Any]]) -> list[Bar]:
    """Orders the layers of `Step.sensitivity`, what brings the greatest error first."""
    paths = [str(layer["node"]).split("/") for layer in layers]
    common = 0
    while paths and all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    errors = [float(layer["error"]) for layer in layers]  # "Infinity", as read from JSON, too
    longest = max((error for error in errors if math.isfinite(error)), default=0.0) or 1.0
    bars = [
        Bar(
            _end("/".join(path[common:])),
            str(layer["node"]),
            error,
            layer["bits"],
            layer["bytes"],
            100 * min(error / longest, 1.0) if error == error else 100.0,
        )
        for layer, path, error in zip(layers, paths, errors, strict=True)
    ]
    return sorted(bars, key=lambda bar: -bar.length)


def scatter(title: str, points: Sequence[Point], x: Axis, y: Axis) -> Chart:
    """Lays out a scatter plot."""
    place_x, x_ticks = _scale([p.x for p in points], x, LEFT, WIDTH - RIGHT)
    place_y, y_ticks = _scale([p.y for p in points], y, HEIGHT - BOTTOM, TOP)
    at = [(place_x(p.x), place_y(p.y)) for p in points]
    return Chart(title, x, y, x_ticks, y_ticks, _label(points, at))


def _scale(
    values: Sequence[float], axis: Axis, start: float, end: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Returns the function from values to pixels, and the ticks."""
    values = [v for v in values if math.isfinite(v)] or [0.0]
    positive = [v for v in values if v > 0]
    log = axis.log if axis.log is not None else min(values) > 0 and max(values) / min(values) > _LOG_FROM
    if log:
        # Zero has no logarithm: it is drawn at the bottom, a decade below the rest.
        least, zeros = min(positive, default=1e-9), len(positive) < len(values)
        floor = least / 10 if zeros else least
        low, high = math.log10(floor), math.log10(max(positive, default=1.0))
        margin = 0.06 * (high - low) + 0.05
        low, high = low - margin, high + margin
        ticks = [0.0] * zeros + _log_ticks(math.log10(least) - margin if zeros else low, high)

        def position(value: float) -> float:
            return (math.log10(min(max(value, floor), 10**high)) - low) / (high - low)
    else:
        low, high = 0.0 if axis.from_zero else min(values), max(values)
        margin = (high - low) * 0.12 or abs(high) * 0.05 or 1.0
        low, high = low if axis.from_zero else low - margin, high + margin
        ticks = _linear_ticks(low, high)

        def position(value: float) -> float:
            return (min(max(value, low), high) - low) / (high - low)

    def place(value: float) -> float:
        return round(start + position(value) * (end - start), 1)

    return place, [(place(tick), axis.text(tick)) for tick in ticks if tick <= axis.highest]


def _log_ticks(low: float, high: float) -> list[float]:
    """Returns 1, 2, 5 times powers of ten between 10^low and 10^high, thinned to at most seven."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**p for p in powers for f in factors if low <= math.log10(f) + p <= high]
        if len(ticks) <= 7:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 7)]


def _linear_ticks(low: float, high: float) -> list[float]:
    """Returns four to eight round values between low and high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _label(points: Sequence[Point], at: Sequence[tuple[float, float]]) -> list[Mark]:
    """Puts each label beside its point where it covers nothing, as far as there is such a place."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    marks = []
    for point, (x, y) in zip(points, at, strict=True):
        width = _LETTER * len(point.name)
        places = [
            (x + 9, y + 4, "start"),
            (x - 9, y + 4, "end"),
            *((x, y + dy, "middle") for dy in (-10, 20)),
            *((x + dx, y + dy, anchor) for dy in (-7, 15, -20, 28) for dx, anchor in ((8, "start"), (-8, "end"))),
        ]
        boxes = []
        for label_x, label_y, anchor in places:
            left = label_x - {"start": 0, "middle": width / 2, "end": width}[anchor]
            boxes.append((left, label_y - _LINE + 3, left + width, label_y + 3))
        costs = [
            sum(_overlap(box, other) for other in taken)
            + 1000 * (box[0] < LEFT or box[2] > WIDTH or box[1] < 0 or box[3] > HEIGHT - BOTTOM)
            for box in boxes
        ]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        label_x, label_y, anchor = places[best]
        marks.append(Mark(point, x, y, round(label_x, 1), round(label_y, 1), anchor))
    return marks


def _end(name: str) -> str:
    return name if len(name) <= _NAME else "..." + name[3 - _NAME :]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0
