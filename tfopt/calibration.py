"""Calibration: the range of every tensor that is to be quantized, from representative rows; and that of weights.

Rows are run twice at most: once for the extremes of every tensor, once for histograms between them, from which
`tfopt.clipping` finds what is best cut off. All tensors come from one session call.

    weights     w' = s round(w / s), |w'| <= m     s = m / (2^(b - 1) - 1)     m = max |w|, or argmin E (w - w')^2
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from tfopt.clipping import METHODS, Observed, clipped
from tfopt.data import Dataset, batch_size
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.graph import join, split
from tfopt.inline import label
from tfopt.model import Model
from tfopt.verify import input_specs

# What one call may hold in memory, and how many rows it takes at most.
_CALL_BYTES = 1 << 28
_CALL_ROWS = 128


def ranges(
    model: Model,
    signature: str,
    refs: Sequence[str],
    rows: Dataset,
    method: str = "minmax",
    bits: int = 8,
    percentile: float = 99.99,
) -> dict[str, tuple[float, float]]:
    """Ranges of tensors.

    Args:
      model: the model.
      signature: the one that is fed.
      refs: tensors of the main body, as graph references ("conv/Relu" or "conv/Relu:0").
      rows: representative rows of the signature.
      method: one of METHODS.
      bits: of the quantization, for "mse" and "entropy".
      percentile: for "percentile", in (50, 100].

    Returns:
      Reference, as given -> (low, high), with low <= 0 <= high and low < high.

    Raises:
      TfoptError: an unknown method, a tensor that the signature does not compute or that holds no numbers, NaN or
        infinity in the rows or in a tensor.
    """
    if method not in METHODS:
        raise TfoptError(f"unknown calibration method {method!r}; choose from {', '.join(METHODS)}")
    seen = observe(model, signature, refs, rows, counts=method != "minmax")
    return {ref: clipped(seen[ref], method, bits, percentile) for ref in refs}


def observe(
    model: Model, signature: str, refs: Sequence[str], rows: Dataset, counts: bool = True
) -> dict[str, Observed]:
    """Extremes and counts of the values of tensors, from which `clipped` makes ranges by any method; see `ranges`.

    Args:
      model: the model.
      signature: the one that is fed.
      refs: tensors.
      rows: representative rows.
      counts: whether histograms are wanted; "minmax" needs none.
    """
    _check_inputs(rows)
    seen = {ref: Observed() for ref in refs}
    filled = set()
    for start, tensors in values(model, signature, refs, rows):
        for ref, array in tensors.items():
            if array.size:
                low, high = float(array.min()), float(array.max())
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise TfoptError(_not_finite(ref, array, start, rows))
                seen[ref].low, seen[ref].high = min(seen[ref].low, low), max(seen[ref].high, high)
                filled.add(ref)
    if empty := [ref for ref in refs if ref not in filled]:
        raise TfoptError(f"tensor {empty[0]!r} holds no values on {rows.source}: nothing to calibrate on")
    if counts:
        for _, tensors in values(model, signature, refs, rows):
            for ref, array in tensors.items():
                seen[ref].add(array)
    return seen


def values(
    model: Model, signature: str, refs: Sequence[str], rows: Dataset
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Runs a signature on rows and yields inner tensors, call by call: one session call for all of them.

    Args:
      model: the model.
      signature: the one that is fed.
      refs: tensors of the main body.
      rows: rows of the signature; where its batch is fixed, the last call is filled up with the first rows.

    Yields:
      (first row of the call, reference as given -> array), float32, or float64 where that is what holds the tensor.

    Raises:
      TfoptError: a tensor is not there or not computed from this signature's inputs, or the model cannot be run.
    """
    opened = _opened(model, signature, refs)
    fixed = batch_size(input_specs(model, signature), 0)
    total = len(rows)
    # An open batch begins with one row, which tells how many fit.
    start, size = 0, fixed or 1
    with Function(opened) as function:
        while start < total:
            outputs = function(signature, call_of(rows, start, size, bool(fixed)))
            tensors = {ref: _number(ref, outputs[ref]) for ref in refs}
            yield start, tensors
            taken = min(size, total - start)
            start += size
            if not fixed:
                held = sum(array.nbytes for array in tensors.values()) / taken
                size = int(min(max(_CALL_BYTES / max(held, 1), 1), _CALL_ROWS))


def call_of(rows: Dataset, start: int, size: int, fixed: bool) -> dict[str, np.ndarray]:
    """The inputs of one call: `size` rows, or fewer at the end; a fixed batch is filled up with the first rows."""
    taken = rows.take(slice(start, start + size)).inputs
    if not fixed or start + size <= len(rows):
        return taken
    spare = {name: np.resize(array, (size, *array.shape[1:])) for name, array in rows.inputs.items()}
    return {
        name: array if name in rows.whole else np.concatenate([array, spare[name]])[:size]
        for name, array in taken.items()
    }


