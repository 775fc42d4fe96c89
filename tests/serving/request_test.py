"""Requests: rows are encoded, those that agree in what is sent once are one call, and outputs stand as the rows do."""

from __future__ import annotations

import numpy as np
import pytest

from tests.serving import examples
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.serving.encode import columns
from tfopt.serving.request import aligned, call

USERS = np.array([[1.0], [1.0], [2.0], [1.0]], np.float32)
ITEMS = np.arange(4, dtype=np.float32)[:, None]


def test_rows_that_agree_are_one_call():
    calls = []

    def run(inputs):
        calls.append(inputs)
        return {"y": inputs["user"] * 10 + inputs["item"]}

    steps = [{"step": "once", "inputs": ["user"]}]
    outputs = call(steps, run, {"user": USERS, "item": ITEMS, "scale": np.float32(1)})
    assert outputs["y"][:, 0].tolist() == [10, 11, 22, 13]
    assert [len(inputs["item"]) for inputs in calls] == [2, 1, 1]
    assert all(inputs["user"].shape == (1, 1) for inputs in calls)


def test_without_steps_it_is_a_plain_call():
    assert call((), lambda inputs: inputs, {"x": ITEMS})["x"] is ITEMS


def test_what_does_not_fit_is_an_error_of_one_line():
    steps = [{"step": "narrow", "inputs": {"id": {"dtype": "uint8"}}}]
    with pytest.raises(TfoptError, match="input 'id', row 1: 300 does not fit uint8"):
        call(steps, dict, {"id": np.array([1, 300])})


def test_aligned_arrays():
    rows = Dataset({"user": USERS, "item": ITEMS}, None, "test")
    same = aligned(rows, ["us*"])
    assert same.inputs["user"].tolist() == [[1.0]] * 4 and same.inputs["item"] is ITEMS


def test_aligned_examples():
    drawn = examples.rows(4)
    rows = Dataset({"examples": examples.serialize(drawn)}, None, "test")
    same = aligned(rows, ["age", "hist*", "company"])
    wanted = {name: {"dtype": "float32", "shape": [1]} for name in ("age",)} | {
        name: {"dtype": "int64", "shape": None} for name in ("history", "clicks")
    }
    from tfopt.serving.encode import encode

    found = encode([{"step": "features", "input": "examples", "features": wanted}], same.inputs)
    own = columns(wanted, drawn)
    assert found["age"][:, 0].tolist() == [pytest.approx(drawn[0]["age"])] * 4
    assert [each.tolist() for each in found["history"]] == [drawn[0]["history"]] * 4
    assert [each.tolist() for each in found["clicks"]] == [each.tolist() for each in own["clicks"]]
