"""The TFLite files that can be asked for, by name, and the engines that can make each of them.

An engine is a task of the worker (tflite_worker.py) with its options. Where a name has several, all are tried and the
best file is kept: none wins on all models. Measured on trained and untrained models: litert-quantizer's own moving
average of the ranges of activations cuts off what is rare (14 against 36 dB on a dense net), and helps where outliers
are noise; GPTQ gains 2-5 dB on fully connected layers; per-channel MSE and OSCAR were never better than these.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LITERT, OLD = "litert", "tflite-2.14"
RUNTIMES = (LITERT, OLD)

BLOCKS = (32, 64, 128, 256)
NAMES = (
    "float32",
    "float16",
    "dynamic_int8",
    "dynamic_int4",
    *(f"dynamic_int4_b{size}" for size in BLOCKS),
    "weight_int8",
    "weight_int4",
    "int8",
    "int16x8",
    "int4",
    "mixed",
)
# Integer activations: their ranges come from representative rows, or from the fake-quant nodes of a graph.
STATIC = ("int8", "int16x8", "int4", "mixed")


@dataclass(frozen=True)
class Engine:
    """A way to make a file.

    Attributes:
        by: what the notes call it.
        task: of the worker: "convert" or "quantize".
        options: of the task.
        needs_rows: whether it cannot do without representative rows.
    """

    by: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs_rows: bool = False


def engines(
    name: str, runtime: str = LITERT, fake_quantized: Path | None = None, trained: bool = False
) -> list[Engine]:
    """Returns the engines for a name, the one to take where nothing can be compared first.

    Args:
        name: one of NAMES.
        runtime: one of RUNTIMES.
        fake_quantized: a SavedModel with fake-quant nodes, whose ranges are used beside calibrated ones.
        trained: those nodes were trained: no others are.
    """
    if name in STATIC:
        ranges = [Engine("the ranges in the graph", "convert", {"saved_model": str(fake_quantized), "ranges": True})]
        found = ranges if fake_quantized and name != "int16x8" else []
        return found if found and (trained or name == "mixed") else [*found, *_static(name)]
    if name == "float32":
        return [_converter()]
    if name == "float16":
        return [_converter(), _weights(16, "weight", "float_casting")]
    mode, bits, block = _parse(name)
    made = [_weights(bits, mode, algorithm, block) for algorithm in _ALGORITHMS if bits == 4 or algorithm != "OCTAV"]
    if name == "dynamic_int8":
        # Per channel, a dense layer becomes FULLY_CONNECTED version 12, which runtimes before TF 2.17 cannot load.
        per_channel = Engine("the converter, per-channel dense layers", "convert", {"per_channel_dense": True})
        made = [_converter(), *([per_channel] if runtime == LITERT else []), *made]
    return made


_ALGORITHMS = ("min_max_uniform_quantize", "OCTAV", "GPTQ")


def _converter() -> Engine:
    return Engine("the converter", "convert", {"per_channel_dense": False})


def _weights(bits: int, mode: str, algorithm: str, block: int = 0) -> Engine:
    words = {"OCTAV": ", OCTAV", "GPTQ": ", GPTQ"}.get(algorithm, "")
    options = {"mode": mode, "bits": bits, "block": block, "algorithm": algorithm}
    return Engine(f"litert-quantizer{words}", "quantize", options, needs_rows=algorithm == "GPTQ")


def _static(name: str) -> list[Engine]:
    if name == "mixed":
        return []
    options = {"mode": "static", "bits": 4 if name == "int4" else 8, "block": 0}
    options["activation_bits"] = 16 if name == "int16x8" else 8
    found = []
    for ranges, words in (("widest", ""), ("averaged", ", averaged ranges")):
        for algorithm in ("min_max_uniform_quantize", *(["OCTAV"] if name == "int4" else [])):
            by = f"litert-quantizer{words}{', OCTAV' if algorithm == 'OCTAV' else ''}"
            found.append(Engine(by, "quantize", {**options, "algorithm": algorithm, "ranges": ranges}, needs_rows=True))
    if name != "int4":  # of which the converter knows nothing without fake-quant nodes
        found.insert(0, Engine("the converter", "convert", {}, needs_rows=True))
    return found


def _parse(name: str) -> tuple[str, int, int]:
    """Returns mode, bits and block size (0: per channel) of a name such as `dynamic_int4_b32`."""
    mode, kind, *block = name.split("_")
    return mode, int(kind.removeprefix("int")), int(block[0][1:]) if block else 0
