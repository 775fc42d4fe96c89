"""What was made of the weights before, and training must keep: zeros and clusters.

    sparse      w = m v        m = [w != 0] stays, v is trained                  (Han et al. 2015)
    clustered   w = c[a]       which centroid each element has stays, c is trained, a centroid of 0 stays 0
                                                                                 (Han, Mao, Dally 2016)

Both are read from the values, so they need no record, and hold for a model that was pruned or clustered elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

# A trained kernel has hardly any exact zeros, and hardly any value twice.
_ZEROS = 0.1
_VALUES = 256

Keep = Callable[[Mapping[str, tf.Tensor]], dict[str, tf.Tensor]]


def is_sparse(value: np.ndarray) -> bool:
    """Whether a kernel was pruned: two axes or more, and at least a tenth of its elements are 0."""
    return value.ndim > 1 and value.size > 0 and bool(np.count_nonzero(value) <= (1 - _ZEROS) * value.size)


def clusters(value: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """The centroids of a clustered kernel.

    Args:
      value: of any shape.

    Returns:
      (distinct values (k,), the index of each element's own, in the shape of `value`), or None where there are too many
      (more than 256 in the whole, and, whatever axis is taken for the channels, more than 256 or an eighth of its
      elements in one of them), and where the kernel is so small that it may have few by chance.
    """
    if value.ndim < 2 or value.size < 8 or not (_few(value) or _few_by_channel(value)):
        return None
    centroids, index = np.unique(value, return_inverse=True)
    return centroids, index.reshape(value.shape).astype(np.int32)


def has_one_table(value: np.ndarray) -> bool:
    """Whether a kernel is clustered as a whole, not channel by channel: one scale can keep its values apart."""
    return value.ndim > 1 and value.size >= 8 and _few(value)


def _few(value: np.ndarray) -> bool:
    most = min(_VALUES, int(np.count_nonzero(value)) // 2 + 1)  # of a pruned kernel every value may still be its own
    return len(np.unique(value.ravel()[: 4 * _VALUES])) <= most and len(np.unique(value)) <= most


def _few_by_channel(value: np.ndarray) -> bool:
    """Whether the places along one of the axes have few values each."""
    for axis, size in enumerate(value.shape):
        most = min(_VALUES, int(np.count_nonzero(value)) // max(size, 1) // 8)
        if most > 1 and all(len(np.unique(part)) <= most for part in np.moveaxis(value, axis, 0)):
            return True
    return False


def hold(weights: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], Keep]:
    """What to train so that zeros stay zeros and clusters stay clusters.

    Args:
      weights: name -> value.

    Returns:
      name -> initial value of its variable: the weight itself, or its centroids (k,); and the function from these
      variables to the weights that differ from them.
    """
    initial = dict(weights)
    masks: dict[str, np.ndarray] = {}
    indices: dict[str, np.ndarray] = {}
    for name, value in weights.items():
        found = clusters(value)
        if found is not None:
            initial[name], indices[name] = found
            masks[name] = (found[0] != 0).astype(value.dtype)
        elif is_sparse(value):
            masks[name] = (value != 0).astype(value.dtype)

    def keep(variables: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        kept = {name: variables[name] * tf.constant(mask) for name, mask in masks.items()}
        return {name: tf.gather(w, indices[name]) if name in indices else w for name, w in kept.items()}

    return initial, keep
