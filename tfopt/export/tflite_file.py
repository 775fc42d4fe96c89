"""What the interpreter does not tell about a .tflite file: its ops, their versions, and how tensors are stored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

OP_NAMES = {value: name for name, value in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
_TYPES = {value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
_FLOATS = ("FLOAT32", "FLOAT16")
_DTYPES = {
    kind: np.dtype({"FLOAT32": "float32", "FLOAT16": "float16", "INT4": "int8"}.get(kind, kind.lower()))
    for kind in ("FLOAT32", "FLOAT16", "INT4", "INT8", "INT16", "INT32", "INT64")
}
_EDGES = ("QUANTIZE", "DEQUANTIZE")  # which only change the type


def builtin(code: Any) -> int:
    """The operator that an OperatorCodeT stands for: small numbers are in the older field."""
    return max(code.builtinCode, code.deprecatedBuiltinCode)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file.

    Attributes:
        name: unique in files that tfopt writes.
        type: as in the schema: "FLOAT32", "INT8", ...
        shape: dimensions; -1 where unknown.
        constant: whether the file holds its value.
        quantized: whether it has a scale.
        per_channel: whether it has several scales.
        blocks: whether each of them is for a block of values.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    constant: bool
    quantized: bool
    per_channel: bool
    blocks: bool


@dataclass(frozen=True)
class Operator:
    """An op of a file; absent inputs are left out."""

    name: str
    version: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class TfliteFile:
    """A .tflite file, read."""

    def __init__(self, path: str | Path):
        self._model = schema.ModelT.InitFromPackedBuf(Path(path).read_bytes(), 0)

    def operators(self) -> Iterator[Operator]:
        """Yields the ops of all subgraphs."""
        for subgraph in self._model.subgraphs:
            tensors = [self._tensor(tensor) for tensor in subgraph.tensors]
            for op in subgraph.operators or []:
                code = self._model.operatorCodes[op.opcodeIndex]
                name = OP_NAMES[builtin(code)]
                ends = [() if end is None else end for end in (op.inputs, op.outputs)]
                inputs, outputs = (tuple(tensors[i] for i in end if i >= 0) for end in ends)
                yield Operator(name if name != "CUSTOM" else code.customCode.decode(), code.version, inputs, outputs)

    def weights(self, *types: str) -> int:
        """Returns the number of constants of these types."""
        return sum(
            _TYPES[tensor.type] in types and self._model.buffers[tensor.buffer].data is not None
            for subgraph in self._model.subgraphs
            for tensor in subgraph.tensors
        )

    def constants(self) -> list[tuple[set[str], np.ndarray]]:
        """Returns the weights (constants with an axis that are float or have a scale), each with the tensors it is.

        Those of 4 bits come as int8.
        """
        named: dict[int, set[str]] = {}
        arrays: dict[int, np.ndarray] = {}
        for subgraph in self._model.subgraphs:
            for tensor in subgraph.tensors:
                data, found = self._model.buffers[tensor.buffer].data, self._tensor(tensor)
                if data is None or found.type not in _DTYPES or not found.shape:
                    continue
                if not (found.quantized or found.type in _FLOATS):
                    continue
                raw = np.frombuffer(bytes(data), _DTYPES[found.type])
                if found.type == "INT4":  # two a byte, the first in the lower half
                    raw = np.stack([np.left_shift(raw, 4) >> 4, raw >> 4], 1).ravel()[: math.prod(found.shape)]
                named.setdefault(tensor.buffer, set()).add(found.name)
                arrays[tensor.buffer] = raw.reshape(found.shape)
        return [(names, arrays[buffer]) for buffer, names in named.items()]

    def float_ops(self) -> dict[str, int]:
        """Returns the ops that compute in float, with their number."""
        found: Counter[str] = Counter(
            op.name
            for op in self.operators()
            if op.name not in _EDGES and any(t.type in _FLOATS for t in (*op.inputs, *op.outputs))
        )
        return dict(sorted(found.items()))

    def select_ops(self) -> list[str]:
        """Returns the TensorFlow ops that only the Flex delegate runs."""
        codes = {(code.customCode or b"").decode() for code in self._model.operatorCodes}
        return sorted(code.removeprefix("Flex") for code in codes if code.startswith("Flex"))

    def _tensor(self, tensor: Any) -> Tensor:
        quantization = tensor.quantization
        scales = 0 if quantization is None or quantization.scale is None else len(quantization.scale)
        blocks = getattr(quantization, "detailsType", 0) == schema.QuantizationDetails.BlockwiseQuantization
        shape = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
        return Tensor(
            name=(tensor.name or b"").decode(),
            type=_TYPES[tensor.type],
            shape=tuple(int(size) for size in (shape if shape is not None else ())),
            constant=self._model.buffers[tensor.buffer].data is not None,
            quantized=scales > 0 or blocks,
            per_channel=scales > 1 or blocks,
            blocks=blocks,
        )
