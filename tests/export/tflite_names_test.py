from __future__ import annotations

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from tfopt import runtime
from tfopt.export.tflite_names import shorten, unpack

NAMES = ("kws_ref_model.tflite", "kws_ref_model_float32.tflite")


@pytest.mark.parametrize("name", NAMES)
def test_an_equal_smaller_model(shared, tmp_path, name):
    source = shared / "models/kws-ds-cnn" / name
    content = source.read_bytes()
    short = shorten(content)
    assert len(short) < 0.95 * len(content)
    assert shorten(short) == short
    (tmp_path / "short.tflite").write_bytes(short)
    rows = {"input_1": np.load(shared / "data/kws/kws01_first500.npz")["input_1"][:20]}
    with runtime.open(source, threads=1) as a, runtime.open(tmp_path / "short.tflite", threads=1) as b:
        assert a.signatures == b.signatures
        want, got = (each.run("serving_default", rows)["Identity"] for each in (a, b))
    np.testing.assert_array_equal(got, want)


def test_weights_are_aligned_and_names_unique(shared):
    short = shorten((shared / "models/kws-ds-cnn" / NAMES[0]).read_bytes())
    model = schema.Model.GetRootAs(short)
    buffers = [model.Buffers(i) for i in range(model.BuffersLength())]
    starts = [b._tab.Vector(b._tab.Offset(4)) for b in buffers if b.DataLength()]
    assert starts and all(start % 16 == 0 for start in starts)
    tensors = schema.ModelT.InitFromPackedBuf(short, 0).subgraphs[0].tensors
    assert len({tensor.name for tensor in tensors}) == len(tensors)


def test_weights_behind_the_flatbuffer_come_in(shared):
    content = (shared / "models/kws-ds-cnn" / NAMES[1]).read_bytes()
    want = [buffer.data for buffer in unpack(content).buffers]
    model = unpack(content)
    behind = b""
    for written in (False, True):  # as litert-quantizer does: offsets of the same length first
        start = -(-len(_packed(model)) // 16) * 16 if written else 16
        behind = b""
        for buffer, data in zip(model.buffers, want, strict=True):
            if data is not None:
                buffer.data, buffer.offset, buffer.size = None, start + len(behind), len(data)
                behind += np.asarray(data, np.uint8).tobytes() + b"\0" * (-len(data) % 16)
    head = _packed(model)
    outside = head + b"\0" * (-len(head) % 16) + behind
    got = [buffer.data for buffer in unpack(outside).buffers]
    for expected, received in zip(want, got, strict=True):
        assert (expected is None) == (received is None) and (expected is None or np.array_equal(expected, received))
    assert shorten(outside) == shorten(content)


def _packed(model) -> bytes:
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())
