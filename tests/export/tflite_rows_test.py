from __future__ import annotations

import numpy as np
import pytest

from tfopt.data import Dataset
from tfopt.export.tflite_rows import not_finite, pick


def test_rows_are_evenly_spaced_and_whole_inputs_stay():
    data = Dataset({"x": np.arange(10.0), "limits": np.arange(3.0)}, None, "", frozenset({"limits"}))
    arrays, whole = pick(data, 4)
    assert arrays["x"].tolist() == [0, 3, 6, 9] and arrays["limits"].tolist() == [0, 1, 2] and whole == {"limits"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named(value):
    image = np.zeros((4, 2, 2), np.float32)
    image[2, 1, 1] = value
    data = Dataset({"id": np.arange(4), "text": np.array([b""] * 4, object), "image": image}, None, "some.npz")
    assert not_finite("score", data) == (
        "the representative data (some.npz) are bad: input 'image' of signature 'score' is NaN or infinite in row 2; "
        "leave these out"
    )


def test_sound_rows():
    assert not_finite("score", Dataset({"x": np.zeros((3, 2)), "y": np.float32(1.0).reshape(())}, None, "")) is None
