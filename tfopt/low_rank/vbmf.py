"""How many components of a noisy matrix are signal: the global solution of empirical variational Bayes.

    Y = B A' + E, E ~ N(0, s2)      L <= M rows and columns, a = L / M, singular values g_1 >= .. >= g_L

    rank = #{h: g_h^2 > M s2 x_},   x_ = (1 + t)(1 + a / t),   t = 2.5129 sqrt(a)
    s2 = argmin sum_h psi(g_h^2 / (M s2)) + log of the noise, with psi as in `_free_energy`

Nakajima, Sugiyama, Babacan, Tomioka 2013, "Global analytic solution of fully-observed variational Bayesian matrix
factorization", JMLR 14, theorem 2 and corollary 1 (the constant 2.5129 is theirs).
"""

from __future__ import annotations

import math

import numpy as np

_TALL = 8


def rank(matrix: np.ndarray) -> int:
    """The number of components that are not noise.

    Args:
      matrix: (rows, columns), finite.

    Returns:
      From 0 (all noise) to the smaller side.
    """
    return rank_of(singular_values(matrix), max(matrix.shape))


def singular_values(matrix: np.ndarray) -> np.ndarray:
    """Of a matrix, the largest first; by its product with itself where it is far from square."""
    matrix = matrix.astype(np.float64)
    short, long = sorted(matrix.shape)
    if long <= _TALL * short:
        return np.linalg.svd(matrix, compute_uv=False)
    product = matrix.T @ matrix if matrix.shape[1] == short else matrix @ matrix.T
    return np.sqrt(np.maximum(np.linalg.eigvalsh(product)[::-1], 0))


def rank_of(singular: np.ndarray, long: int) -> int:
    """The number of components that are not noise, of a matrix given by its singular values.

    Args:
      singular: as many as its smaller side has, the largest first.
      long: its larger side.
    """
    short = len(singular)
    squares = np.asarray(singular, np.float64) ** 2
    if short < 2 or not squares[0] > 0:
        return int(short > 0 and squares[0] > 0)
    squares = squares / squares[0]
    ratio = short / long
    level = 2.5129 * math.sqrt(ratio)
    bound = (1 + level) * (1 + ratio / level)
    # The noise is no more than all of the matrix, and no less than its smallest components (corollary 1).
    most = min(math.ceil(short / (1 + ratio)) - 1, short - 1)
    high = squares.sum() / (short * long)
    low = max(squares[most] / (long * bound), squares[most:].mean() / long)
    if low <= 1e-14 * high:  # components that are exactly 0: there is no noise
        return int(np.sum(squares > 1e-14 * short * long))
    from scipy.optimize import minimize_scalar

    # In logarithms, since the noise may be orders of magnitude below the signal; a grid first: there are local minima.
    grid = np.linspace(math.log(low), math.log(max(high, low * (1 + 1e-9))), 200)
    values = [_free_energy(math.exp(point), squares, long, ratio, bound) for point in grid]
    best = int(np.argmin(values))
    found = minimize_scalar(
        lambda point: _free_energy(math.exp(point), squares, long, ratio, bound),
        bounds=(grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]),
        method="bounded",
    )
    noise = math.exp(found.x if found.fun < values[best] else grid[best])
    return int(np.sum(squares > long * noise * bound))


def _free_energy(noise: float, squares: np.ndarray, long: int, ratio: float, bound: float) -> float:
    """What s2 minimises, up to constants; x is a component over the noise, t(x) the strength of the signal in it."""
    x = squares / (long * noise)
    signal, rest = x[x > bound], x[x <= bound]
    t = 0.5 * (signal - (1 + ratio) + np.sqrt(np.maximum((signal - (1 + ratio)) ** 2 - 4 * ratio, 0)))
    rest = np.maximum(rest, 1e-300)
    kept = np.sum(signal - t) + np.sum(np.log((t + 1) / signal)) + ratio * np.sum(np.log(t / ratio + 1))
    return float(np.sum(rest - np.log(rest)) + kept)
