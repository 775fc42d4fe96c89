"""Calibration: the range of every tensor that is to be quantized, from representative rows; and that of weights.

Rows are run twice at most: once for the extremes of every tensor, once for histograms between them, from which
`tfopt.clipping` finds what is best cut off. All tensors come from one session call.

Every call but the last has the same number of rows, since the last bits of a product may depend on how many rows are
multiplied with it, and what belongs to no row is counted once a call. So `tfopt.beam.calibrate`, whose workers run the
same calls, gives the same bits.

    weights     w' = s round(w / s), |w'| <= m     s = m / (2^(b - 1) - 1)     m = max |w|, or argmin E (w - w')^2
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

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
    check_inputs(rows)
    size = call_rows(model, signature, refs, rows)
    seen: dict[str, Observed] = {}
    for start, tensors in values(model, signature, refs, rows, size):
        for ref, found in extremes(tensors, rows.take(slice(start, start + size))).items():
            seen.setdefault(ref, Observed()).merge(found)
    check_seen(seen, refs, rows.source)
    if counts:
        for _, tensors in values(model, signature, refs, rows, size):
            for ref, array in tensors.items():
                seen[ref].add(array)
    return seen


def extremes(tensors: Mapping[str, np.ndarray], rows: Dataset) -> dict[str, Observed]:
    """The extremes of the tensors of one call, of those that hold values.

    Args:
      tensors: reference -> array.
      rows: those of the call.

    Raises:
      TfoptError: NaN or infinity.
    """
    seen = {}
    for ref, array in tensors.items():
        if array.size:
            low, high = float(array.min()), float(array.max())
            if not (math.isfinite(low) and math.isfinite(high)):
                raise TfoptError(_not_finite(ref, array, rows))
            seen[ref] = Observed(min(low, 0.0), max(high, 0.0))
    return seen


def check_seen(seen: Mapping[str, Observed], refs: Sequence[str], source: str) -> None:
    """Raises where nothing was seen of a tensor.

    Raises:
      TfoptError: it says of which.
    """
    if empty := [ref for ref in refs if ref not in seen]:
        raise TfoptError(f"tensor {empty[0]!r} holds no values on {source}: nothing to calibrate on")


def values(
    model: Model, signature: str, refs: Sequence[str], rows: Dataset, size: int | None = None
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Runs a signature on rows and yields inner tensors, call by call: one session call for all of them.

    Args:
      model: the model.
      signature: the one that is fed.
      refs: tensors of the main body.
      rows: rows of the signature; where its batch is fixed, the last call is filled up with the first rows.
      size: rows of a call; None finds out, see `call_rows`.

    Yields:
      (first row of the call, reference as given -> array), float32, or float64 where that is what holds the tensor.

    Raises:
      TfoptError: a tensor is not there or not computed from this signature's inputs, or the model cannot be run.
    """
    size = size or call_rows(model, signature, refs, rows)
    fixed = batch_size(input_specs(model, signature), 0)
    with Function(opened_at(model, signature, refs)) as function:
        for start in range(0, len(rows), size):
            yield start, inner(function, signature, refs, call_of(rows, start, size, bool(fixed)))


def call_rows(model: Model, signature: str, refs: Sequence[str], rows: Dataset) -> int:
    """How many rows one call takes: the fixed batch of the signature, or what the first row tells will fit in memory.

    Where state goes from call to call, a row is a call: the rows are then a sequence.
    """
    opened = opened_at(model, signature, refs)
    if size := batch_size(input_specs(model, signature), 1 if model.state else 0):
        return size
    with Function(opened) as function:
        tensors = inner(function, signature, refs, rows.take(slice(0, 1)).inputs)
    return int(min(max(_CALL_BYTES / max(sum(array.nbytes for array in tensors.values()), 1), 1), _CALL_ROWS))


def inner(
    function: Function, signature: str, refs: Sequence[str], inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The tensors of one call of a model that is `opened_at` them; float32, or float64 where that holds them."""
    outputs = function(signature, inputs)
    return {ref: _number(ref, outputs[ref]) for ref in refs}


def call_of(rows: Dataset, start: int, size: int, fixed: bool) -> dict[str, np.ndarray]:
    """The inputs of one call: `size` rows, or fewer at the end; a fixed batch is filled up with the first rows."""
    taken = rows.take(slice(start, start + size))
    return filled(taken, size, rows) if fixed else taken.inputs


def filled(rows: Dataset, size: int, first: Dataset) -> dict[str, np.ndarray]:
    """The inputs of a call of `size` rows, for fewer rows filled up with the first ones, again and again."""
    if len(rows) == size:
        return rows.inputs
    spare = {name: np.resize(array, (size, *array.shape[1:])) for name, array in first.inputs.items()}
    return {
        name: array if name in rows.whole else np.concatenate([array, spare[name]])[:size]
        for name, array in rows.inputs.items()
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


def opened_at(model: Model, signature: str, refs: Sequence[str]) -> Model:
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


def check_inputs(rows: Dataset) -> None:
    """Raises where rows hold NaN or infinity.

    Raises:
      TfoptError: it names the input and the row.
    """
    for name, array in rows.inputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            where = "" if name in rows.whole else f" in row {rows.start + _bad_row(array)}"
            raise TfoptError(
                f"{rows.source}: input {name!r} holds NaN or infinity{where}: no range can be calibrated on it"
            )


def _not_finite(ref: str, array: np.ndarray, rows: Dataset) -> str:
    by_row = array.ndim and _bad_row(array) < len(rows)  # a fixed batch may hold more
    row = rows.start + (_bad_row(array) if by_row else 0)
    return f"tensor {ref!r} becomes NaN or infinite on row {row} of {rows.source}, whose inputs are finite"


def _bad_row(array: np.ndarray) -> int:
    return int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
