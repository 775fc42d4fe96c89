"""What a .tflite file has lost of the zeros and the clusters that the float32 file of the same model has.

Kernels have no names in common across engines, so they are compared by size: as many of n elements must have as few
values as there were, and all kernels together as many zeros.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from tfopt.export.tflite_file import TfliteFile
from tfopt.invariants import has_one_table, is_sparse


def losses(file: TfliteFile, base: TfliteFile) -> list[str] | None:
    """Compares two files.

    Args:
      file: a quantized one.
      base: the float32 file.

    Returns:
      "zeros", "clusters", both or nothing; None where the float32 file is neither sparse nor clustered.
    """
    kernels = [array for _, array in base.constants() if array.ndim > 1]
    clustered = _values([array for array in kernels if has_one_table(array)])
    sparse = any(is_sparse(array) for array in kernels)
    if not clustered and not sparse:
        return None
    made = [array for _, array in file.constants() if array.ndim > 1]
    lost = []
    if sparse and _zeros(made) < _zeros(kernels):
        lost.append("zeros")
    found = _values([array for array in made if array.size in clustered])
    if any(_more(found[size], counts) for size, counts in clustered.items()):
        lost.append("clusters")
    return lost


def _values(arrays: list[np.ndarray]) -> dict[int, list[int]]:
    """Number of elements -> numbers of distinct values, ascending."""
    counts: dict[int, list[int]] = defaultdict(list)
    for array in arrays:
        counts[array.size].append(len(np.unique(array)))
    return defaultdict(list, {size: sorted(each) for size, each in counts.items()})


def _more(made: list[int], wanted: list[int]) -> bool:
    return len(made) < len(wanted) or any(one > other for one, other in zip(made, wanted, strict=False))


def _zeros(arrays: list[np.ndarray]) -> int:
    return sum(array.size - int(np.count_nonzero(array)) for array in arrays)
