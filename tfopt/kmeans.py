"""k-means of numbers, each with an importance: what a kernel's weights become when only k values are allowed.

    min over c, a of  sum_i h_i (w_i - c[a_i])^2 + l sum_i -log2 p[a_i]       (h = 1, l = 0: k-means; Lloyd 1982)

The second sum is what an entropy coder takes for the indices, p[j] being the share of the numbers in cluster j: with
l > 0 clusters of few numbers hand some of theirs to their neighbours (Chou, Lookabaugh and Gray 1989; of weights: Choi,
El-Khamy and Lee 2017). The border of two clusters is then where both cost the same.

On a line a cluster is an interval, so with the numbers sorted once, and the sums of h and h w up to each, a step of
Lloyd's is k look-ups; a kernel of a million weights takes a tenth of a second, where `scipy.cluster.vq.kmeans2` takes
3.5, and knows no importance. On a line the best of all clusterings can be found too (Wang and Song 2011): D[j, m], the
least error of the first m numbers in j clusters, is the least over i <= m of D[j - 1, i] + error of i..m in one.
"""

from __future__ import annotations

from typing import NamedTuple

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

    def edges(self, borders: np.ndarray) -> np.ndarray:
        """The positions at which each cluster begins, and the end."""
        return np.concatenate([[0], np.searchsorted(self.x, borders, side="right"), [len(self.x)]])

    def means(self, edges: np.ndarray, empty: np.ndarray) -> np.ndarray:
        """The mean of each interval between edges; `empty` where there is nothing in it."""
        mass, moment, _ = np.diff(self.sums[:, edges], axis=1)
        return np.where(mass > 0, moment / np.where(mass > 0, mass, 1), empty)

    def error(self, start: np.ndarray, end: np.ndarray) -> np.ndarray:
        """sum h (w - mean)^2 of intervals of positions."""
        mass, moment, square = self.sums[:, end] - self.sums[:, start]
        return np.maximum(square - moment**2 / np.where(mass > 0, mass, 1), 0)


class Codebook(NamedTuple):
    """What numbers become.

    Attributes:
      centroids: float64 (k,), ascending.
      borders: between them, float64 (k - 1,).
    """

    centroids: np.ndarray
    borders: np.ndarray

    def assign(self, values: np.ndarray) -> np.ndarray:
        """The centroid of each number, in the shape and the type of `values`."""
        return self.centroids.astype(values.dtype)[np.searchsorted(self.borders, values)]


def kmeans(
    values: np.ndarray,
    count: int,
    start: str = "optimal",
    importance: np.ndarray | None = None,
    rate: float = 0.0,
    seed: int = 0,
) -> Codebook:
    """The centroids of numbers.

    Args:
      values: finite numbers (n,).
      count: how many centroids at most.
      start: one of STARTS. "linear" spreads them evenly from the least to the greatest number, "density" so that each
        has as many numbers, "kmeans++" by chance, the farther from the others the likelier (Arthur and
        Vassilvitskii 2007); all three then go to the nearest local minimum. "optimal" is the global one.
      importance: (n,), at least 0; None is the same for all.
      rate: how much a bit of each index is worth, as a share of the error that remains without it: the l above.
      seed: of "kmeans++".

    Returns:
      At most `count` centroids, each of which some of the numbers become.
    """
    if importance is not None and not importance.sum() > 0:
        importance = None
    line = Line(values, importance)
    distinct = line.x[np.concatenate([[True], np.diff(line.x) > 0])] if len(line.x) else line.x
    if len(distinct) <= count:
        return Codebook(distinct, _middle(distinct))
    centroids = _begin(line, count, start, seed)
    for _ in range(_STEPS):
        edges = line.edges(_middle(centroids))
        moved = np.sort(_refilled(line, line.means(edges, centroids), edges))
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    centroids = np.unique(centroids[np.diff(line.edges(_middle(centroids))) > 0])
    return _coded(line, centroids, rate) if rate else Codebook(centroids, _middle(centroids))


def _coded(line: Line, centroids: np.ndarray, rate: float) -> Codebook:
    """Goes on from k-means with the length of the code; importance counts there by its mean."""
    edges = line.edges(_middle(centroids))
    weight = rate * line.error(edges[:-1], edges[1:]).sum() / line.sums[0, -1]
    borders = _middle(centroids)
    for _ in range(_STEPS):
        edges = line.edges(borders)
        kept = np.diff(edges) > 0
        edges = np.unique(edges)
        moved = line.means(edges, centroids[kept])
        bits = -np.log2(np.diff(edges) / len(line.x))
        before = borders
        moved, borders = _cheapest(moved, bits, weight)
        if np.array_equal(before, borders):
            break
        centroids = moved
    return Codebook(moved, borders)


def _cheapest(centroids: np.ndarray, bits: np.ndarray, weight: float) -> tuple[np.ndarray, np.ndarray]:
    """The centroids that are cheapest for some number, and where one becomes cheaper than the one before.

    (x - c)^2 + weight bits is, but for x^2, a straight line of x: this is the lower envelope of these lines.
    """
    chosen: list[int] = []
    borders: list[float] = []
    for j, (c, code) in enumerate(zip(centroids, bits, strict=True)):
        while chosen:
            i = chosen[-1]
            border = (c + centroids[i]) / 2 + weight * (code - bits[i]) / (2 * (c - centroids[i]))
            if not borders or border > borders[-1]:
                borders.append(border)
                break
            chosen.pop()
            borders.pop()
        chosen.append(j)
    return centroids[chosen], np.array(borders)


def _middle(centroids: np.ndarray) -> np.ndarray:
    return (centroids[1:] + centroids[:-1]) / 2


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
