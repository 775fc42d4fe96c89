"""mixed_precision: gives each layer's weights 4 bits or 8, so that the file is small and accurate enough.

    min  sum_L n_L b_L / 8      over b_L in {4, 8} bits for the n_L weights of each layer L
    subject to  score(float) - score(b) <= bar

All begin with 4 bits. The error that each brings to the model's outputs on its own (`tfopt.sensitivity`) gives the
order in which they are restored, the greatest error per byte first; how many must be is found by bisection, and then
each is lowered again where the bar allows it. Activations have 8 bits. No layer is left in float: the converter would
quantize its weights all the same, by their extremes.

Where latency is to be least, a bit costs as much as its weight is used (multiplications), and 4 bits are tried only if
the file with 4 bits everywhere is faster on this machine than that with 8: most kernels for CPUs unpack them first.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import numpy as np

from tfopt.bit_search import Found, Layer, search
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export.device_latency import device_latency
from tfopt.fake_quant import PER_CHANNEL, PER_TENSOR, insert, strip, weight_limit
from tfopt.graph import join, split
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.passes.correct_bias import _biases, correct
from tfopt.passes.quantize import _ROWS, calibrate, decibel
from tfopt.quantization_sites import DEPTHWISE, Sites, Weight
from tfopt.rewrite import Log
from tfopt.sensitivity import sensitivity

_BITS: tuple[int, ...] = (4, 8)
_GAIN = 0.97  # a latency that is more than this part of another is not less: so far do two runs differ
_MARGIN = 0.8  # of the bar: the file rounds a little otherwise than the graph
_METHODS = {4: "mse", 8: "max"}  # how the scale of weights is found, as in `quantize`


@dataclasses.dataclass(frozen=True)
class _Quantized:
    """The weights of a layer, and how they are quantized.

    Attributes:
      weight: where the layer reads them.
      node: the fake-quant op.
      size: number of the weights.
      scales: bits -> the largest value of each channel.
    """

    weight: Weight
    node: str
    size: int
    scales: Mapping[int, np.ndarray]


def run(
    model: Model, log: Log, data: Data, max_drop: float = 0.005, calibrator: str = "best", evaluations: int = 40
) -> None:
    """Puts fake-quant ops into the graph, in place.

    Args:
      model: the model.
      log: gets what was quantized, the error that each layer brings, and how the search went.
      data: with representative rows; the score on evaluation data where there are some, else the noise in the outputs.
      max_drop: how far the score may fall where `data.max_drop` does not say.
      calibrator: how the ranges of activations are found, see `quantize`.
      evaluations: how many models are scored at most.

    Raises:
      TfoptError: no rows, an unknown option, nothing to quantize.
    """
    rows = data.need_rows("mixed_precision")
    rows = rows.take(slice(0, None, max(len(rows) // _ROWS, 1)))
    notes = Log()
    base, where = calibrate(model, notes, data.signature, rows, 8, calibrator, data.integer_outputs, data.observe)
    log.refused, log.notes = notes.refused, log.notes + notes.notes
    quantized = _weights(base, where)
    layers = _layers(model, where, quantized, data.signature, rows)
    made: dict[tuple[int, ...], Model] = {}

    def candidate(bits: Mapping[str, int]) -> Model:
        key = tuple(bits[layer.name] for layer in layers)
        if key not in made:
            made.clear()  # one is held
            made[key] = _better(model, _with_bits(base, quantized, bits), data.signature, rows)
        return made[key]

    score: Callable[[Model], float]
    if data.score is None:
        reference, words = 0.0, f"noise in the outputs, as a share of the signal on {len(rows)} representative rows"
        score = functools.partial(_minus_noise, model, data.signature, rows)
    else:
        score = data.score
        reference, words = score(data.teacher), "drop of the score on the evaluation data"
    bar = max_drop if data.max_drop is None else data.max_drop
    widths = _BITS
    if data.minimize == "latency":
        layers = _timed(layers, where)
        ends = {bits: _with_bits(base, quantized, dict.fromkeys(quantized, bits)) for bits in _BITS}
        widths = _fastest(model, ends, data.signature, rows, log)
    found = search(layers, lambda bits: reference - score(candidate(bits)), _MARGIN * bar, widths, evaluations)
    found = dataclasses.replace(found, met=found.drop <= bar)
    log.notes += _words(found, layers, words, bar)
    if not found.met:
        log.warnings.append(log.notes[-1])
    log.sensitivity = [
        {
            "node": layer.name,
            "error": float(np.sqrt(layer.errors[_BITS[0]])),
            "bits": found.bits[layer.name],
            "bytes": layer.bytes(found.bits[layer.name]),
        }
        for layer in layers
    ]
    for bits in _BITS:
        if number := sum(each == bits for each in found.bits.values()):
            log.applied[f"layer in {bits} bits"] = number
    log.applied["activation in 8 bits"] = len(where.activations)
    model.graph = candidate(found.bits).graph


def _minus_noise(model: Model, signature: str, rows: Dataset, other: Model) -> float:
    return -float(10 ** (-decibel(model, other, signature, rows) / 10))


def _words(found: Found, layers: list[Layer], what: str, bar: float) -> list[str]:
    """What the search found, for the report."""
    whole, chosen = (
        sum(layer.bytes(bits[layer.name]) for layer in layers) for bits in (dict.fromkeys(found.bits, 8), found.bits)
    )
    drops = [f"{drop:.4g} with {bits} bits for all weights" for bits, drop in found.uniform.items()]
    stopped = ", the limit" if found.stopped else ""
    notes = [
        f"{what}: {', '.join(drops)}, {found.drop:.4g} as chosen ({found.evaluations} models scored{stopped})",
        f"weights of layers: {chosen:,} bytes, {chosen / whole:.0%} of the {whole:,} with 8 bits for all",
    ]
    if not found.met:
        notes.append(
            f"mixed_precision: no choice of bits is within the bar of {bar:.4g}: 8 bits for all weights and "
            f"activations bring {found.uniform[8]:.4g} ({what}); the nearest miss is {found.drop:.4g}"
        )
    return notes


def _fastest(model: Model, ends: Mapping[int, Model], signature: str, rows: Dataset, log: Log) -> tuple[int, ...]:
    """The widths worth trying for latency: 4 bits only where the kernels of this machine gain by them."""
    try:
        named = {str(bits): made for bits, made in ends.items()}
        times = device_latency(model, named, signature, rows.take(slice(0, 1)).inputs)
    except (TfoptError, ValueError) as error:
        log.notes.append(f"latency could not be measured ({error}): 8 bits are taken to be no slower than 4")
        return (8,)
    low, high = times["4"], times["8"]
    gains = low < _GAIN * high
    log.notes.append(
        f"latency: {low:.3g} ms with 4 bits for all weights, {high:.3g} ms with 8"
        + ("" if gains else ": 4 bits gain nothing here, so that no layer gets them")
    )
    return _BITS if gains else (8,)


def _timed(layers: list[Layer], where: Sites) -> list[Layer]:
    """The layers, with the multiplications per weight for what a bit costs."""

    def positions(name: str) -> float:
        shape = where.shapes.get(join(name)) or ()
        return float(np.prod([size or 1 for size in shape[:-1]]))

    return [dataclasses.replace(layer, weight=positions(split(layer.name)[0])) for layer in layers]


def _better(model: Model, quantized: Model, signature: str, rows: Dataset) -> Model:
    """A quantized model with its biases corrected, where that brings its outputs nearer to those of the float model."""
    corrected = quantized.copy()
    correct(corrected, signature, rows, Log())
    before, after = (decibel(model, each, signature, rows) for each in (quantized, corrected))
    return corrected if after > before else quantized


def _weights(base: Model, where: Sites) -> dict[str, _Quantized]:
    """Layer -> its weights; layers that share them go by the name of the first.

    An op that reads several, such as the loop of an LSTM, is a layer for each: "name", "name:1", ...
    """
    found: dict[str, _Quantized] = {}
    for weight in where.weights:
        node = base.graph.producer(base.graph.nodes[weight.node].input[weight.index])
        if node.op == "Reshape":  # a depthwise kernel, held flat
            node = base.graph.producer(node.input[0])
        if weight.linear and weight.low and node.name not in {each.node for each in found.values()}:
            held = _constant(base, node.input[0])
            scales = {bits: weight_limit(weight, held, bits, method) for bits, method in _METHODS.items()}
            several = sum(each.weight.node == weight.node for each in found.values())
            found[weight.node + (f":{several}" if several else "")] = _Quantized(weight, node.name, held.size, scales)
    return found


def _with_bits(base: Model, quantized: Mapping[str, _Quantized], bits: Mapping[str, int]) -> Model:
    """A copy of a quantized model whose layers have other numbers of bits."""
    made = base.copy()
    for name, each in quantized.items():
        node = made.graph.nodes[each.node]
        node.attr["num_bits"].i = bits[name]
        scale = each.scales[bits[name]]
        node.op = PER_CHANNEL if scale.ndim else PER_TENSOR
        for ref, limit in zip(node.input[1:3], (-scale, scale), strict=True):
            made.graph.set_constant(split(ref)[0], limit)
    made.graph.sweep()
    return made


def _layers(
    model: Model, where: Sites, quantized: Mapping[str, _Quantized], signature: str, rows: Dataset
) -> list[Layer]:
    """The layers, each with the error that it brings on its own to the float model, once its bias is corrected."""
    weights = tuple(each.weight for each in quantized.values())
    only_weights = dataclasses.replace(where, weights=weights, activations={}, tied=())
    errors: dict[int, dict[str, float]] = {}
    for bits in _BITS:
        noisy = model.copy()
        insert(noisy, only_weights, {}, bits, _METHODS[bits])
        correct(noisy, signature, rows, Log())
        changes: dict[str, dict[str, np.ndarray]] = {name: {} for name in quantized}
        biases = {bias.layer: bias for bias in _biases(noisy, signature, Log())}
        plain = strip(noisy)
        for name, each in quantized.items():
            ref = plain.graph.nodes[each.weight.node].input[each.weight.index]
            changes[name][ref] = _rounded(_constant(plain, ref), each, bits)
            if bias := biases.get(each.weight.node):
                ref = plain.graph.nodes[bias.node].input[bias.index]
                changes[name][ref] = _constant(plain, ref)
                known = bias.node in model.graph.nodes  # otherwise the layer had none
                before = (
                    _constant(model, model.graph.nodes[bias.node].input[bias.index])
                    if known
                    else np.zeros(1, np.float32)
                )
                plain.graph.set_constant(split(ref)[0], np.broadcast_to(before, changes[name][ref].shape))
        errors[bits] = sensitivity(plain, signature, rows, changes)
    return [Layer(name, each.size, {bits: errors[bits][name] for bits in _BITS}) for name, each in quantized.items()]


def _constant(model: Model, ref: str) -> np.ndarray:
    value = model.graph.constant(ref)
    assert value is not None
    return value


def _rounded(value: np.ndarray, each: _Quantized, bits: int) -> np.ndarray:
    """The weights of a layer on their grid."""
    step = each.scales[bits] / (2 ** (bits - 1) - 1)
    flat = value.reshape(*value.shape[:2], -1) if each.weight.layout == DEPTHWISE else value
    return (step * np.round(np.clip(flat, -each.scales[bits], each.scales[bits]) / step)).reshape(value.shape)


PASS = Pass(
    "mixed_precision",
    run,
    options={"max_drop": 0.005, "calibrator": "best", "evaluations": 40},
    needs=("fold_affine",),
    lossless=False,
    learns=True,
    device=True,
    files=("int8", "int4", "mixed"),
    makes=("ranges",),
    keeps=("sparsity", "clusters"),
)
