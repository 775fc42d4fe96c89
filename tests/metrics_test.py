"""Metrics against scikit-learn and against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sklearn

from tfopt import metrics
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.report import Metric

RANDOM = np.random.default_rng(0)
LABELS = RANDOM.integers(0, 2, 1000)
CLASSES = RANDOM.integers(0, 12, 1000)
LOGITS = RANDOM.standard_normal((1000, 12))


def value(name, scores, labels):
    return metrics.score(name, scores, labels).value


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("decimals", [0, 1, 2, 16])
@pytest.mark.parametrize("shape", ["column", "vector", "two columns"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auc_is_that_of_scikit_learn_with_ties_and_without(decimals, shape, dtype):
    scores = np.round(LABELS * 0.7 + RANDOM.standard_normal(1000), decimals).astype(dtype)
    given = {"column": scores[:, None], "vector": scores, "two columns": np.stack([-scores, scores], axis=1)}[shape]
    assert value("auc", given, LABELS) == pytest.approx(sklearn.roc_auc_score(LABELS, scores), abs=1e-12)


def test_auc_by_hand():
    assert value("auc", np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert value("auc", np.ones(4), np.array([0, 0, 1, 1])) == 0.5
    with pytest.raises(TfoptError, match="both classes"):
        value("auc", np.ones(4), np.ones(4))


@pytest.mark.parametrize("labels", [CLASSES, CLASSES[:, None], CLASSES.astype(np.float32), np.eye(12)[CLASSES]])
@pytest.mark.parametrize("scores", [LOGITS, LOGITS[:, None, None, :], softmax(LOGITS).astype(np.float32)])
def test_class_metrics_are_those_of_scikit_learn(scores, labels):
    predicted = LOGITS.argmax(axis=1)
    assert value("accuracy", scores, labels) == sklearn.accuracy_score(CLASSES, predicted)
    assert value("top5", scores, labels) == sklearn.top_k_accuracy_score(CLASSES, LOGITS, k=5)
    assert value("f1", scores, labels) == pytest.approx(
        sklearn.f1_score(CLASSES, predicted, average="macro"), abs=1e-12
    )
    assert value("logloss", scores, labels) == pytest.approx(sklearn.log_loss(CLASSES, softmax(LOGITS)), rel=1e-6)


@pytest.mark.parametrize("logits", [True, False])
def test_a_single_column_is_a_probability_or_a_logit(logits):
    x = RANDOM.standard_normal(1000) + LABELS
    p = 1 / (1 + np.exp(-x))
    scores = (x if logits else p)[:, None]
    assert value("accuracy", scores, LABELS) == np.mean((p > 0.5) == LABELS)
    assert value("f1", scores, LABELS) == pytest.approx(sklearn.f1_score(LABELS, p > 0.5), abs=1e-12)
    assert value("logloss", scores, LABELS) == pytest.approx(sklearn.log_loss(LABELS, p), abs=1e-12)


def test_class_ids_are_compared_and_quantized_columns_refused():
    assert value("accuracy", np.array([[3], [1]], np.int64), np.array([3, 2])) == 0.5
    with pytest.raises(TfoptError, match="quantized int8"):
        value("accuracy", np.array([[3], [1]], np.int8), np.array([1, 0]))


def test_the_steps_of_a_sequence_count():
    scores = np.eye(3)[np.array([[0, 1], [2, 2]])]
    assert value("accuracy", scores, np.array([[0, 1], [2, 0]])) == 0.75


def test_equal_scores_do_not_make_top5_perfect():
    assert value("top5", np.zeros((10, 10)), np.arange(10)) == 0.5


def test_regression_metrics_never_broadcast():
    scores, labels = np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 0.0, 1.0])
    assert value("mse", scores, labels) == pytest.approx(13 / 3)
    assert value("rmse", scores, labels) == pytest.approx(np.sqrt(13 / 3))
    assert value("mae", scores, labels) == pytest.approx(5 / 3)
    with pytest.raises(TfoptError, match=r"\(3, 2\) and \(3, 3\)"):
        value("mse", np.zeros((3, 2)), np.zeros((3, 3)))


@pytest.mark.parametrize("name", metrics.METRICS)
def test_perfect_scores_are_best(name):
    labels = np.array([0, 1, 1, 0])
    perfect = labels.astype(float)[:, None] if name in ("auc", "mse", "rmse", "mae") else np.eye(2)[labels]
    good, bad = (metrics.score(name, s, labels) for s in (perfect, 1 - perfect))
    assert metrics.HIGHER_IS_BETTER[name] == (good.value in (1.0,))
    if name != "top5":  # which two classes cannot fail
        assert metrics.drop(good, bad) > 0 > metrics.drop(bad, good)


@pytest.mark.parametrize(
    ("name", "scores", "labels", "message"),
    [
        ("accuraccy", np.zeros(3), np.zeros(3), "unknown: choose from accuracy, "),
        ("accuracy", np.zeros((3, 2)), np.zeros(4), r"scores \(3, 2\) and labels \(4,\)"),
        ("accuracy", np.zeros((0, 2)), np.zeros(0), "no rows"),
        ("accuracy", np.zeros((3, 2)), np.array([0, 1, 2]), "class ids from 0 to 1, received 2"),
        ("accuracy", np.zeros((3, 2)), np.array([0, 1, 0.5]), "class ids from 0 to 1, received 0.5"),
        ("accuracy", np.zeros((3, 2)), np.full((3, 2), 0.5), "wants one-hot labels"),
        ("accuracy", np.zeros((3, 2)), np.zeros((3, 5)), r"received scores \(3, 2\), labels \(3, 5\)"),
        ("accuracy", np.zeros((3, 4, 2)), np.zeros(3), r"wants scores \(rows,\) or \(rows, classes\)"),
        ("accuracy", np.array([[np.nan, 1]]), np.zeros(1), "scores hold NaN or infinity in 1 of 1 rows"),
        ("mse", np.zeros(2), np.array([np.inf, 1]), "labels hold NaN or infinity in 1 of 2 rows"),
        ("accuracy", np.array([b"a"], object), np.zeros(1), "wants scores that are numbers"),
        ("accuracy", np.zeros((1, 2)), np.array([b"a"], object), "wants labels that are numbers"),
        ("auc", np.zeros((3, 3)), np.zeros(3), "auc: wants scores of 1 to 2 columns"),
        ("top5", np.zeros((3, 1)), np.zeros(3), "2 columns or more"),
    ],
)
def test_what_cannot_be_scored_is_one_clear_line(name, scores, labels, message):
    with pytest.raises(TfoptError, match=message) as caught:
        metrics.score(name, scores, labels)
    assert "\n" not in str(caught.value)


def test_agreement():
    assert metrics.agreement(np.eye(3)[[0, 1, 2, 2]], np.eye(3)[[0, 1, 2, 0]]) == 0.75
    assert metrics.agreement(np.zeros((4, 1)), np.zeros((4, 1))) is None
    assert metrics.agreement(np.zeros(4), np.zeros(4)) is None


@pytest.mark.parametrize(("size", "pad"), [(3, False), (3, True), (10, False), (64, True)])
def test_evaluate_runs_every_row_once(size, pad):
    data = Dataset({"x": np.arange(10), "scale": np.array(2)}, np.arange(10) % 4, "here", whole=frozenset({"scale"}))
    calls = []

    def run(inputs):
        calls.append(len(inputs["x"]))
        assert inputs["scale"] == 2
        return {"scores": np.eye(4)[inputs["x"] % 4], "names": np.full(len(inputs["x"]), b"n", object)}

    assert metrics.evaluate("accuracy", run, data, batch_size=size, pad=pad) == Metric("accuracy", 1.0, 10)
    assert set(calls) == {size} if pad else sum(calls) == 10


def test_evaluate_names_what_is_wrong():
    data = Dataset({"x": np.arange(10)}, np.zeros(10), "data.npz")
    two = {"a": np.zeros((10, 2)), "b": np.zeros((10, 2))}
    for arguments, message in [
        ((lambda _: two, data), "which output holds the scores.* a, b"),
        ((lambda _: two, data, "c"), "no output 'c': choose from a, b"),
        ((lambda _: {"a": np.zeros((1, 2))}, data), r"received \(1, 2\) for 10 rows"),
        ((lambda _: two, Dataset({"x": np.arange(10)}, None, "data.npz")), "data.npz: accuracy needs labels"),
    ]:
        with pytest.raises(TfoptError, match=message):
            metrics.evaluate("accuracy", *arguments)
