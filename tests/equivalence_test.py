"""The summary of how far outputs are apart, against `verify.difference`, and against itself in other groupings."""

from __future__ import annotations

import pickle

import ml_dtypes
import numpy as np
import pytest

from tfopt.equivalence import BOUNDS, Equivalence
from tfopt.verify import difference

FLOATS = ["float64", "float32", "float16", "bfloat16", "complex64", "complex128"]


def outputs(random, rows, dtype):
    """Two arrays (rows, 5) that are near to each other, near, or far in places, NaN or infinite in some."""
    a = random.standard_normal((rows, 5)) * 10.0 ** random.integers(-3, 4)
    b = a * (1 + random.choice([0, 1e-6, 1e-3, 1]) * random.standard_normal(a.shape))
    if dtype in FLOATS:
        if dtype.startswith("c"):
            a, b = a + 1j * a[::-1], b + 1j * a[::-1]
        if random.random() < 0.5:
            at = random.random(a.shape) < 0.1
            a[at] = random.choice([np.nan, np.inf, -np.inf])
            b[at] = a[at]
        if random.random() < 0.3:
            b[random.integers(rows), 2] = random.choice([np.nan, np.inf, 1e30])
        with np.errstate(over="ignore"):
            return [x.astype(getattr(ml_dtypes, dtype) if dtype == "bfloat16" else dtype) for x in (a, b)]
    whole = (np.round(x).astype(np.int64) for x in (a, b))
    if dtype == "string":
        return (np.array([[b"%d" % x for x in row] for row in each], object) for each in whole)
    return (each.astype(dtype) for each in whole)


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "uint8", "bool", "string"])
@pytest.mark.parametrize("seed", range(20))
def test_on_one_call_it_is_what_verify_says(dtype, seed):
    a, b = outputs(np.random.default_rng(seed), 7, dtype)
    found, wanted = Equivalence(), difference({"y": a, "z": a}, {"y": b, "z": a})
    found.add({"y": a, "z": a}, {"y": b, "z": a})
    assert (found.broken, found.absolute, found.relative) == (wanted.broken, wanted.absolute, wanted.relative)
    assert found.max_error == (np.inf if dtype not in FLOATS and wanted.broken else wanted.relative)


@pytest.mark.parametrize(
    ("received", "words"),
    [
        ({}, "output 'y' is missing"),
        ({"y": np.zeros((3, 4))}, "output 'y' changed from float64[rows, 2] to float64[rows, 4]"),
        ({"y": np.zeros((3, 2), np.float32)}, "output 'y' changed from float64[rows, 2] to float32[rows, 2]"),
        ({"y": np.zeros((1, 2))}, "output 'y' changed from float64[3, 2] to float64[1, 2]"),
        ({"y": np.zeros(())}, "output 'y' changed from float64[3, 2] to float64[]"),
    ],
)
def test_what_cannot_be_compared_is_named(received, words):
    expected = {"y": np.zeros((3, 2)), "z": np.zeros(())}
    found = Equivalence()
    found.add(expected, {"z": np.zeros(()), **received})
    assert found.broken == words and found.max_error == np.inf and found.rows == 3
    assert bool(difference(expected, {"z": np.zeros(()), **received}).broken)
    whole = Equivalence()
    whole.add(expected, expected)
    whole.merge(found)
    assert whole.broken == words and whole.rows == 6


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "string"])
@pytest.mark.parametrize("seed", range(6))
def test_any_order_and_grouping_gives_the_same(dtype, seed):
    random = np.random.default_rng(seed)
    a, b = outputs(random, 200, dtype)
    ids = [f"data[{row}]" for row in range(200)]
    whole = Equivalence()
    whole.add({"y": a}, {"y": b}, ids)
    parts = []
    for rows in np.array_split(random.permutation(200), np.sort(random.integers(0, 200, random.integers(1, 30)))):
        part = Equivalence()
        for some in np.array_split(rows, 2):
            part.add({"y": a[some]}, {"y": b[some]}, [ids[row] for row in some])
        parts.append(part)
    while len(parts) > 1:
        one, two = (parts.pop(random.integers(len(parts))) for _ in range(2))
        one.merge(pickle.loads(pickle.dumps(two)))
        parts.append(one)
    assert parts[0].outputs == whole.outputs and parts[0].rows == whole.rows == 200
    assert (parts[0].broken, parts[0].agreement) == (whole.broken, whole.agreement)


def test_numbers_by_hand():
    a = np.array([[1.0, 2, 8], [4, 3, 0], [0, 0, 1]])
    b = a + np.array([[0, 0.5, 0], [0, 1.75, 0], [0, 0, 0.125]])
    found = Equivalence()
    found.add({"y": a, "n": np.array([1, 2, 3])}, {"y": b, "n": np.array([1, 2, 4])}, ["p", "q", "r"])
    y, n = found.outputs["y"], found.outputs["n"]
    assert (y.absolute, y.scale, y.relative) == (1.75, 8, 1.75 / 8)
    assert y.powers == {-1: 1, 0: 1, -3: 1} and y.unequal == 3 and y.elements == 9
    assert y.worst == [(1.75, "q"), (0.5, "p"), (0.125, "r")] and n.worst == [(1, "r")]
    assert (y.hits, y.scored, found.agreement, n.agreement) == (2, 3, 2 / 3, None)
    assert found.outputs["n"].broken("n") == "output 'n' (int64) is not equal in 1 of 3"


def test_the_scale_is_that_of_all_rows():
    found = Equivalence()
    for scale in (1.0, 1000.0):
        found.add({"y": np.array([scale])}, {"y": np.array([scale + 0.01])})
    assert found.relative == found.absolute / 1000 < BOUNDS["float64"] and found.broken is None
    assert difference({"y": np.array([1.0])}, {"y": np.array([1.01])}).broken


def test_of_many_rows_the_worst_are_kept():
    errors = np.random.default_rng(0).permutation(1000) // 2
    found = Equivalence()
    for rows in np.array_split(np.arange(1000), 7):
        found.add({"y": np.zeros(len(rows))}, {"y": errors[rows].astype(float)}, rows.tolist())
    assert (
        found.outputs["y"].worst
        == sorted(((float(e), i) for i, e in enumerate(errors)), key=lambda w: (-w[0], w[1]))[:10]
    )
    found.add({"y": np.zeros(3)}, {"y": np.full(3, np.inf)}, [7, 3, 5])
    assert [row for _, row in found.outputs["y"].worst[:3]] == [3, 5, 7]
