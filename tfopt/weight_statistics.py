"""How much is in the weights of a model, or of a file: zeros, distinct values, and what a coder could make of them.

    H = - sum_v p_v log2 p_v        p_v: the share of the value v in a tensor     (zero-order entropy, bits per element)

A coder that knows just how often each value occurs in a tensor needs n H bits for n elements, and a table of the
values; no file here is stored like that, so it says what is possible, as the sizes of Han, Mao and Dally (2016) do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tfopt.errors import TfoptError
from tfopt.invariants import clusters, is_sparse

_SAMPLE = 1 << 26  # elements of a larger array that are looked at, evenly spaced


class Statistics(NamedTuple):
    """Of some arrays together.

    Attributes:
      elements, zeros: numbers of elements.
      distinct: the numbers of distinct values of each array, summed.
      bits: sum of n H over the arrays.
      coded_bytes: of an ideal coder with its tables; an array that this does not make smaller is counted as it is.
    """

    elements: int
    zeros: int
    distinct: int
    bits: float
    coded_bytes: int


def statistics(arrays: Iterable[np.ndarray]) -> Statistics:
    """Counts arrays of numbers, each by itself, and adds up."""
    total = Statistics(0, 0, 0, 0.0, 0)
    for array in arrays:
        _, counts = np.unique(array.ravel()[:: -(-array.size // _SAMPLE) or 1], return_counts=True)
        share = counts / max(counts.sum(), 1)
        bits = float(-array.size * np.sum(share * np.log2(share)))
        coded = min(bits / 8 + len(counts) * array.itemsize, array.nbytes)
        total = Statistics(
            total.elements + array.size,
            total.zeros + array.size - int(np.count_nonzero(array)),
            total.distinct + len(counts),
            total.bits + bits,
            total.coded_bytes + math.ceil(coded),
        )
    return total


def is_compressed(arrays: Iterable[np.ndarray]) -> bool:
    """Whether one of them is a sparse or a clustered kernel; integers, which always have few values, do not tell."""
    return any(a.dtype.kind == "f" and (is_sparse(a) or clusters(a) is not None) for a in arrays)


def arrays_of(path: str | Path) -> Iterator[np.ndarray]:
    """Yields the weights of an artifact: what has at least one axis, is float or quantized, and is stored.

    Args:
      path: a .tflite file, or a SavedModel directory.

    Raises:
      TfoptError: it cannot be read.
    """
    try:
        if Path(path).is_file():
            from tfopt.export.tflite_file import TfliteFile

            yield from (array for _, array in TfliteFile(path).constants())
        else:
            yield from _of_saved_model(Path(path))
    except (OSError, ValueError, KeyError) as error:
        raise TfoptError(f"{path}: its weights cannot be read: {error}") from error


def _of_saved_model(path: Path) -> Iterator[np.ndarray]:
    import tensorflow as tf
    from tensorflow.python.saved_model import loader_impl

    graphs = [meta.graph_def for meta in loader_impl.parse_saved_model(str(path)).meta_graphs]
    bodies = [body for graph in graphs for body in (graph.node, *(f.node_def for f in graph.library.function))]
    for nodes in bodies:
        for node in nodes:
            if node.op == "Const" and tf.as_dtype(node.attr["dtype"].type).is_floating:
                tensor = node.attr["value"].tensor
                if tensor.tensor_shape.dim:
                    yield tf.make_ndarray(tensor)
    index = path / "variables" / "variables"
    if index.with_suffix(".index").exists():
        reader = tf.train.load_checkpoint(str(index))
        for name, dtype in sorted(reader.get_variable_to_dtype_map().items()):
            if dtype.is_floating and reader.get_variable_to_shape_map()[name]:
                yield reader.get_tensor(name)
