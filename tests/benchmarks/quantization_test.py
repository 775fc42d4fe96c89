from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks import quantization
from benchmarks.quantization_cases import predict


@pytest.fixture()
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(quantization, "FILES", tmp_path)
    cells = {
        "float32": {"accuracy": 0.92, "samples": 10_000, "bytes": 4000, "gzip": 3000, "ratio": 1.0, "note": ""},
        "tflite_int8": {"accuracy": 0.9175, "samples": 10_000, "bytes": 1500, "gzip": 900, "ratio": 1.5, "note": ""},
        "tfmot_qat": {"error": "RuntimeError: refused"},
        "tfopt_int8": {"bytes": 1400, "gzip": 800, "note": "", "error": "RuntimeError: refused"},
    }
    (tmp_path / "net.json").write_text(json.dumps(cells))


def test_a_table_compares_with_float_and_numbers_its_reasons_once(results):
    lines = quantization.table(["net"]).splitlines()
    assert lines[2] == "| net | float32 | 92.00% | +0.00 | 10,000 | 4,000 | 3,000 | 1.00 |  |"
    assert lines[3] == "| net | tflite_int8 | 91.75% | -0.25 | 10,000 | 1,500 | 900 | 1.50 |  |"
    assert lines[4].startswith("| net | tfmot_qat | none |")
    assert lines[4].endswith("| [1] |")
    assert "does not run" in lines[5]
    assert lines[5].endswith("| [1] |")
    assert lines[6:] == ["", "[1] RuntimeError: refused"]
    assert {line.count("|") for line in lines[:6]} == {10}


def test_rows_are_chosen_by_name_or_group():
    assert quantization._wanted("") == []
    assert quantization._wanted("tfopt,latency") == [*quantization.TFOPT_ROWS, "latency"]
    with pytest.raises(SystemExit, match="unknown row int7"):
        quantization._wanted("int7")


def test_training_recipes_get_the_epochs_of_the_peers(tmp_path):
    from tfopt import recipe

    source = quantization._with_epochs("qat_int4", 7, tmp_path / "recipe.json")
    (options,) = (options for name, options in recipe.read(source).steps if name == "train_quantized")
    assert options["epochs"] == 7
    assert options["bits"] == 4


@pytest.mark.parametrize("batch", [None, 1])
def test_scores_come_in_the_order_of_the_rows(batch):
    class Program:
        signatures = {"serving_default": type("Signature", (), {"inputs": {}})}  # noqa: RUF012

        def run(self, signature, inputs):
            return {"scores": inputs["x"] * 2}

    spec = type("Spec", (), {"name": "x", "shape": (batch, 3)})
    Program.signatures["serving_default"].inputs = {"x": spec}
    rows = np.arange(21.0).reshape(7, 3)
    np.testing.assert_array_equal(predict(Program(), rows, "x", batch=2), rows * 2)
