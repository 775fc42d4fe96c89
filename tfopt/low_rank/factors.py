"""Factors of a kernel W[x, y, i, o]; a matrix is a kernel with x = y = 1, its rows are the inputs i.

    svd      W[xyi, o]    = sum_r   U[xyi, r] V[r, o]
    tucker   W[x, y, i, o] = sum_rs A[i, r] C[x, y, r, s] B[s, o]                       (Kim et al. 2016)
    cp       W[x, y, i, o] = sum_r  A[i, r] P[x, r] Q[y, r] B[r, o]                     (Lebedev et al. 2015)
    spatial  W[x, y, i, o] = sum_r  P[x, i, r] Q[y, r, o]                               (Jaderberg et al. 2014)

Without rows they make ||W - W'||_F small; with the second moment G = E[p p'] of the patches p that the layer reads they
make the error of its outputs small:

    E ||W' p - W p||^2 = tr (W' - W)' G (W' - W) = ||R (W' - W)||_F^2       G = R' R, W as a matrix [xyi, o]

For svd that is solved exactly: V holds the right singular vectors of R W, U = W V' (Chen et al. 2021, Drone). The other
methods work on W with its input channels mixed by the root of their own second moment, and the last factor is then the
least-squares fit to the outputs of the layer.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

METHODS = ("svd", "tucker", "cp", "spatial")
_TUCKER_SWEEPS = 10  # of the alternating least squares
_CP_SWEEPS = 50
_CP_QUICK = 25
# Matrices with so many times more rows than columns, and large ones, are decomposed by their product with themselves:
# many times faster, and exact to 1e-8 of the largest singular value.
_TALL = 8
_LARGE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is known of the inputs of a layer.

    Attributes:
      root: R (d, d) with R'R = G, over patches [x, y, i]; or (d,) where G is diagonal, as for lookups.
      mix: R (i, i) of the input channels alone.
      mean: (d,) of the patches; of lookups how often each row is looked up.
    """

    root: np.ndarray
    mix: np.ndarray
    mean: np.ndarray


@dataclasses.dataclass(frozen=True)
class Factors:
    """A kernel as a product.

    Attributes:
      method: one of METHODS.
      ranks: (r, s) for tucker, (r,) for the others.
      arrays: float64, in the order and with the axes that the head of this file shows.
    """

    method: str
    ranks: tuple[int, ...]
    arrays: tuple[np.ndarray, ...]

    def kernel(self, shape: tuple[int, ...]) -> np.ndarray:
        """The product, as a kernel of this shape (x, y, i, o)."""
        return (self.features(shape) @ self.last()).reshape(shape)

    def features(self, shape: tuple[int, ...]) -> np.ndarray:
        """All factors but the last as one matrix, from patches [x, y, i] to what the last factor reads."""
        patch = math.prod(shape[:3])
        if self.method == "svd":
            return self.arrays[0].reshape(patch, -1)
        if self.method == "tucker":
            return np.einsum("ir,xyrs->xyis", *self.arrays[:2], optimize=True).reshape(patch, -1)
        if self.method == "cp":
            return np.einsum("ir,xr,yr->xyir", *self.arrays[:3]).reshape(patch, -1)
        wide = np.einsum("xir,yz->xyizr", self.arrays[0], np.eye(shape[1]))
        return wide.reshape(patch, -1)

    def last(self) -> np.ndarray:
        """The last factor as a matrix with the outputs as columns."""
        return self.arrays[-1].reshape(-1, self.arrays[-1].shape[-1])


def decompose(
    kernel: np.ndarray, method: str, ranks: tuple[int, ...], moment: Moment | None = None, quick: bool = False
) -> Factors:
    """Factors of given ranks.

    Args:
      kernel: (x, y, i, o).
      method: one of METHODS.
      ranks: see `Factors`.
      moment: of the inputs of the layer; None where nothing is known of them.
      quick: whether tucker may stop at the truncated higher-order SVD, where its alternating least squares start, and
        cp after a few sweeps of them.

    Returns:
      The factors, of balanced norms.
    """
    kernel = kernel.astype(np.float64)
    if method == "svd":
        arrays = _svd(_matrix(kernel), ranks[0], None if moment is None else moment.root)
        return _balanced(Factors(method, ranks, arrays))
    mixed = kernel if moment is None else np.einsum("ji,xyio->xyjo", moment.mix, kernel, optimize=True)
    compute = (_QUICK if quick else _ALTERNATING)[method]
    plain = Factors(method, ranks, compute(mixed, ranks))
    if moment is None:
        return _balanced(plain)
    first = plain.arrays[0]
    axis = 1 if method == "spatial" else 0
    first = np.moveaxis(first, axis, 0)
    first = np.linalg.solve(moment.mix, first.reshape(len(first), -1)).reshape(first.shape)
    first = np.moveaxis(first, 0, axis)
    return _balanced(_fitted(Factors(method, ranks, (first, *plain.arrays[1:])), kernel, moment))


