"""Quantizes a float32 .tflite file by litert-quantizer.

Which precision a layer gets is decided here, layer by layer, and becomes a recipe: a 4-bit file has 8 bits where there
is no 4-bit kernel, a blockwise one has per-channel scales where the inputs of a layer do not divide into blocks, and a
layer whose scales would take more room than its weights save stays in float. A weight of n values, b bits and c
channels saves n (4 - b / 8) bytes, and costs 12 c bytes for scales and zero points. A clustered kernel of 8 bits has
one scale, so that it has no more values in the file than before.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from litert_quantizer import algorithm_manager, calibrator, qtyping, quantizer, recipe, recipe_manager
from litert_quantizer.utils import qsv_utils

from tfopt.errors import TfoptError
from tfopt.export.tflite_file import TfliteFile
from tfopt.export.tflite_kinds import OLD
from tfopt.export.tflite_names import shorten
from tfopt.export.tflite_old_runtime import LACKING
from tfopt.export.tflite_rows import calls
from tfopt.invariants import has_one_table

_Algorithm, _Op, _Grain = quantizer.AlgorithmName, qtyping.TFLOperationName, qtyping.QuantGranularity
_DEQUANTIZE = 200  # bytes that an op with its tensor takes, about
_GPTQ_INPUTS = 2048  # a layer of n inputs needs n x n floats for its Hessian

# Operator in the file -> name in a recipe, and the axis of its weights that holds the channels.
_LAYERS = {
    "FULLY_CONNECTED": (_Op.FULLY_CONNECTED, 0),
    "CONV_2D": (_Op.CONV_2D, 0),
    "DEPTHWISE_CONV_2D": (_Op.DEPTHWISE_CONV_2D, -1),
    "TRANSPOSE_CONV": (_Op.CONV_2D_TRANSPOSE, 0),
    "EMBEDDING_LOOKUP": (_Op.EMBEDDING_LOOKUP, 0),
    "BATCH_MATMUL": (_Op.BATCH_MATMUL, -1),
}


class _Layer(NamedTuple):
    kind: str  # of _LAYERS
    scope: str  # by which a recipe finds it
    shape: tuple[int, ...]  # of its weights
    fits: bool  # whether the last axis of its input is that of its weights
    clustered: bool  # whether they have few distinct values, which one scale keeps few

    def __str__(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))}"


class _Precision(NamedTuple):
    bits: int
    grain: qtyping.QuantGranularity


def quantize(job: Mapping[str, Any]) -> list[str]:
    """Writes `job["path"]`: the float32 file with quantized weights and, in mode "static", activations.

    Args:
        job: see tflite_kinds.Engine; beside `mode`, `bits`, `block`, `dense`, `others` and `activation_bits` the
            fields `float32`, `signatures`, `rows`, `io_type` and `runtime`.

    Returns:
        What a reader of the report should know.

    Raises:
        TfoptError: no layer can have the precision that was asked for.
    """
    made = quantizer.Quantizer(job["float32"])
    rules, notes = _rules(job)
    made.load_quantization_recipe(rules)
    ranges = None
    if job["mode"] == "static":
        ranges = _ranges(job)
    elif job["dense"] == _Algorithm.GPTQ:
        with _calibration():
            ranges = made.calibrate(calls(job), num_threads=1)
    content = made.quantize(ranges, enable_progress_report=False).quantized_model
    Path(job["path"]).write_bytes(shorten(bytes(content)))
    return notes


def _rules(job: Mapping[str, Any]) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the recipe and the notes."""
    manager = recipe_manager.RecipeManager()
    static = job["mode"] == "static"
    if static:
        manager.add_static_config(".*", _Op.ALL_SUPPORTED, job["activation_bits"], 8)
        left = [] if job["io_type"] == "int8" and job["activation_bits"] == 8 else [_Op.INPUT, _Op.OUTPUT]
        if job["runtime"] == OLD:
            left += [_Op(name) for name in sorted(LACKING[f"INT{job['activation_bits']}"])]
        for op in left:
            manager.add_quantization_config(".*", op, algorithm_key=_Algorithm.NO_QUANTIZE)
    found: dict[tuple[str, str, _Precision], list[str]] = defaultdict(list)
    coarser: Counter[str] = Counter()
    small: Counter[str] = Counter()
    wanted = _Precision(job["bits"], _Grain[f"BLOCKWISE_{job['block']}"] if job["block"] else _Grain.CHANNELWISE)
    for layer in _layers(job["float32"]):
        if static and job["bits"] == 8 and not layer.clustered:  # the rule for all is right
            continue
        algorithm, precision = _choose(job, layer, wanted)
        if precision is None:
            continue
        if not static and _saved(layer, precision, job["mode"]) <= 0:
            small[str(layer)] += 1
            continue
        if precision != wanted and not (precision.grain == _Grain.TENSORWISE and precision.bits == wanted.bits):
            coarser[f"{precision.bits} bits for {layer}"] += 1
        found[layer.kind, algorithm, precision].append(layer.scope)
    nothing = not any(precision.bits == wanted.bits for _, _, precision in found)
    if (nothing and not (static and job["bits"] == 8)) or (
        job["block"] and not any(precision == wanted for _, _, precision in found)
    ):
        blocks = f" whose inputs divide into blocks of {job['block']}" if job["block"] else ""
        raise TfoptError(f"no layer{blocks} is large enough and has a kernel for {job['bits']}-bit weights")
    for (kind, algorithm, precision), scopes in found.items():
        config = _config(job, precision, algorithm)
        regex = f"^(?:{'|'.join(map(re.escape, scopes))})$"
        manager.add_quantization_config(regex, _LAYERS[kind][0], config, algorithm)
    notes = []
    if coarser:
        grain = f", per channel: not {job['bits']} bits in blocks of {job['block']}" if job["block"] else ""
        notes.append(f"layers that have no such kernel: {_listed(coarser)}{grain}")
    if small:
        notes.append(f"left in float, too small to gain: {_listed(small)}")
    return manager.get_quantization_recipe(), notes


