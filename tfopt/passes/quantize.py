"""quantize: gives every tensor that a device computes with 8 bits its range, and weights 8 or 4 bits, without training.

The ranges are calibrated on representative rows. No method is best for all models, so that each is tried, and the one
whose outputs are nearest to those of the float model, by the ratio of signal to noise, is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from tfopt import calibration, fake_quant
from tfopt.clipping import METHODS, clipped
from tfopt.data import Dataset, batch_size
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.graph import split
from tfopt.invariants import clusters, has_one_table
from tfopt.losses import heads, trainable_outputs
from tfopt.model import Model
from tfopt.passes import Data, Observe, Pass, equalize
from tfopt.passes.correct_bias import correct
from tfopt.quantization_sites import Sites, sites
from tfopt.rewrite import Log
from tfopt.verify import input_specs

_ROWS = 256
_BITS = (4, 8)


def run(
    model: Model, log: Log, data: Data, bits: int = 8, calibrator: str = "best", correct_biases: bool = True
) -> None:
    """Puts fake-quant ops into the graph, in place.

    Args:
      model: the model.
      log: gets what was quantized, what stays in float, and what each method gave.
      data: with representative rows.
      bits: of the weights of convolutions and dense layers: 8 or 4.
      calibrator: one of `tfopt.clipping.METHODS`, or "best": tries them all.
      correct_biases: whether to correct the shift of the mean that rounded weights bring, where that helps.

    Raises:
      TfoptError: no rows, an unknown option, nothing to quantize.
    """
    rows = data.need_rows("quantize")
    rows = rows.take(slice(0, None, max(len(rows) // _ROWS, 1)))
    signature, integers = data.signature, data.integer_outputs
    quantized, _ = calibrate(model, log, signature, rows, bits, calibrator, integers, data.observe)
    if correct_biases:
        tried = {"as calibrated": quantized, "with biases corrected": _corrected(quantized, signature, rows)}
        if bits == 8 and not any(clusters(value) for value in _constants(model)):  # which equalizing would undo
            equalized, quiet = model.copy(), Log()
            equalize.run(equalized, quiet, data)
            if quiet.applied:
                again, _ = calibrate(equalized, quiet, signature, rows, bits, calibrator, integers, data.observe)
                tried["equalized, with biases corrected"] = _corrected(again, signature, rows)
        ratios = {words: decibel(model, candidate, signature, rows) for words, candidate in tried.items()}
        best = max(ratios, key=lambda words: ratios[words])
        listed = ", ".join(f"{words} {ratio:.1f}" for words, ratio in ratios.items())
        log.notes.append(f"taken {best} (signal-to-noise ratio in dB: {listed})")
        quantized = tried[best]
    model.graph = quantized.graph


def _constants(model: Model) -> Iterator[np.ndarray]:
    """The float constants of a model."""
    values = (model.graph.constant(name) for name in model.graph.nodes)
    return (value for value in values if value is not None and value.dtype == np.float32)


def _corrected(model: Model, signature: str, rows: Dataset) -> Model:
    corrected = model.copy()
    correct(corrected, signature, rows, Log())
    return corrected


def calibrate(
    model: Model,
    log: Log,
    signature: str,
    rows: Dataset,
    bits: int,
    calibrator: str,
    integer_outputs: bool = False,
    observe: Observe = calibration.observe,
) -> tuple[Model, Sites]:
    """A copy of a model with fake-quant ops, calibrated; see `run` and `Data.observe`."""
    if bits not in _BITS:
        raise TfoptError(f"quantize: option 'bits' must be 8 or 4, received {bits}")
    if calibrator not in ("best", *METHODS):
        raise TfoptError(f"quantize: unknown calibrator {calibrator!r}; choose from best, {', '.join(METHODS)}")
    where = sites(model, integer_outputs, signature)
    if not where.weights:
        raise TfoptError("quantize: there is nothing to quantize: no convolution or product with constant weights")
    for node, reason in where.left.items():
        log.refused["int8", node] = reason
    if apart := _apart(model, signature):
        log.notes.append(f"quantized for signature {signature!r}: {', '.join(apart)} by what they share with it")
    open_ended = [ref for ref, fixed in where.activations.items() if fixed is None]
    methods = METHODS if calibrator == "best" else (calibrator,)
    seen = observe(model, signature, open_ended, rows, methods != ("minmax",))
    if observe is not calibration.observe:
        log.notes.append(f"values of activations were seen on all rows of {rows.source}, by Beam")
    best, found = -np.inf, model
    tried = {}
    for method in methods:
        ranges = {ref: clipped(seen[ref], method, 8) for ref in open_ended}
        candidate = model.copy()
        fake_quant.insert(candidate, where, ranges, bits, "max" if bits == 8 else "mse")
        tried[method] = decibel(model, candidate, signature, rows) if len(methods) > 1 else np.nan
        if len(methods) == 1 or tried[method] > best:
            best, found = tried[method], candidate
    if len(methods) > 1:
        chosen = max(tried, key=lambda method: tried[method])
        others = ", ".join(f"{method} {ratio:.1f}" for method, ratio in tried.items())
        log.notes.append(f"calibrated by {chosen} on {len(rows)} rows (signal-to-noise ratio in dB: {others})")
    if bits == 8 and (few := sum(has_one_table(value) for value in _linear(model, where))):
        log.notes.append(f"clustered kernels with one scale each, which keeps their values as few in the file: {few}")
    narrow = [weight.linear and (weight.low or bits == 8) for weight in where.weights]
    log.applied[f"weight in {bits} bits"] = sum(narrow)
    log.applied["constant in 8 bits"] = len(narrow) - sum(narrow)
    log.applied["activation in 8 bits"] = len(where.activations)
    return found, where


def _linear(model: Model, where: Sites) -> list[np.ndarray]:
    """The kernels of convolutions and products, each once."""
    values = {weight.ref: model.graph.constant(weight.ref) for weight in where.weights if weight.linear}
    return [value for value in values.values() if value is not None]


def _apart(model: Model, signature: str) -> list[str]:
    """The signatures that compute what this one does not."""

    def needs(name: str) -> set[str]:
        outputs = [ref for label, ref in model.graph.outputs.items() if label.startswith(f"{name}:")]
        return model.graph.reachable(split(ref)[0] for ref in outputs)

    own = needs(signature)
    return [name for name in model.signatures if needs(name) - own]


def decibel(model: Model, other: Model, signature: str, rows: Dataset) -> float:
    """The signal-to-noise ratio of the outputs of another model, in dB; the worst of the float outputs.

    Args:
      model: what is right.
      other: the same signature, with other numbers.
      signature: which; in place of probabilities their logits are compared, which a softmax does not saturate.
      rows: what to run both on.

    Returns:
      Infinity where they are equal, -infinity where an output is not finite.
    """
    sums: dict[str, np.ndarray] = {}
    one, two = (trainable_outputs(each, signature, heads(each, signature)) for each in (model, other))
    with Function(one) as wanted, Function(two) as received:
        for batch in rows.batches(batch_size(input_specs(model, signature), 64)):
            want, got = wanted(signature, batch), received(signature, batch)
            for name, value in want.items():
                if value.dtype.kind == "f":
                    exact, noise = value.astype(np.float64), got[name].astype(np.float64) - value
                    sums[name] = sums.get(name, np.zeros(2)) + np.array([np.sum(exact**2), np.sum(noise**2)])
    ratios = [
        np.inf if noise == 0 else 10 * np.log10(max(signal, 1e-30) / noise) if np.isfinite(noise) else -np.inf
        for signal, noise in sums.values()
    ]
    return float(min(ratios, default=np.inf))


PASS = Pass(
    "quantize",
    run,
    options={"bits": 8, "calibrator": "best", "correct_biases": True},
    needs=("fold_affine",),
    lossless=False,
    learns=True,
    device=True,
    files=("int8", "int4", "mixed"),
    makes=("ranges",),
    keeps=("sparsity", "clusters"),
)
