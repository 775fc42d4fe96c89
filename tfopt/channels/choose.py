"""Which channels go: as many as a target asks for, those of least worth, in numbers that kernels like.

uniform   every group loses the same share
global    the next to go are those that cost least worth for the multiply-accumulates (parameters) that they save
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping

import numpy as np

from tfopt.channels.groups import Channels, Group

_HALVINGS = 30


def unit(group: Group, round_to: int) -> int:
    """How many channels of a group go at once: `round_to` places of an axis, fewer where the group is small."""
    step = max(1, round_to // group.width)
    while step > 1 and len(group.classes) < 3 * step:
        step //= 2
    return step


def kept_counts(group: Group, round_to: int, max_share: float) -> list[int]:
    """The numbers of channels that may be left of a group, from all to the fewest."""
    size, step = len(group.classes), unit(group, round_to)
    least = max(1, int(np.ceil(size * (1 - max_share) / step)) * step)
    return [size, *(count for count in range((size - 1) // step * step, 0, -step) if count >= least)]


def ranked(group: Group, worth: np.ndarray) -> np.ndarray:
    """The classes of a group, the least worth first."""
    return group.classes[np.argsort(worth[group.classes], kind="stable")]


def uniform(
    channels: Channels, worth: np.ndarray, fits: Callable[[np.ndarray], bool], round_to: int, max_share: float
) -> np.ndarray:
    """The mask over classes with the smallest share that fits; that of the largest where none does."""
    order = [ranked(group, worth) for group in channels.groups]
    choices = [kept_counts(group, round_to, max_share) for group in channels.groups]

    def counts_at(share: float) -> list[int]:
        wanted = [len(classes) * (1 - share) for classes in order]
        return [min(known, key=lambda n: (abs(n - most), n)) for known, most in zip(choices, wanted, strict=True)]

    def mask(counts: list[int]) -> np.ndarray:
        kept = channels.everything()
        for classes, count in zip(order, counts, strict=True):
            kept[classes[: len(classes) - count]] = False
        return kept

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(mask(counts_at(middle))) else (middle, high)
    counts = counts_at(high)
    while True:  # steps are coarse: layers that lost most take back what fits
        for index in sorted(range(len(order)), key=lambda index: counts[index] / len(order[index])):
            more = [count for count in choices[index] if count > counts[index]]
            tried = [*counts[:index], more[-1], *counts[index + 1 :]] if more else counts
            if more and fits(mask(tried)):
                counts = tried
                break
        else:
            break
    return mask(counts)


def by_worth(
    channels: Channels,
    worth: np.ndarray,
    cost: Callable[[np.ndarray], float],
    target: float,
    round_to: int,
    max_share: float,
    scale: Mapping[str, float] | None = None,
) -> np.ndarray:
    """The mask over classes that a greedy choice ends with once `cost` is at most `target`.

    Args:
      channels: the model's.
      worth: of each class; sums of these are compared across groups.
      cost: of a mask.
      target: where to stop.
      round_to, max_share: see `unit` and `kept_counts`.
      scale: name of a group -> what its worth is multiplied by.
    """
    kept = channels.everything()
    order = [ranked(group, worth) for group in channels.groups]
    choices = [kept_counts(group, round_to, max_share) for group in channels.groups]
    place = [0] * len(order)
    now = cost(kept)

    def offer(index: int) -> tuple[float, int, float] | None:
        """(worth lost per cost saved, group, cost after) of the next step of a group."""
        if place[index] + 1 >= len(choices[index]):
            return None
        going = _going(index)
        tried = kept.copy()
        tried[going] = False
        after = cost(tried)
        if after >= now:
            return None
        factor = (scale or {}).get(channels.groups[index].name, 1.0)
        return factor * float(worth[going].sum()) / (now - after), index, after

    def _going(index: int, ahead: int = 0) -> np.ndarray:
        classes, counts, at = order[index], choices[index], place[index] + ahead
        return classes[len(classes) - counts[at] : len(classes) - counts[at + 1]]

    def _last(index: int) -> float:
        return float(worth[_going(index, -1)].sum()) if place[index] else 0.0

    offers = [found for index in range(len(order)) if (found := offer(index))]
    heapq.heapify(offers)
    while now > target and offers:
        _, index, _ = heapq.heappop(offers)
        current = offer(index)  # what it saves has changed as others went
        if current is None:
            continue
        if offers and current[0] > offers[0][0] * (1 + 1e-9):
            heapq.heappush(offers, current)
            continue
        if current[2] <= target:  # the last step: of all that reach the target, the one that costs least
            ends = [found for other in range(len(order)) if (found := offer(other)) and found[2] <= target]
            index = min(ends, key=lambda found: found[0] * (now - found[2]))[1]
        kept[_going(index)] = False
        place[index] += 1
        now = cost(kept)
        following = offer(index)
        if following:
            heapq.heappush(offers, following)
    for index in sorted(range(len(order)), key=lambda index: -_last(index)):  # the last step may have gone too far
        while place[index]:
            tried = kept.copy()
            tried[_going(index, -1)] = True
            if cost(tried) > target:
                break
            kept = tried
            place[index] -= 1
    return kept
