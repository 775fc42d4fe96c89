"""Several artifacts in one pass: the numbers are NumPy's, whatever the batches; failures and bars."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import tensorflow as tf

from tests.comparison_test import Linear
from tfopt import evaluation_bars, metrics
from tfopt.errors import TfoptError
from tfopt.evaluation import evaluate
from tfopt.evaluation_text import WIDTH, draw
from tfopt.side_by_side import Job, Seen, joined, reduced

KERNEL = np.arange(12, dtype=np.float32).reshape(4, 3) / 10


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """A, B whose first score is higher by 0.25, and C: B as a .tflite file with other names and a batch of 8."""
    root = tmp_path_factory.mktemp("artifacts")
    module = Linear(apart=0.25, batch=8, names=("input_1", "Identity"))
    converter = tf.lite.TFLiteConverter.from_concrete_functions([module.serve.get_concrete_function()], module)
    (root / "c.tflite").write_bytes(converter.convert())
    return [Linear().save(root / "a"), Linear(apart=0.25).save(root / "b"), str(root / "c.tflite")]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """50 rows, the labels of which A gets right but for five."""
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    labels = (x @ KERNEL).argmax(1)
    labels[::10] = (labels[::10] + 1) % 3
    path = tmp_path_factory.mktemp("rows") / "rows.npz"
    np.savez(path, x=x, label=labels)
    return str(path)


@pytest.fixture(scope="module")
def found(artifacts, rows):
    return evaluate(artifacts, rows, metrics=["accuracy", "logloss"], output="scores", batch_size=16)


def test_numbers_are_those_of_numpy(found, artifacts, rows):
    x, labels = (np.load(rows)[name] for name in ("x", "label"))
    ours = x @ KERNEL
    theirs = ours + np.array([0.25, 0, 0], np.float32)
    assert [result.path for result in found.results] == artifacts and found.rows == 50
    for result, scores in zip(found.results, (ours, theirs, theirs), strict=True):
        assert result.metrics["accuracy"] == metrics.score("accuracy", scores, labels)
        assert result.metrics["logloss"].value == pytest.approx(metrics.score("logloss", scores, labels).value)
        assert result.counts["accuracy"]["hits"] == np.count_nonzero(scores.argmax(1) == labels)
    assert found.results[0].equivalence is None and found.results[0].metrics["accuracy"].value == 0.9
    for result in found.results[1:]:
        scores, classes = (result.equivalence.outputs[name] for name in ("scores", "class"))
        assert scores.absolute == pytest.approx(0.25) and scores.relative == pytest.approx(0.25 / np.abs(ours).max())
        changed = np.flatnonzero(ours.argmax(1) != theirs.argmax(1))
        assert scores.agreement == 1 - len(changed) / 50 == 1 - classes.unequal / 50 < 1
        assert [row for _, row in classes.worst] == changed.tolist()[:10]
        assert result.equivalence.max_error == float("inf") and result.failure is None
    assert any("output 'scores' of A is taken for 'Identity' of C" in note for note in found.notes)


@pytest.mark.parametrize("size", [1, 8, 7, 64])
def test_batches_do_not_matter(found, artifacts, rows, size):
    again = evaluate(artifacts, rows, metrics=["accuracy"], output="scores", batch_size=size)
    for result, other in zip(found.results, again.results, strict=True):
        assert result.counts["accuracy"] == other.counts["accuracy"]


def test_text_and_json(found):
    text = draw(found, worst=2)
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "-0.0" in text and "worst rows (error)" in text and "the same" not in text
    facts = json.loads(found.to_json())
    assert facts["rows"] == 50 and facts["artifacts"][0]["metrics"]["accuracy"] == 0.9
    assert facts["artifacts"][1]["outputs"]["scores"]["absolute"] == pytest.approx(0.25)


def test_without_labels(artifacts, tmp_path):
    np.savez(tmp_path / "x.npz", x=np.eye(4, dtype=np.float32))
    found = evaluate(artifacts, str(tmp_path / "x.npz"))
    assert found.rows == 4 and found.results[1].equivalence.outputs["scores"].absolute == pytest.approx(0.25)
    assert found.results[2].equivalence.outputs["scores"].rows == 4  # of a batch of 8
    with pytest.raises(TfoptError, match="accuracy needs labels, and there are none"):
        evaluate(artifacts, str(tmp_path / "x.npz"), metrics=["accuracy"], output="scores")


def test_one_artifact_alone(artifacts, rows):
    found = evaluate(artifacts[:1], rows, metrics=["accuracy"], output="scores")
    assert found.problems(bars={"accuracy": 0.9}) == []
    (line,) = found.problems(bars={"accuracy": 0.91})
    assert line.endswith("accuracy is 0.9, worse than 0.91")
    assert "max error" not in draw(found)


def test_an_artifact_that_fails_on_some_rows(artifacts, rows, tmp_path):
    class Fragile(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def serve(self, x):
            with tf.control_dependencies([tf.debugging.assert_less(tf.reduce_max(x), 2.0, "x is too large")]):
                return {"scores": x @ tf.constant(KERNEL), "class": tf.argmax(x @ tf.constant(KERNEL), 1)}

    fragile = Fragile()
    tf.saved_model.save(fragile, str(tmp_path / "fragile"), {"serving_default": fragile.serve})
    given = [artifacts[0], str(tmp_path / "fragile"), artifacts[1]]
    found = evaluate(given, rows, metrics=["accuracy"], output="scores", batch_size=4)
    assert "x is too large" in found.results[1].failure and not found.results[1].metrics
    assert found.results[2].failure is None and found.results[2].metrics["accuracy"].samples == 50
    (problem,) = found.problems()
    assert problem == found.results[1].failure and problem.startswith(f"{given[1]}: ") and "FAILED" in draw(found)
    with pytest.raises(TfoptError, match="x is too large"):
        evaluate(given[1:], rows)


@pytest.mark.parametrize(
    "bars, words",
    [
        ({"max_accuracy_drop": 0.5, "max_error": float("inf"), "min_agreement": 0.1}, []),
        ({"max_accuracy_drop": 0.0}, ["accuracy falls by", "accuracy falls by"]),
        ({"max_error": 0.01}, ["the error is inf, more than max_error=0.01"] * 2),
        ({"min_agreement": 1.0}, ["less than min_agreement=1"] * 2),
        ({"bars": {"accuracy": 0.99, "logloss": 0.1}}, ["accuracy is", "logloss is"] * 2),
    ],
)
def test_bars(found, bars, words):
    lines = found.problems(**bars)
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


@pytest.mark.parametrize(
    "artifacts, bars, message",
    [
        (1, {"max_error": 0.1}, "max_error=0.1 needs a second artifact"),
        (2, {"max_accuracy_drop": 0.1}, "max_accuracy_drop=0.1 needs a metric"),
        (2, {"bars": {"auc": 0.9}}, "the bar auc=0.9 is on what is not measured: nothing"),
    ],
)
def test_bars_on_what_is_not_measured(artifacts, bars, message):
    with pytest.raises(TfoptError, match=message):
        evaluation_bars.check(artifacts, [], **bars)


def test_pieces_in_any_order_give_the_whole(artifacts, rows):
    from tfopt import batches
    from tfopt.counterparts import opened

    with opened(artifacts[:2], "AB") as both:
        job = Job(tuple(both.asked), ("accuracy", "mse"), "scores")
        seen = []
        for batch in batches.cut(rows, both.specs, size=8):
            labels = np.load(rows)["x"][batch.start : batch.start + len(batch), :3]
            for metric, fitting in (("accuracy", batch), ("mse", batch.__class__(batch.inputs, labels, "x"))):
                one = Seen(Job(job.asked, (metric,), "scores"))
                one.add(Job(job.asked, (metric,), "scores"), both.programs, fitting)
                seen.append(one)

    def merged(order):
        found = {}
        for one in order:
            for key, piece in pickle.loads(pickle.dumps(list(one.pieces()))):
                if key in found:
                    found[key].merge(piece)
                else:
                    found[key] = piece
        return joined(job, [reduced(key, piece) for key, piece in found.items()])

    forward, backward = merged(seen), merged(seen[::-1])
    for key, each in forward.tallies.items():
        assert each.value() == backward.tallies[key].value()
    assert forward.equivalences[1].outputs == backward.equivalences[1].outputs and forward.rows == 100


def test_messages(artifacts, rows):
    def message(*arguments, **options) -> str:
        with pytest.raises(TfoptError) as error:
            evaluate(*arguments, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "one artifact is evaluated by a metric" in message(artifacts[:1], rows)
    assert "--metric: unknown 'nope'" in message(artifacts, rows, metrics=["nope"])
    assert "has no signature 'nope'" in message(artifacts, rows, signature="nope")
    assert "no output 'nope': choose from class, scores" in message(artifacts, rows, metrics=["auc"], output="nope")
    assert "wants labels called 'truth'" in message(artifacts, rows, label="truth")
    assert "no such file" in message(artifacts, "/no/such.npz")
