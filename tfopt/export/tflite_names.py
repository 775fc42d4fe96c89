"""Drops what no runtime reads from a .tflite file, the names of inner tensors, and writes what is equal once.

The converter joins the names of all nodes that became one op, which makes up 15-30% of a small model. Names of inputs,
outputs, signatures and resources stay. They become unique in the file, too, which litert-quantizer asks for.

Weights with a scale for each channel have a zero point for each, as do their biases: zeros, 8 bytes each, twice per
channel. Tables of a flatbuffer may point to the same vector: with one vector of zeros for all of the same length, a
MobileNet of 76,000 int8 weights takes 115,000 bytes instead of 140,000.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

_ALIGNMENT = 16  # of weights, as in the schema (force_align) and for the vector loads of kernels
_LARGE = 1 << 16  # vectors of more bytes are not looked for
_LARGEST = 256 << 20  # beyond, names are nothing, and Python's builder holds several copies


def shorten(content: bytes) -> bytes:
    """Returns an equal model with short tensor names.

    Args:
        content: of a .tflite file.
    """
    if len(content) > _LARGEST:
        return content
    model = unpack(content)
    keys = {each.subgraphIndex: each.signatureKey.decode() for each in model.signatureDefs or []}
    used: set[str] = set()
    for number, subgraph in enumerate(model.subgraphs):
        ends = {int(i) for end in (subgraph.inputs, subgraph.outputs) if end is not None for i in end}
        for i in sorted(ends):
            name = (subgraph.tensors[i].name or b"").decode()
            if name in used:
                name = f"{keys.get(number, number)}/{name}"
            subgraph.tensors[i].name = _unique(name, used)
        for i, tensor in enumerate(subgraph.tensors):
            if i not in ends:
                tensor.name = _unique(f"t{i}" if number == 0 else f"t{number}.{i}", used)
        if number:
            subgraph.name = f"subgraph{number}"
    return pack(model, len(content))


def unpack(content: bytes) -> Any:
    """Reads a .tflite file (into a ModelT of the TFLite schema).

    litert-quantizer may write weights behind the flatbuffer, where the generated code does not look for them.
    """
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    for buffer in model.buffers:
        if buffer.offset > 1:
            buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


def pack(model: Any, size: int = 1 << 20) -> bytes:
    """Returns a model (a ModelT of the TFLite schema) as the content of a .tflite file.

    Args:
        model: spent afterwards.
        size: about how many bytes it will be.
    """
    model.buffers = [_Aligned(buffer) for buffer in model.buffers]
    builder = _Sharing(size)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


class _Sharing(flatbuffers.Builder):
    """Writes equal vectors once. Names are those of the base class."""

    def __init__(self, size: int):
        super().__init__(size)
        self.empty = None  # the one buffer without data
        self._before: int | None = None  # where the vector began
        self._written: dict[tuple[int, int, bytes], int] = {}

    def StartVector(self, elemSize: int, numElems: int, alignment: int) -> int:  # noqa: N802, N803
        self._before, self._size, self._alignment, self._points = self.Offset(), elemSize, alignment, False
        return super().StartVector(elemSize, numElems, alignment)

    def PrependUOffsetTRelative(self, off: int) -> None:  # noqa: N802
        self._points = True  # an element that counts from its own place
        super().PrependUOffsetTRelative(off)

    def EndVector(self, numElems: int | None = None) -> int:  # noqa: N802, N803
        end = super().EndVector(numElems)
        before, self._before = self._before, None
        if before is None:
            return end  # a string, which begins without StartVector
        start = len(self.Bytes) - end
        length = 4 + self._size * int.from_bytes(self.Bytes[start : start + 4], "little")
        if self._points or length > _LARGE:
            return end
        key = self._size, self._alignment, bytes(self.Bytes[start : start + length])
        if key in self._written:
            self.head = len(self.Bytes) - before  # what follows is written over it
        return self._written.setdefault(key, end)


class _Aligned:
    """A buffer that is packed on the schema's alignment, which the generated code forgets."""

    def __init__(self, buffer: Any):
        self._buffer = buffer

    def Pack(self, builder: Any) -> int:  # noqa: N802 - called by the generated code
        data = self._buffer.data
        vector = None
        if data is None and builder.empty is not None:
            return builder.empty
        if data is not None:
            payload = np.asarray(data, np.uint8).tobytes()
            builder.StartVector(1, len(payload), _ALIGNMENT)
            builder.head -= len(payload)
            builder.Bytes[builder.head : builder.head + len(payload)] = payload
            builder.vectorNumElems = len(payload)
            vector = builder.EndVector()
        schema.BufferStart(builder)
        if vector is not None:
            schema.BufferAddData(builder, vector)
        end = schema.BufferEnd(builder)
        if data is None:
            builder.empty = end
        return end


def _unique(name: str, used: set[str]) -> str:
    while name in used:
        name += "_"
    used.add(name)
    return name
