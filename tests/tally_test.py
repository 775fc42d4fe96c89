"""Metrics merge exactly: any cut, order and tree of merges gives the same bits as one look at all rows."""

from __future__ import annotations

import fractions
import math
import pickle

import numpy as np
import pytest
from sklearn import metrics as sklearn

from tfopt.errors import TfoptError
from tfopt.exact_sum import ExactSum
from tfopt.scores import class_scores
from tfopt.tally import METRICS, tally

ROWS = 700


def cases(seed):
    """name -> (metric, scores, labels)."""
    random = np.random.default_rng(seed)
    binary, classes = random.integers(0, 2, ROWS), random.integers(0, 7, ROWS)
    logits, table = random.standard_normal(ROWS) + binary, random.standard_normal((ROWS, 7))
    p = 1 / (1 + np.exp(-logits))
    shares = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)
    mostly = np.where(np.arange(ROWS) == random.integers(ROWS), 1.25, p)  # one row says that they are logits
    wild = random.standard_normal((ROWS, 3)) * 10.0 ** random.integers(-150, 150, (ROWS, 3))
    named = {
        "probabilities": (p, binary),
        "probabilities in float32": (p.astype(np.float32)[:, None], binary[:, None]),
        "logits": (logits, binary),
        "all but one a probability": (mostly, binary),
        "ties": (np.round(logits, 1), binary),
        "two columns": (np.stack([1 - p, p], axis=1), np.eye(2)[binary]),
    }
    many = {"softmax": (shares, classes), "logits": (table, classes), "float32": (table.astype(np.float32), classes)}
    ids = {"class ids": (random.integers(0, 4, ROWS), random.integers(0, 4, ROWS))}
    values = {"wild": (wild, wild[::-1]), "float32": (table.astype(np.float32), shares)}
    steps = {"steps": (random.standard_normal((ROWS, 3, 4)), random.integers(0, 4, (ROWS, 3)))}
    given = {
        **{"accuracy": {**named, **many, **ids, **steps}, "f1": {**named, **many, **ids, **steps}, "top5": many},
        **{"auc": named, "logloss": {**named, **many, **steps}, "mse": values, "rmse": values, "mae": values},
    }
    return {f"{name}, {what}": (name, *pair) for name, of in given.items() for what, pair in of.items()}


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("case", cases(0))
@pytest.mark.parametrize("seed", range(3))
def test_any_cut_order_and_tree_gives_the_same_bits(case, seed, reduce):
    random = np.random.default_rng(seed)
    name, scores, labels = cases(seed)[case]
    whole = tally(name)
    whole.add(scores, labels)
    parts = []
    for rows in np.array_split(random.permutation(ROWS), np.sort(random.integers(0, ROWS, random.integers(1, 60)))):
        part = tally(name)
        for some in np.array_split(rows, 2):  # of which one may be empty
            part.add(scores[some], labels[some])
        parts.append(part)
    if reduce:  # as Beam does: by key, then all
        keyed: dict[int, list] = {}
        for part in parts:
            for key, piece in part.parts():
                keyed.setdefault(key, []).append(pickle.loads(pickle.dumps(piece)))
        assert len(keyed) > 1 if name == "auc" else set(keyed) == {0}
        parts = [pickle.loads(pickle.dumps(merged(pieces, random).reduced())) for pieces in keyed.values()]
    found = merged(parts, random)
    assert found.value() == whole.value() and found.counts() == whole.counts()
    assert whole.value().samples == found.counts()["rows"] == ROWS


def merged(parts, random):
    """Merges tallies in a random tree."""
    while len(parts) > 1:
        one, two = (parts.pop(random.integers(len(parts))) for _ in range(2))
        one.merge(pickle.loads(pickle.dumps(two)))
        parts.append(one)
    return parts[0]


def test_auc_is_rounded_once():
    random = np.random.default_rng(1)
    labels = random.integers(0, 2, 2000)
    scores = np.round(random.standard_normal(2000), 2)
    found = tally("auc")
    found.add(scores, labels)
    ahead = scores[labels == 1][:, None] - scores[labels == 0]
    wins = 2 * int((ahead > 0).sum()) + int((ahead == 0).sum())
    assert found.value().value == float(fractions.Fraction(wins, 2 * ahead.size))
    assert found.value().value == pytest.approx(sklearn.roc_auc_score(labels, scores), abs=1e-12)
    assert found.counts() == {"rows": 2000, "positives": int(labels.sum()), "negatives": int((1 - labels).sum())}


def test_auc_of_more_rows_than_64_bits_hold():
    found = tally("auc")
    found.add(np.array([0.25, 0.5, 0.75, 0.75]), np.array([0, 1, 0, 1]))
    scores, rows = found._table()
    found._chunks = [(scores, rows * 2**34)]
    found.rows *= 2**34
    assert found.value().value == found.reduced().value().value == (2 + 3) / 8


def test_zeros_of_either_sign_are_one_score():
    found = tally("auc")
    found.add(np.array([-0.0, 0.0, -1.0, -5e-324]), np.array([1, 0, 0, 0]))
    assert found.value().value == 2.5 / 3
    assert sorted(key for key, _ in found.parts()) == [0x400F, 0x7FFF, 0x8000]


