"""Batching in the graph: whole requests along a new axis."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tensorflow as tf

from tests.serving.tuning.simulation_test import curve
from tfopt import runtime
from tfopt.errors import TfoptError
from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.tuning import curve as tuning_curve
from tfopt.serving.tuning import in_graph
from tfopt.serving.tuning.choice import Workload

USER, ITEMS = (1, 4), (6, 3)


class Ranker(tf.Module):
    """Scores 6 candidates for a user: no input shares dimension 0 with another."""

    def __init__(self, items=ITEMS):
        super().__init__()
        self.kernel = tf.Variable(tf.random.stateless_normal((7, 5), seed=(1, 2)))
        self.head = tf.Variable(tf.random.stateless_normal((5, 1), seed=(3, 4)))
        self.score = tf.function(
            self._score,
            input_signature=[
                tf.TensorSpec(USER, tf.float32, name="user"),
                tf.TensorSpec(items, tf.float32, name="items"),
            ],
        )

    def _score(self, user, items):
        rows = tf.concat([tf.repeat(user, tf.shape(items)[0], axis=0), items], 1)
        scores = (tf.nn.relu(rows @ self.kernel) @ self.head)[:, 0]
        return {"score": scores, "best": tf.argmax(scores)}


@pytest.fixture(scope="module")
def ranker(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranker") / "model"
    module = Ranker()
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.score})
    return path


def rows(count):
    random = np.random.default_rng(1)
    return [{"user": random.random(USER, np.float32), "items": random.random(ITEMS, np.float32)} for _ in range(count)]


def test_concurrent_requests_get_their_own_answers(ranker, tmp_path):
    parameters = BatchingParameters(
        max_batch_size=4, allowed_batch_sizes=(1, 2, 4), batch_timeout_micros=20_000, num_batch_threads=2
    )
    in_graph.write_batched(ranker, "serving_default", parameters, tmp_path / "out")
    asked = rows(12)
    answers: list = [None] * len(asked)
    with (
        runtime.open(ranker) as original,
        runtime.open(tmp_path / "out", loader=runtime.SESSION) as batched,  # as TensorFlow Serving loads it
    ):
        assert batched.signatures["serving_default"].inputs == original.signatures["serving_default"].inputs

        def ask(index):
            answers[index] = batched.run("serving_default", asked[index])

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for inputs, answer in zip(asked, answers, strict=True):
            want = original.run("serving_default", inputs)
            np.testing.assert_allclose(answer["score"], want["score"], rtol=1e-5)
            assert answer["best"] == want["best"]


def test_stacked_requests(ranker, tmp_path):
    in_graph.write_stacked(ranker, "serving_default", tmp_path / "out")
    asked = rows(5)
    with runtime.open(ranker) as original, runtime.open(tmp_path / "out", loader=runtime.SESSION) as stacked:
        together = stacked.run("serving_default", {n: np.stack([row[n] for row in asked]) for n in ("user", "items")})
        for b, row in enumerate(asked):
            want = original.run("serving_default", row)
            np.testing.assert_allclose(together["score"][b], want["score"], rtol=1e-5)


def test_open_shapes_are_refused(tmp_path):
    module = Ranker(items=(None, 3))
    tf.saved_model.save(module, str(tmp_path / "m"), signatures={"serving_default": module.score})
    with pytest.raises(TfoptError, match=r"--in_graph: input 'items' of signature .* has shape \(None, 3\)"):
        in_graph.write_stacked(tmp_path / "m", "serving_default", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tuning_writes_the_model_where_batching_pays(ranker, tmp_path, monkeypatch):
    for contention, name in ((2.0, "on"), (1.0, "off")):
        made = curve(0.01, 0.0) if name == "on" else curve(0.0, 0.01, contention=contention)
        monkeypatch.setattr(tuning_curve, "measure", lambda *_, made=made, **__: made)
        output = tmp_path / name
        found = in_graph.tune(ranker, Workload(None, 100), output, signature="serving_default", check=False)
        assert output.exists() == (found.parameters is not None) == (name == "on")
        assert found.model == str(ranker)
    with pytest.raises(TfoptError, match="--in_graph: puts whole requests together"):
        in_graph.tune(ranker, Workload(None, 100, 2), tmp_path / "no", signature="serving_default")
