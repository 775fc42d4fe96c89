"""k-means of numbers, each with an importance: what a kernel's weights become when only k values are allowed.

    min over c, a of  sum_i h_i (w_i - c[a_i])^2                              (h = 1: k-means; Lloyd 1982)

On a line a cluster is an interval, so with the numbers sorted once, and the sums of h and h w up to each, a step of
Lloyd's is k look-ups; a kernel of a million weights takes a tenth of a second, where `scipy.cluster.vq.kmeans2` takes
3.5, and knows no importance. On a line the best of all clusterings can be found too (Wang and Song 2011): D[j, m], the
least error of the first m numbers in j clusters, is the least over i <= m of D[j - 1, i] + error of i..m in one.
"""

from __future__ import annotations

import numpy as np

# Ways to begin; those of Lloyd's steps are named as in TFMOT.
STARTS = ("optimal", "linear", "density", "kmeans++")

_STEPS = 2000
_BINS = 256  # into which the numbers go for the best of all clusterings


class Line:
    """Numbers in order, with the sums from which the mean and the error of any interval follow."""

    def __init__(self, values: np.ndarray, importance: np.ndarray | None = None):
        order = np.argsort(values, kind="stable")
        self.x = values[order].astype(np.float64)
        h = np.ones(len(values)) if importance is None else importance[order].astype(np.float64)
        self.sums = np.stack([np.concatenate([[0.0], np.cumsum(h * self.x**power)]) for power in range(3)])

    def edges(self, centroids: np.ndarray) -> np.ndarray:
        """The positions at which each cluster begins, and the end."""
        middle = (centroids[1:] + centroids[:-1]) / 2
        return np.concatenate([[0], np.searchsorted(self.x, middle, side="right"), [len(self.x)]])

    def error(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """sum h (w - mean)^2 of intervals of positions."""
        mass, moment, square = self.sums[:, end] - self.sums[:, start]
        return np.maximum(square - moment**2 / np.where(mass > 0, mass, 1), 0)


def kmeans(
    values: np.ndarray, count: int, start: str = "optimal", importance: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """The centroids of numbers.

    Args:
      values: finite numbers (n,).
      count: how many centroids at most.
      start: one of STARTS. "linear" spreads them evenly from the least to the greatest number, "density" so that each
        has as many numbers, "kmeans++" by chance, the farther from the others the likelier (Arthur and
        Vassilvitskii 2007); all three then go to the nearest local minimum. "optimal" is the global one.
      importance: (n,), at least 0; None is the same for all.
      seed: of "kmeans++".

    Returns:
      float64 (k,), k <= count, ascending; each is nearest to some of the numbers.
    """
    if importance is not None and not importance.sum() > 0:
        importance = None
    line = Line(values, importance)
    distinct = line.x[np.concatenate([[True], np.diff(line.x) > 0])] if len(line.x) else line.x
    if len(distinct) <= count:
        return distinct
    centroids = _begin(line, count, start, seed)
    for _ in range(_STEPS):
        edges = line.edges(centroids)
        mass, moment, _ = np.diff(line.sums[:, edges], axis=1)
        moved = np.where(mass > 0, moment / np.where(mass > 0, mass, 1), centroids)
        moved = np.sort(_refilled(line, moved, edges))
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return np.unique(centroids[np.diff(line.edges(centroids)) > 0])


def assign(values: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid of each number, in the shape and the type of `values`.

    Args:
      values: of any shape.
      centroids: ascending.
    """
    middle = (centroids[1:] + centroids[:-1]) / 2
    return centroids.astype(values.dtype)[np.searchsorted(middle, values)]


def _begin(line: Line, count: int, start: str, seed: int) -> np.ndarray:
    x = line.x
    if start == "linear":
        return np.linspace(x[0], x[-1], count)
    mass = line.sums[0]
    if start == "density":
        share = (np.arange(count) + 0.5) / count * mass[-1]
        return np.unique(x[np.minimum(np.searchsorted(mass[1:], share), len(x) - 1)])
    if start == "optimal":
        return _optimal(line, count)
    random = np.random.default_rng(seed)
    weights = np.diff(mass)
    chosen = [x[random.choice(len(x), p=weights / weights.sum())]]
    far = weights * (x - chosen[0]) ** 2
    while len(chosen) < count and far.sum() > 0:
        chosen.append(x[np.searchsorted(np.cumsum(far), random.random() * far.sum(), side="right").clip(0, len(x) - 1)])
        far = np.minimum(far, weights * (x - chosen[-1]) ** 2)
    return np.unique(chosen)


def _refilled(line: Line, centroids: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Puts centroids that no number is nearest to where the error is greatest: one quarter into that cluster."""
    empty = np.flatnonzero(np.diff(edges) == 0)
    if not len(empty):
        return centroids
    errors = line.error(edges[:-1], edges[1:])
    worst = np.argsort(-errors, kind="stable")[: len(empty)]
    moved = centroids.copy()
    for index, cluster in zip(empty, worst, strict=False):
        if errors[cluster] > 0:
            first, last = edges[cluster], edges[cluster + 1] - 1
            moved[index] = line.x[first] if line.x[first] != centroids[cluster] else line.x[last]
    return moved


def _optimal(line: Line, count: int) -> np.ndarray:
    """The best clustering whose borders are among `_BINS` positions, dense where numbers are, and where they reach."""
    n = len(line.x)
    by_rank = np.linspace(0, n, _BINS // 2 + 1).astype(np.int64)
    by_value = np.searchsorted(line.x, np.linspace(line.x[0], line.x[-1], _BINS // 2 + 1))
    borders = np.unique(np.concatenate([[0, n], by_rank, by_value]))
    size = len(borders)
    cost = line.error(borders[:, None], borders[None, :])
    cost[np.tril_indices(size, -1)] = np.inf
    least, origins = cost[0].copy(), []
    for _ in range(count - 1):
        total = least[:, None] + cost
        origin = np.argmin(total, axis=0)
        origins.append(origin)
        least = total[origin, np.arange(size)]
    ends = [size - 1]
    for origin in reversed(origins):
        ends.append(int(origin[ends[-1]]))
    positions = borders[np.unique([*ends, 0])]
    mass, moment, _ = np.diff(line.sums[:, positions], axis=1)
    return np.unique(moment[mass > 0] / mass[mass > 0])