def test_a_range_that_was_reduced_takes_no_more():
    one, two = tally("auc"), tally("auc")
    one.add(np.array([0.5, 0.5]), np.array([0, 1]))
    two.add(np.array([0.51]), np.array([1]))
    with pytest.raises(ValueError, match="same range"):
        one.reduced().merge(two.reduced())
    reduced = one.reduced()
    reduced.merge(two)
    with pytest.raises(ValueError, match="more rows"):
        reduced.value()


@pytest.mark.parametrize("name", ["logloss", "accuracy", "f1"])
def test_counts_and_terms_of_a_row_do_not_depend_on_its_batch(name):
    random = np.random.default_rng(3)
    for columns in (1, 2, 3, 7, 64, 1000):
        scores = (random.standard_normal((97, columns)) * 8).astype(np.float32)
        labels = random.integers(0, max(columns, 2), 97)
        whole, by_row = tally(name), tally(name)
        whole.add(np.asfortranarray(scores), labels)
        for start, end in zip([0, 1, 2, 5, 30], [1, 2, 5, 30, 97], strict=True):
            by_row.add(scores[start:end], labels[start:end])
        assert whole.value() == by_row.value() and whole.counts() == by_row.counts()


def test_counts():
    found = tally("f1")
    found.add(np.array([0.9, 0.8, 0.2, 0.1, 0.7]), np.array([1, 0, 1, 0, 1]))
    assert found.counts() == {"rows": 5, "hits": 3, "positives": 3, "tp": 2, "fp": 1, "fn": 1, "tn": 1}
    assert found.value().value == 2 / 3
    several = tally("accuracy")
    several.add(np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 1, 2]))
    assert several.counts() == {"rows": 4, "hits": 3}


def test_not_a_number_is_counted_over_all_rows():
    for name in METRICS:
        found, other = tally(name), tally(name)
        width = 2 if name in ("accuracy", "top5", "f1", "logloss") else 1
        scores = np.ones((10, width))
        found.add(scores, np.zeros((10, 1)))
        scores[3] = np.nan
        other.add(scores, np.zeros((10, 1)))
        other.merge(found)
        (_, part), *_ = other.parts()
        for each in (other, pickle.loads(pickle.dumps(part.reduced()))):
            with pytest.raises(TfoptError, match=f"^{name}: the scores hold NaN or infinity in 1 of 20 rows$"):
                each.value()


def test_rows_of_another_form_are_refused_and_change_nothing():
    found, other = tally("accuracy"), tally("accuracy")
    found.add(np.eye(3), np.arange(3))
    other.add(np.eye(2), np.arange(2))
    words = r"accuracy: the scores of a row change between batches, from float64\[3\] to float64\[2\]$"
    for wrong in (lambda: found.add(np.eye(2), np.arange(2)), lambda: found.merge(other)):
        with pytest.raises(TfoptError, match=words):
            wrong()
    with pytest.raises(TfoptError, match="class ids from 0 to 2"):
        found.add(np.eye(3), np.arange(3) + 1)
    assert found.counts() == {"rows": 3, "hits": 3} and found.value().value == 1
    with pytest.raises(TfoptError, match="accuracy: received no rows"):
        tally("accuracy").value()
    with pytest.raises(ValueError, match="auc"):
        found.merge(tally("auc"))


SUMS = {
    "random": np.random.default_rng(0).standard_normal(5000),
    "all exponents": np.ldexp(1 / 3 + np.arange(5000), np.random.default_rng(2).integers(-1074, 1000, 5000)),
    "cancels": np.array([1e300, -1e300, 1e-300]),
    "cancels and is least": np.array([1.7e308, 5e-324, -1.7e308]),
    "subnormal": np.array([5e-324, 5e-324, 5e-324, 1e-310]),
    "largest": np.full(9, 1.7976931348623157e308),
    "nothing": np.zeros(3),
    "none": np.zeros(0),
}  # fmt: skip


@pytest.mark.parametrize("what", SUMS)
def test_sums_are_exact(what):
    numbers = SUMS[what]
    total = ExactSum()
    total.add(numbers)
    exact = sum(map(fractions.Fraction, numbers.tolist()))
    assert fractions.Fraction(total.units, 2**1126) == exact
    if what != "largest":  # whose sum, unlike its mean, is no float64
        assert total.mean(1) == math.fsum(numbers)
    assert total.mean(max(len(numbers), 1)) == float(exact / max(len(numbers), 1))


def test_sums_hold_infinity_and_nan():
    for numbers in ([1.0, np.inf], [np.inf, 1.0, np.inf]):
        total = ExactSum()
        for x in numbers:
            total.add(np.array([x]))
        assert total.mean(2) == np.inf
    total.add(np.array([-np.inf]))
    assert math.isnan(total.mean(3))
    squares = tally("mse")
    squares.add(np.array([1e200, 0.0]), np.zeros(2))
    assert squares.value().value == np.inf


def test_class_scores_are_in_c_order():
    scores, _ = class_scores(np.asfortranarray(np.ones((3, 2), np.float32)), np.zeros(3), 1)
    assert scores.flags.c_contiguous and scores.dtype == np.float64