def error(kernel: np.ndarray, factors: Factors, moment: Moment | None = None) -> float:
    """Noise over signal: E ||W' p - W p||^2 over the variance of W p, or ||W' - W||^2 over ||W||^2."""
    noise = _matrix(factors.kernel(kernel.shape)) - _matrix(kernel.astype(np.float64))
    noise = noise if moment is None else rooted(moment.root, noise)
    return float(np.sum(noise**2)) / signal(kernel, moment)


def signal(kernel: np.ndarray, moment: Moment | None = None) -> float:
    """The variance of what a layer gives; ||W||^2 where nothing is known of its inputs. Never 0."""
    matrix = _matrix(kernel.astype(np.float64))
    if moment is None:
        return max(float(np.sum(matrix**2)), 1e-300)
    energy = float(np.sum(rooted(moment.root, matrix) ** 2))
    # What all rows have in common says nothing. A layer that gives the same always has some signal still.
    return max(energy - float(np.sum((moment.mean @ matrix) ** 2)), 1e-6 * energy, 1e-300)


def spectrum(kernel: np.ndarray, method: str, moment: Moment | None = None) -> np.ndarray:
    """Squared singular values of the matrix that `svd` or `spatial` truncates, the largest first."""
    kernel = kernel.astype(np.float64)
    if method == "svd":
        matrix = _matrix(kernel)
        matrix = matrix if moment is None else rooted(moment.root, matrix)
    else:
        mixed = kernel if moment is None else np.einsum("ji,xyio->xyjo", moment.mix, kernel, optimize=True)
        matrix = _unfolded(mixed)
    return _right(matrix)[0] ** 2


def tucker_energy(kernel: np.ndarray, moment: Moment | None = None) -> np.ndarray:
    """Share of ||W||^2 that the truncated higher-order SVD keeps, for all ranks at once.

    Returns:
      (i + 1, o + 1): at [r, s] what ranks r and s keep.
    """
    kernel = kernel.astype(np.float64)
    mixed = kernel if moment is None else np.einsum("ji,xyio->xyjo", moment.mix, kernel, optimize=True)
    inner, outer = (
        _right(np.moveaxis(mixed, axis, -1).reshape(-1, mixed.shape[axis]), full=True)[1] for axis in (2, 3)
    )
    core = np.einsum("xyio,ri,so->xyrs", mixed, inner, outer, optimize=True)
    energy = np.zeros((kernel.shape[2] + 1, kernel.shape[3] + 1))
    energy[1:, 1:] = np.sum(core**2, axis=(0, 1)).cumsum(axis=0).cumsum(axis=1)
    return energy / max(energy[-1, -1], 1e-300)


