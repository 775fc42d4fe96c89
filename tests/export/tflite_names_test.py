from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from tfopt import runtime
from tfopt.export.tflite_names import shorten

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
