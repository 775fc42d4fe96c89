"""The TFLite files that can be asked for, by name, and the engines that can make each of them.

An engine is a task of the worker (tflite_worker.py) with its options. Where a name has several, all are tried and the
best file is kept: none wins on all models. Measured on trained models, and left out for it: litert-quantizer's own
moving average of the ranges of activations, which cuts off what is rare (on rows it had not seen 17 against 27 dB on
kws-ds-cnn, 14 against 36 dB on a dense net), its per-channel MSE search and OSCAR, which were never better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
        return [_converter(), _weights(16, "weight", "float_casting", "float_casting")]
    mode, bits, block = _parse(name)
    made = [_weights(bits, mode, dense, others, block) for dense, others in _ALGORITHMS[bits]]
    if name == "dynamic_int8":
        # Per channel, a dense layer becomes FULLY_CONNECTED version 12, which runtimes before TF 2.17 cannot load.
        per_channel = Engine("the converter, per-channel dense layers", "convert", {"per_channel_dense": True})
        made = [_converter(), *([per_channel] if runtime == LITERT else []), *made]
    return made


_MIN_MAX, _OCTAV, _GPTQ = "min_max_uniform_quantize", "OCTAV", "GPTQ"
# For fully connected layers, and for the others; OCTAV clips the largest weights, which 8 bits need not.
_ALGORITHMS = {
    8: ((_MIN_MAX, _MIN_MAX), (_GPTQ, _MIN_MAX)),
    4: ((_MIN_MAX, _MIN_MAX), (_OCTAV, _OCTAV), (_GPTQ, _MIN_MAX), (_GPTQ, _OCTAV)),
}


def _converter() -> Engine:
    return Engine("the converter", "convert", {"per_channel_dense": False})


def _weights(bits: int, mode: str, dense: str, others: str, block: int = 0) -> Engine:
    options = {"mode": mode, "bits": bits, "block": block, "dense": dense, "others": others}
    words = [word for word in dict.fromkeys((dense, others)) if word in (_OCTAV, _GPTQ)]
    return Engine(", ".join(["litert-quantizer", *words]), "quantize", options, needs_rows=dense == _GPTQ)


def _static(name: str) -> list[Engine]:
    if name == "mixed":
        return []
    options = {"mode": "static", "bits": 8, "block": 0, "activation_bits": 16 if name == "int16x8" else 8}
    options |= {"dense": _MIN_MAX, "others": _MIN_MAX}
    if name == "int4":  # of which the converter knows nothing without fake-quant nodes
        return [
            replace(engine, options={**options, **engine.options, "mode": "static"}, needs_rows=True)
            for engine in (_weights(4, "static", algorithm, algorithm) for algorithm in (_MIN_MAX, _OCTAV))
        ]
    return [
        Engine("the converter", "convert", {}, needs_rows=True),
        Engine("litert-quantizer", "quantize", options, needs_rows=True),
    ]


def _parse(name: str) -> tuple[str, int, int]:
    """Returns mode, bits and block size (0: per channel) of a name such as `dynamic_int4_b32`."""
    mode, kind, *block = name.split("_")
    return mode, int(kind.removeprefix("int")), int(block[0][1:]) if block else 0
