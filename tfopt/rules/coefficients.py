"""Coefficients: the k of `k * x` or `x + k`, as an array that broadcasts over x and never makes x larger.

A coefficient is float64, and either 0-d (the same for every element, whatever the rank of x) or of the full rank of x
with size 1 along each axis on which it does not vary. Moving one through an op means re-indexing it:

    k * reshape(x) = reshape(k' * x)        k * transpose(x) = transpose(k' * x)        k * (x + y) = k * x + k * y
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tfopt.graph import Shape
from tfopt.rewrite import Refused

# Two coefficients that should be equal by algebra differ by rounding in float64 only.
SAME = 1e-9

# A stored value may differ from the exact one by this much, relative to itself: float32 rounding, but no underflow.
STORED = 1e-5


def canonical(k: np.ndarray | float) -> np.ndarray:
    """The coefficient in its one form: size 1 along axes on which it does not vary, 0-d where it varies on none."""
    k = np.asarray(k, np.float64)
    for axis, size in enumerate(k.shape):
        if size > 1:
            first = k[(slice(None),) * axis + (slice(0, 1),)]
            if (k == first).all():
                k = first
    return k.reshape(()) if k.ndim and k.size == 1 else k


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two coefficients of one tensor are equal, up to rounding."""
    if a is b:
        return True
    if a.ndim and b.ndim and a.ndim != b.ndim:
        return False
    if a.shape == b.shape and (a == b).all():
        return True
    with np.errstate(invalid="ignore"):
        return bool(np.all((a == b) | (np.abs(a - b) <= SAME * np.abs(a))))


def times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a * b, where 0 wins over infinity: a dead channel stays dead whatever its scale was."""
    with np.errstate(all="ignore"):
        return np.where((a == 0) | (b == 0), 0.0, a * b)


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b without warnings; what is not finite is judged where it would be stored."""
    with np.errstate(all="ignore"):
        return np.asarray(a / b)


def varying(k: np.ndarray) -> list[int]:
    """The axes along which a coefficient varies."""
    return [axis for axis, size in enumerate(k.shape) if size > 1]


def fits(shape: Sequence[int], x: Shape) -> bool:
    """Whether an array of this shape broadcasts over x without enlarging it."""
    if x is None:
        return len(shape) == 0
    return len(shape) <= len(x) and all(c in (1, d) for c, d in zip(shape[::-1], x[::-1], strict=False))


def raised(array: np.ndarray, rank: int | None) -> np.ndarray:
    """An array that broadcasts over a tensor of a rank, as a coefficient."""
    array = np.asarray(array, np.float64)
    if rank is not None and array.ndim < rank:
        array = array.reshape((1,) * (rank - array.ndim) + array.shape)
    return canonical(array)


def compact(k: np.ndarray) -> np.ndarray:
    """The smallest array that broadcasts as the coefficient does: without its leading axes of size 1."""
    while k.ndim and k.shape[0] == 1:
        k = k[0]
    return k


def along(vector: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """A vector along one axis as a coefficient."""
    shape = [1] * rank
    shape[axis] = -1
    return canonical(np.asarray(vector, np.float64).reshape(shape))


def vector_of(k: np.ndarray, axis: int, size: int) -> np.ndarray:
    """The values of a coefficient that varies along one axis only.

    Raises:
      Refused: it varies along another axis.
    """
    if k.ndim == 0:
        return np.full(size, float(k))
    if any(a != axis % k.ndim for a in varying(k)):
        raise Refused("it is not per channel")
    return np.broadcast_to(k.reshape(-1), (size,))


def lifted(k: np.ndarray, rank: int | None) -> np.ndarray:
    """The coefficient of an operand, seen on the broadcast result of the given rank."""
    return k if k.ndim == 0 else raised(k, _known(rank))


def dropped(k: np.ndarray, operand: Shape) -> np.ndarray:
    """The coefficient of a broadcast result, seen on one operand.

    Raises:
      Refused: the operand is the same for elements that need different coefficients.
    """
    if k.ndim == 0:
        return k
    if operand is None:
        raise Refused("an operand has unknown rank")
    extra = k.ndim - len(operand)
    shape = (1,) * max(extra, 0) + tuple(operand)
    if extra < 0 or any(k.shape[axis] != shape[axis] for axis in varying(k)):
        raise Refused("an operand is broadcast along the axis on which it varies")
    return canonical(k.reshape(k.shape[extra:]))


def regrouped(k: np.ndarray, source: Shape, target: Shape) -> np.ndarray:
    """The coefficient after a reshape from shape `source` to shape `target`.

    Axes are matched in groups of equal size from the right, so that leading unknown dimensions do no harm.

    Raises:
      Refused: a group on which the coefficient varies has a dimension that is not known.
    """
    if k.ndim == 0:
        return k
    if source is None or target is None:
        raise Refused("a reshape of unknown rank")
    sizes: list[int] = []
    taken: list[int] = []
    for from_axes, to_axes in _groups(source, target):
        if all(k.shape[axis] == 1 for axis in from_axes):
            sizes.extend([1] * len(to_axes))
            continue
        dims = [source[axis] for axis in from_axes] + [target[axis] for axis in to_axes]
        if any(d is None for d in dims):
            raise Refused("a reshape mixes the channels with a dimension of unknown size")
        sizes.extend(target[axis] or 0 for axis in to_axes)
        taken.extend(from_axes)
    # Broadcast the axes of the groups that matter to their full size, keep 1 on the others, and reshape once.
    full = np.broadcast_to(k, [source[axis] if axis in taken else 1 for axis in range(len(source))])  # type: ignore[misc]
    return canonical(full.reshape(sizes))


def _groups(source: Sequence[int | None], target: Sequence[int | None]) -> list[tuple[list[int], list[int]]]:
    """Splits the axes of both sides of a reshape into groups that hold the same elements, left to right."""
    groups: list[tuple[list[int], list[int]]] = []
    i, j = len(source), len(target)
    while i > 0 and j > 0:
        a, b = i - 1, j - 1
        left, right = source[a], target[b]
        while left is not None and right is not None and left != right:
            if left < right:
                a -= 1
                left = None if a < 0 or source[a] is None else left * source[a]  # type: ignore[operator]
            else:
                b -= 1
                right = None if b < 0 or target[b] is None else right * target[b]  # type: ignore[operator]
        if left is None or right is None:
            break
        groups.append((list(range(a, i)), list(range(b, j))))
        i, j = a, b
    # Axes of size 1 that are left on one side only hold nothing; whatever else is left is one group.
    groups.append((list(range(i)), list(range(j))))
    return groups[::-1]


def stored(exact: np.ndarray, old: np.ndarray) -> np.ndarray:
    """Rounds new values of a constant to the dtype of the old ones.

    Raises:
      Refused: a value overflows, or underflows so far that it loses accuracy.
    """
    with np.errstate(all="ignore"):
        new = np.asarray(exact).astype(old.dtype)
        lost = np.abs(new.astype(np.float64) - exact) > STORED * np.abs(exact)
    if not np.isfinite(new).all():
        raise Refused("the folded values would not be finite")
    if lost.any():
        # A value that was as good as zero beside the others may well underflow; one that mattered may not.
        size = np.abs(np.broadcast_to(old, new.shape).astype(np.float64))
        if (lost & (size > STORED * size.max(initial=0))).any():
            raise Refused(f"the folded values are too small for {old.dtype}")
    return new


def _known(rank: int | None) -> int:
    if rank is None:
        raise Refused("an operand has unknown rank")
    return rank
