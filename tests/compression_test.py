"""A Keras 3 model, an Estimator and a raw tf.Module, all without their source: pruned, clustered, and recovered.

The original alone says what is right; labels are only for the score.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import REPO
from tests.origins import save_module, spec
from tfopt import recipe
from tfopt.data import Dataset
from tfopt.function import Function
from tfopt.model import Model, load
from tfopt.passes import Data, get
from tfopt.pruning.kernels import kernels
from tfopt.rewrite import Log
from tfopt.trainable import promote
from tfopt.training import Settings, fine_tune

CLUSTERS = 16


@dataclasses.dataclass
class Subject:
    """A model, rows to train on, others to compare on, and how good an answer to these is."""

    model: Model
    rows: Dataset
    others: dict[str, np.ndarray]
    quality: Callable[[np.ndarray], float]

    def answer(self, model: Model) -> np.ndarray:
        """The scores of the other rows."""
        with Function(model) as function:
            found = function("serving_default", self.others)
        return next(value for _, value in sorted(found.items(), reverse=True) if value.dtype == np.float32)

    def score(self, model: Model) -> tuple[float, float]:
        """Accuracy or AUC, and the root mean square of what differs from the original's scores."""
        answer = self.answer(model)
        return self.quality(answer), float(np.sqrt(np.mean((answer - self.answer(self.model)) ** 2)))


def _digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return (data.images[order] / 16).astype(np.float32), data.target[order]


def _accuracy(labels):
    return lambda scores: float(np.mean(scores.argmax(1) == labels))


def keras3(path, shared):
    images, labels = _digits()
    images = images[..., None]
    rows = Dataset({"image": images[:1200]}, None, "digits")
    model = load(REPO / "saved_models" / "digits", ["serving_default"])
    return Subject(model, rows, {"image": images[1200:]}, _accuracy(labels[1200:]))


def raw_module(path, shared):
    class Net(tf.Module):
        def __init__(self):
            super().__init__()
            random, sizes = np.random.default_rng(1), (64, 96, 64, 10)
            pairs = list(itertools.pairwise(sizes))
            self.kernels = [tf.Variable(random.normal(0, (2 / a) ** 0.5, (a, b)).astype(np.float32)) for a, b in pairs]
            self.biases = [tf.Variable(tf.zeros(b)) for _, b in pairs]

        @tf.function(input_signature=[spec(None, 8, 8)])
        def serving_default(self, x):
            h = tf.reshape(x, [-1, 64])
            for kernel, bias in zip(self.kernels[:-1], self.biases[:-1], strict=True):
                h = tf.nn.relu(h @ kernel + bias)
            return {"scores": tf.nn.softmax(h @ self.kernels[-1] + self.biases[-1])}

    save_module(path, Net(), "serving_default")
    model = load(path)
    images, labels = _digits()
    rows = Dataset({"x": images[:1200]}, labels[:1200], "digits")
    settings = Settings(epochs=40, learning_rate=3e-3, batch_size=64, patience=0)
    fine_tune(model, "serving_default", None, None, rows, settings)
    rows = dataclasses.replace(rows, labels=None)
    return Subject(model, rows, {"x": images[1200:]}, _accuracy(labels[1200:]))


def estimator(path, shared):
    from sklearn.metrics import roc_auc_score

    from benchmarks.chicago_taxi import labels as tips
    from benchmarks.samples import taxi_records

    records = {split: np.array(taxi_records(split, 4000), object) for split in ("Split-train", "Split-eval")}
    truth = tips(list(records["Split-eval"]))
    known = ~np.isnan(truth)

    model = load(shared / "models" / "tfx-chicago-taxi" / "estimator_serving")
    rows = Dataset({"inputs": records["Split-train"]}, None, "taxi trips")
    quality = lambda scores: float(roc_auc_score(truth[known], scores[known, 1]))  # noqa: E731
    return Subject(model, rows, {"inputs": records["Split-eval"]}, quality)


def compressed(subject: Subject, sparsity: float, **training) -> Model:
    """Pruned and clustered by the passes of a recipe."""
    model = subject.model.copy()
    for name, options in recipe.read("lossless").steps:
        get(name).run(model, Log(), **options)
    data = Data("serving_default", subject.model, rows=subject.rows)
    for name, options in (("prune_magnitude", {"sparsity": sparsity}), ("cluster", {"clusters": CLUSTERS})):
        log = Log()
        get(name).run(model, log, data, **options, **training)
        assert log.applied
    return model


@pytest.mark.parametrize(("make", "sparsity"), [(keras3, 0.97), (raw_module, 0.8), (estimator, 0.8)])
def test_pruned_clustered_and_recovered(make, sparsity, tmp_path, shared):
    subject = make(tmp_path / "model", shared)
    without = compressed(subject, sparsity, epochs=0)
    model = compressed(subject, sparsity, epochs=10, batch_size=64, learning_rate=3e-3)
    (original, _), (lost, apart), (back, near) = (subject.score(each) for each in (subject.model, without, model))
    print(f"{make.__name__}: {original:.4f} before, {lost:.4f} compressed, {back:.4f} recovered; ", end="")
    print(f"scores are off by {apart:.4f} before training, and by {near:.4f} after")
    assert near < 0.8 * apart
    assert back > original - 0.015
    model = model.copy()
    found = [model.weights[kernel.name] for kernel in kernels(model, promote(model, "serving_default"))]
    pruned = [kernel for kernel in found if np.mean(kernel == 0) > 0.3]
    zeros = sum(np.count_nonzero(kernel == 0) for kernel in pruned) / sum(kernel.size for kernel in pruned)
    assert pruned and zeros > sparsity - 0.05
    assert all(len(np.unique(kernel)) <= CLUSTERS for kernel in pruned)
