"""distill: what was disturbed answers as the original again, and nothing is done in silence."""

from __future__ import annotations

import numpy as np
import pytest

from tests.passes.quantize_test import digits, graph_classes, learning
from tests.training_test import noised
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.passes import Data, distill
from tfopt.recipe import NAMED, parse
from tfopt.rewrite import Log

__all__ = ["digits"]  # the fixture


def test_it_recovers_without_labels(digits):
    net, (train, _, held, truth) = digits
    worse = noised(net, "serving_default", 0.5)
    before = np.mean(graph_classes(worse, held) == truth)
    log = Log()
    distill.run(worse, log, learning(net, train), epochs=8, min_steps=0, batch_size=32)
    after, best = (np.mean(graph_classes(model, held) == truth) for model in (worse, net))
    assert before < best - 0.1
    assert after > best - 0.02
    assert log.applied["weight trained"] > 3
    assert "rows held back" in log.notes[0]


def test_what_is_not_better_is_no_effect(digits):
    net, (train, *_) = digits
    model, log = net.copy(), Log()
    distill.run(model, log, learning(net, train[:100]), epochs=1, min_steps=0, learning_rate=30.0)
    assert not log.applied and len(log.notes) == 1
    assert all(np.array_equal(model.weights[name], weight) for name, weight in net.weights.items())


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {}, "distill learns from data: give --representative_data"),
        ({"rows": True}, {"epochs": 0}, "with epochs=0 it does nothing"),
        ({"rows": True}, {"optimizer": "lbfgs"}, "optimizer: choose from adam, adamw, sgd; received 'lbfgs'"),
    ],
)
def test_refusals(digits, given, options, message):
    net, (train, *_) = digits
    rows = Dataset({"image": train[:64]}, None, "digits") if given else None
    with pytest.raises(TfoptError, match=message):
        distill.run(net.copy(), Log(), Data("serving_default", net, rows=rows), **options)


def test_it_keeps_zeros_and_clusters_and_undoes_ranges():
    lossless = NAMED["lossless"]["passes"]
    parse([*lossless, "distill", "train_quantized"], "good")
    with pytest.raises(
        TfoptError, match=r"distill would undo the ranges that quantize \(pass 11\) made; put distill b"
    ):
        parse([*lossless, "quantize", "distill"], "bad")
