"""Quantization-aware training by TFMOT, for models that are still Keras 2: `--qat_engine=tfmot`.

A child process trains (tfmot_worker.py): TFMOT wants a process whose Keras is Keras 2. It takes the original with its
layers, not the graph that earlier passes rewrote, and gives back a graph with fake-quant ops, from which the device
files are made as from one that was trained here.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

from absl import logging

from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError
from tfopt.fake_quant import OPS
from tfopt.model import Model, load
from tfopt.passes import Data, merge_duplicates, prune_graph
from tfopt.rewrite import Log

_TIMEOUT = 7 * 24 * 3600.0  # seconds: a training is as long as its owner makes it


def check(passes: list[str]) -> None:
    """Raises TfoptError where TFMOT or Keras 2 is not installed, or no pass of the recipe trains a quantized model."""
    if "train_quantized" not in passes:
        raise TfoptError("--qat_engine=tfmot goes with a recipe that has the pass train_quantized: --recipe=qat_int8")
    for library in ("tensorflow_model_optimization", "tf_keras"):
        if importlib.util.find_spec(library) is None:
            raise TfoptError(
                f"--qat_engine=tfmot needs {library}, which is not installed: pip install 'tfopt[keras2]', or take "
                "--qat_engine=graph"
            )


def trainer(source: str | Path, allow_unsafe: bool = False) -> Callable[..., None]:
    """Returns `train` of one file, as `Data.qat` wants it."""
    return functools.partial(train, source, allow_unsafe)


def train(
    source: str | Path,
    allow_unsafe: bool,
    model: Model,
    log: Log,
    data: Data,
    bits: int,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    alpha: float,
) -> None:
    """Trains the Keras model of a file, and puts what came out into `model`.

    Args:
      source: a Keras file or a SavedModel directory.
      allow_unsafe: run the Python code that it may carry.
      model: gets the graph, with fake-quant ops; its signatures keep their names.
      log: gets what was quantized, and how the loss fell.
      data: with representative rows, labelled rows, or both.
      bits: of the weights: TFMOT has 8.
      epochs, batch_size, learning_rate: of the training; the rate falls along a cosine.
      alpha: the share of the labels in the loss, where there are labels; the rest is the original's answer.

    Raises:
      TfoptError: other bits, or TFMOT refuses the model.
    """
    if bits != 8:
        raise TfoptError(f"--qat_engine=tfmot trains 8-bit weights; received bits={bits}: --qat_engine=graph works")
    logging.info("TFMOT trains %s in a process of its own", source)
    with tempfile.TemporaryDirectory(prefix="tfopt-tfmot-") as work:
        written = Path(work) / "model"
        job = {
            "source": str(source),
            "destination": str(written),
            "ends": {name: (sorted(each.inputs), sorted(each.outputs)) for name, each in model.signatures.items()},
            "main": data.signature,
            "rows": data.rows.inputs if data.rows else None,
            "labelled": data.labelled.inputs if data.labelled else None,
            "labels": data.labelled.labels if data.labelled else None,
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "alpha": alpha,
            "seed": data.seed,
            "allow_unsafe": allow_unsafe,
        }
        try:
            with Child("tfopt.tfmot_worker:worker", {"TF_USE_LEGACY_KERAS": "1"}) as child:
                found = child.ask(job, _TIMEOUT)
        except ChildError as error:
            raise TfoptError(
                f"--qat_engine=tfmot: {source}: {error}; --qat_engine=graph needs no Keras and works"
            ) from error
        trained = load(written, list(model.signatures))
    for lossless in (prune_graph, merge_duplicates):  # each signature comes with a computation of its own
        lossless.run(trained, Log())
    log.applied["fake quantization by TFMOT"] += sum(node.op in OPS for node in trained.graph.nodes.values())
    losses = found["losses"]
    log.notes.append(
        f"trained by TFMOT: loss on {found['held']:,} rows held back: {losses[0]:.4g} before training, "
        f"{min(losses):.4g} after {losses.index(min(losses))} of {epochs} epochs on {found['rows']:,} rows"
    )
    vars(model).update(vars(trained))