def rooted(root: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """R M, where R may be given by its diagonal."""
    return root[:, None] * matrix if root.ndim == 1 else root @ matrix


def _matrix(kernel: np.ndarray) -> np.ndarray:
    return kernel.reshape(-1, kernel.shape[-1])


def _unfolded(kernel: np.ndarray) -> np.ndarray:
    """[x i, y o], which the spatial split truncates."""
    x, y, i, o = kernel.shape
    return kernel.transpose(0, 2, 1, 3).reshape(x * i, y * o)


_Svd = tuple[np.ndarray, np.ndarray, np.ndarray]


def _right(matrix: np.ndarray, full: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and right singular vectors (as rows), the largest first; `full`: as many as columns."""
    rows, columns = matrix.shape
    if full or rows > _TALL * columns or (matrix.size > _LARGE and rows >= columns):
        squares, vectors = np.linalg.eigh(matrix.T @ matrix)
        return np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1].T
    if matrix.size > _LARGE:
        return _left(matrix)[1:]
    return np.linalg.svd(matrix, full_matrices=False)[1:]


def _svd(matrix: np.ndarray, rank: int, root: np.ndarray | None) -> tuple[np.ndarray, ...]:
    vectors = _right(matrix if root is None else rooted(root, matrix))[1][:rank]
    return matrix @ vectors.T, vectors


def _spatial(kernel: np.ndarray, ranks: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    x, y, i, o = kernel.shape
    first, second = _svd(_unfolded(kernel), ranks[0], None)
    return first.reshape(x, i, -1), second.reshape(-1, y, o).transpose(1, 0, 2)


def _truncated(kernel: np.ndarray, ranks: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """The higher-order SVD of a kernel, of which the first components are kept."""
    sides = (np.moveaxis(kernel, axis, -1).reshape(-1, kernel.shape[axis]) for axis in (2, 3))
    inner, outer = (_right(side, full=True)[1][:rank] for side, rank in zip(sides, ranks, strict=True))
    return inner.T, np.einsum("xyio,ri,so->xyrs", kernel, inner, outer, optimize=True), outer


def _tucker(kernel: np.ndarray, ranks: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    from tensorly.decomposition import partial_tucker

    (core, (inner, outer)), _ = partial_tucker(
        kernel, list(ranks), modes=[2, 3], n_iter_max=_TUCKER_SWEEPS, svd=_left, random_state=0
    )
    return inner, core, outer.T


def _cp(kernel: np.ndarray, ranks: tuple[int, ...], sweeps: int = _CP_SWEEPS) -> tuple[np.ndarray, ...]:
    from tensorly.decomposition import parafac

    found = parafac(kernel, ranks[0], n_iter_max=sweeps, tol=1e-6, svd=_left, random_state=0)
    high, wide, inner, outer = found.factors
    return inner * found.weights, high, wide, outer.T


def _left(matrix: np.ndarray, n_eigenvecs: int | None = None, **_: object) -> _Svd:
    """Singular values and vectors of a matrix with few rows, such as an unfolding; tensorly's own function for it takes
    the larger of the two products of a matrix with itself.
    """
    squares, vectors = np.linalg.eigh(matrix @ matrix.T)
    values, vectors = np.sqrt(np.maximum(squares[::-1], 0)), vectors[:, ::-1]
    right = (vectors.T @ matrix) / np.maximum(values, 1e-9 * values[0] + 1e-30)[:, None]
    return vectors[:, :n_eigenvecs], values[:n_eigenvecs], right[:n_eigenvecs]


_Method = Callable[[np.ndarray, tuple[int, ...]], tuple[np.ndarray, ...]]
_ALTERNATING: dict[str, _Method] = {
    "tucker": _tucker,
    "cp": _cp,
    "spatial": _spatial,
}
_QUICK: dict[str, _Method] = {**_ALTERNATING, "tucker": _truncated, "cp": functools.partial(_cp, sweeps=_CP_QUICK)}


def _fitted(factors: Factors, kernel: np.ndarray, moment: Moment) -> Factors:
    """The same with the last factor that fits the outputs of the layer best."""
    features = rooted(moment.root, factors.features(kernel.shape))
    wanted = rooted(moment.root, _matrix(kernel))
    last, *_ = np.linalg.lstsq(features, wanted, rcond=1e-10)
    last = last.reshape(factors.arrays[-1].shape)
    return dataclasses.replace(factors, arrays=(*factors.arrays[:-1], last))


def _balanced(factors: Factors) -> Factors:
    """The same product with factors of like norms at each rank: easier to train, and to quantize."""
    arrays = list(factors.arrays)
    if factors.method == "cp":
        arrays[-1] = arrays[-1].T
        norms = [np.maximum(np.linalg.norm(array, axis=0), 1e-30) for array in arrays]
        mean = np.exp(np.mean(np.log(norms), axis=0))
        arrays = [array * (mean / norm) for array, norm in zip(arrays, norms, strict=True)]
        arrays[-1] = arrays[-1].T
    for left in range(len(arrays) - 1) if factors.method != "cp" else ():
        # The rank is the last axis of the one, and the last but one of the other.
        one, two = arrays[left], np.moveaxis(arrays[left + 1], -2, 0)
        norms = [
            np.linalg.norm(one.reshape(-1, one.shape[-1]), axis=0),
            np.linalg.norm(two.reshape(len(two), -1), axis=1),
        ]
        both = np.all(np.array(norms) > 0, axis=0)
        scale = np.sqrt(np.divide(norms[1], norms[0], out=np.ones_like(norms[0]), where=both))
        arrays[left] = one * scale
        arrays[left + 1] = arrays[left + 1] / scale[:, None]
    return dataclasses.replace(factors, arrays=tuple(arrays))
