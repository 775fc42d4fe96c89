"""Entropy of weights, from arrays and from artifacts."""

from __future__ import annotations

import numpy as np
import pytest

from tfopt.errors import TfoptError
from tfopt.weight_statistics import arrays_of, statistics


def test_two_values_are_one_bit_each():
    found = statistics([np.array([0, 1.5] * 512, np.float32)])
    assert found == (1024, 512, 2, 1024.0, 128 + 2 * 4)


def test_arrays_add_up_and_none_is_coded_larger_than_it_is():
    random = np.random.default_rng(0).normal(size=100).astype(np.float32)
    found = statistics([random, np.zeros(64, np.int8)])
    assert found.elements == 164 and found.zeros == 64 and found.distinct == 101
    assert found.bits == pytest.approx(100 * np.log2(100))
    assert found.coded_bytes == 400 + 1


def test_nothing_is_nothing():
    assert statistics([]) == (0, 0, 0, 0.0, 0)
    assert statistics([np.zeros((0, 3))]).elements == 0


def test_of_a_saved_model_variables_and_constants(built):
    arrays = list(arrays_of(built("keras3_export")))
    assert arrays and all(array.dtype.kind == "f" and array.ndim for array in arrays)


def test_of_no_model(tmp_path):
    with pytest.raises(TfoptError, match="weights cannot be read"):
        list(arrays_of(tmp_path))
