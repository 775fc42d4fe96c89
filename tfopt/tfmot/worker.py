"""The child's side of engine.py: a process whose Keras is Keras 2 prunes, clusters and quantizes by TFMOT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfopt.tfmot import keras_model
from tfopt.tfmot.cluster import cluster
from tfopt.tfmot.examples import examples
from tfopt.tfmot.fold import copied, fold_batch_norms
from tfopt.tfmot.prune import prune
from tfopt.tfmot.quantize import quantize
from tfopt.tfmot.train import Training


def worker() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns the function that does a job: see `_run` for what it takes and gives."""
    import tensorflow_model_optimization  # noqa: F401 - must come before a model of Keras 2 is made

    return _run


def _run(job: dict[str, Any]) -> dict[str, Any]:
    """Loads a model, makes something of it, and writes it as a SavedModel.

    Args:
      job: `task`, prune, cluster or quantize, and its `options`; `source`, a Keras file or a SavedModel;
        `allow_unsafe`; `state`, what an earlier job gave, or None; `destination`; `ends`, signature -> (names of
        inputs, names of outputs); `main`, the signature that the rows are of; `rows` and `labelled`, arrays by input
        name or None; `labels`; `epochs`, `min_steps`, `batch_size`, `learning_rate`, `alpha`, `seed`.

    Returns:
      What the task found; `state`, for the next job of this model: its weights, and whether batch norms were folded.

    Raises:
      TfoptError: the model is none that TFMOT takes, or the data do not fit it.
    """
    import tf_keras

    tf_keras.utils.set_random_seed(job["seed"])
    original = keras_model.load(Path(job["source"]), job["allow_unsafe"])
    ends = {name: keras_model.match(original, name, *sides) for name, sides in job["ends"].items()}
    student, folded = copied(original), False
    if job["state"] is not None:
        weights, folded = job["state"]
        student = fold_batch_norms(student) if folded else student
        student.set_weights(weights)
    if job["task"] == "cluster" and not folded:  # pruning and quantization do better with batch norms
        student, folded = fold_batch_norms(student), True
    found = examples(original, ends[job["main"]][0], job)
    settings = (job[name] for name in ("epochs", "min_steps", "batch_size", "learning_rate", "seed"))
    training = Training(found, *settings) if found else None
    if job["task"] == "quantize":
        assert training is not None
        made, said = quantize(student, training, job["options"])
    else:
        made, said = student, {"prune": prune, "cluster": cluster}[job["task"]](student, training, job["options"])
    keras_model.save(made, ends, job["destination"])
    return {**said, "state": (student.get_weights(), folded)}