def _layers(path: str) -> list[_Layer]:
    """Returns the ops with constant float weights."""
    found = []
    file = TfliteFile(path)
    clustered = {name for names, array in file.constants() if has_one_table(array) for name in names}
    for op in file.operators():
        if op.name not in _LAYERS:
            continue
        weights = [
            t for t in op.inputs[: 3 if op.name == "TRANSPOSE_CONV" else 2] if t.constant and t.type == "FLOAT32"
        ]
        if weights:
            shape = weights[-1].shape
            fits = op.inputs[0].shape[-1:] == shape[-1:]
            scope = "".join(f"{t.name};" for t in op.outputs)
            found.append(_Layer(op.name, scope, shape, fits, weights[-1].name in clustered))
    return found


def _choose(job: Mapping[str, Any], layer: _Layer, wanted: _Precision) -> tuple[str, _Precision | None]:
    """Returns algorithm and precision for a layer: the finest that has a kernel; None where none has one."""
    options = [wanted, _Precision(wanted.bits, _Grain.CHANNELWISE), _Precision(8, _Grain.CHANNELWISE)]
    if job["runtime"] == OLD and job["mode"] == "dynamic" and wanted.bits == 8:
        if layer.kind == "FULLY_CONNECTED":  # with more scales than one, tflite-runtime 2.14 computes wrongly
            options = [_Precision(wanted.bits, _Grain.TENSORWISE)]
        elif layer.kind == "TRANSPOSE_CONV":
            return "", None
    if layer.clustered and wanted.bits == 8:
        options.insert(0, _Precision(8, _Grain.TENSORWISE))
    if job["mode"] == "static":  # what has no 4-bit kernel has its 8 bits from the rule for all
        options = options[:1]
    dense = layer.kind == "FULLY_CONNECTED" and layer.fits and layer.shape[-1] <= _GPTQ_INPUTS
    for precision in options:
        if precision.grain.startswith("BLOCKWISE") and layer.shape[-1] % job["block"]:
            continue
        algorithm = job["dense"] if dense else job["others"]
        if _has_kernel(layer, _config(job, precision, algorithm), algorithm):
            return algorithm, precision
    return "", None


def _has_kernel(layer: _Layer, config: qtyping.OpQuantizationConfig, algorithm: str) -> bool:
    try:
        algorithm_manager.check_op_quantization_config(algorithm, _LAYERS[layer.kind][0], config)
    except ValueError:
        return False
    return True


def _config(job: Mapping[str, Any], precision: _Precision, algorithm: str) -> qtyping.OpQuantizationConfig:
    dtype = qtyping.TensorDataType.FLOAT if algorithm == _Algorithm.FLOAT_CASTING else qtyping.TensorDataType.INT
    weights = qtyping.TensorQuantizationConfig(
        num_bits=precision.bits, symmetric=True, granularity=precision.grain, dtype=dtype
    )
    if job["mode"] == "static":
        bits = job["activation_bits"]
        activations = qtyping.TensorQuantizationConfig(num_bits=bits, symmetric=bits == 16)
        return qtyping.OpQuantizationConfig(activations, weights, qtyping.ComputePrecision.INTEGER)
    if job["mode"] == "weight":
        return qtyping.OpQuantizationConfig(None, weights, qtyping.ComputePrecision.FLOAT, explicit_dequantize=True)
    return qtyping.OpQuantizationConfig(None, weights, qtyping.ComputePrecision.INTEGER)


def _saved(layer: _Layer, precision: _Precision, mode: str) -> float:
    """Returns the bytes that a layer saves."""
    channels = 1 if precision.grain == _Grain.TENSORWISE else layer.shape[_LAYERS[layer.kind][1]]
    scales = 0 if precision.bits == 16 else 12 * channels
    return prod(layer.shape) * (4 - precision.bits / 8) - scales - (_DEQUANTIZE if mode == "weight" else 0)


def _listed(counts: Counter[str], limit: int = 6) -> str:
    parts = [f"{count} x {what}" if count > 1 else what for what, count in sorted(counts.items())]
    return ", ".join(parts[:limit]) + (f" and {len(parts) - limit} more kinds" if len(parts) > limit else "")


_seen: dict[tuple[str, ...], dict[str, dict[str, np.ndarray]]] = {}  # one calibration serves all static files


def _ranges(job: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Returns the ranges of all tensors: the widest seen, where litert-quantizer's default is a moving average."""
    key = (job["float32"], *job["signatures"])
    if key not in _seen:
        manager = recipe_manager.RecipeManager()
        manager.load_quantization_recipe(recipe.static_wi8_ai8())
        run = calibrator.Calibrator(job["float32"], num_threads=1, qsv_update_func=qsv_utils.min_max_update)
        with _calibration():
            run.calibrate(calls(job), manager)
        _seen[key] = run.get_model_qsvs()
    return _seen[key]


@contextlib.contextmanager
def _calibration() -> Iterator[None]:
    """Says what litert-quantizer's error means."""
    try:
        yield
    except ValueError as error:
        if "Tensor data is null" not in str(error):
            raise
        raise TfoptError(
            "calibration cannot read the tensors of loops and branches, nor outputs that nothing uses"
        ) from error