def weight_scale(
    weight: np.ndarray, axis: int | tuple[int, ...] | None, bits: int = 8, method: str = "max"
) -> np.ndarray:
    """The m of the symmetric, narrow quantization of weights: [-m, m] in steps of m / (2^(bits - 1) - 1).

    Args:
      weight: of any shape.
      axis: the axes that have an m each; None for one m in all.
      bits: of the quantization.
      method: "max" takes the largest |w|, "mse" what makes the mean of (w - w')^2 least.

    Returns:
      float32 of the shape of these axes; positive also where all weights are 0.
    """
    if method not in ("max", "mse"):
        raise TfoptError(f"unknown method {method!r} for the scale of weights; choose from max, mse")
    axes = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(a % weight.ndim for a in axes)
    others = [a for a in range(weight.ndim) if a not in axes]
    sizes = [weight.shape[a] for a in axes]
    table = np.abs(weight.transpose([*axes, *others]).astype(np.float32)).reshape(math.prod(sizes), -1)
    largest = table.max(axis=1, initial=0)
    best = largest
    if method == "mse":
        steps = 2 ** (bits - 1) - 1
        least = np.full(len(table), np.inf, np.float32)
        around, spacing = np.ones(len(table), np.float32), 0.02
        # A grid over what is worth a thought (4 bits may clip half), then a finer one around the best of it.
        for offsets in (-np.arange(0, 0.8, spacing), np.linspace(-spacing, spacing, 9)):
            centre = around.copy()
            for offset in offsets:
                fraction = np.minimum(centre + np.float32(offset), 1)
                step = np.maximum(fraction * largest / steps, np.finfo(np.float32).tiny)[:, None]
                error = table - step * np.minimum(np.round(table / step), steps)
                error = np.einsum("ij,ij->i", error, error)
                better = error < least
                least, around = np.where(better, error, least), np.where(better, fraction, around)
        best = largest * around
    floor = largest.max(initial=0) * 1e-7 or 1.0
    return np.maximum(best, floor).astype(np.float32).reshape(sizes)


def cluster_scale(weight: np.ndarray) -> np.ndarray:
    """The m of a clustered kernel in 8 bits, see `weight_scale`: that on whose steps its few values lie best.

    It may be up to twice the largest of them: there are 127 steps for a few values, so a range in which each is near to
    a step is worth more than a short one.

    Args:
      weight: of any shape, with few distinct values.

    Returns:
      float32 ().
    """
    values, counts = np.unique(np.abs(weight), return_counts=True)
    largest = np.float32(values[-1])
    tried = largest * np.linspace(1, 2, 1001)[1:-1, None]
    tried = np.concatenate([[[largest]], tried])
    steps = tried / 127
    errors = np.sum(counts * (values - steps * np.round(values / steps)) ** 2, axis=1)
    return np.asarray(max(tried[np.argmin(errors), 0], np.finfo(np.float32).tiny), np.float32)


def _opened(model: Model, signature: str, refs: Sequence[str]) -> Model:
    """The model with inner tensors for the outputs of a signature."""
    if signature not in model.signatures:
        raise TfoptError(f"the model has no signature {signature!r}; it has {', '.join(map(repr, model.signatures))}")
    opened = model.copy()
    definition = SignatureDef(inputs=model.signatures[signature].inputs)
    for ref in refs:
        name, port = split(ref)
        if name not in model.graph.nodes:
            raise TfoptError(f"there is no tensor {ref!r} in the graph to calibrate")
        definition.outputs[ref].name = f"{name}:{port}"
        opened.graph.outputs[label(signature, ref, "")] = join(name, port)
    opened.signatures[signature] = definition
    return opened


def _number(ref: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "OSUc":
        raise TfoptError(f"tensor {ref!r} holds no real numbers but {array.dtype}: it has no range")
    if array.dtype in (np.float32, np.float64):
        return array
    return array.astype(np.float64 if array.dtype.kind in "iu" and array.dtype.itemsize > 2 else np.float32)


def _check_inputs(rows: Dataset) -> None:
    for name, array in rows.inputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            where = "" if name in rows.whole else f" in row {_bad_row(array)}"
            raise TfoptError(
                f"{rows.source}: input {name!r} holds NaN or infinity{where}: no range can be calibrated on it"
            )


def _not_finite(ref: str, array: np.ndarray, start: int, rows: Dataset) -> str:
    taken = min(len(rows) - start, len(array)) if array.ndim else 0
    by_row = array.ndim and _bad_row(array) < taken
    row = start + _bad_row(array) if by_row else start
    return f"tensor {ref!r} becomes NaN or infinite on row {row} of {rows.source}, whose inputs are finite"


def _bad_row(array: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
