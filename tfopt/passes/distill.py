"""distill: trains the weights to answer as the original does, or as labels say; the structure stays as it is.

min over W of  (1 - alpha) T^2 KL(teacher(x) / T || f(W, x) / T) + alpha CE(y, f(W, x))     (Hinton et al. 2015)

It is the training that follows every compression, as a step by itself: longer, with other settings, or after several
compressions at once. `losses.py` has the whole equation, and regression.
"""

from __future__ import annotations

from typing import Any

from tfopt.errors import TfoptError
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.recovery import OPTIONS, recover
from tfopt.rewrite import Log


def run(model: Model, log: Log, data: Data, **training: Any) -> None:
    """Trains, in place; zeros of sparse kernels and clusters stay.

    Args:
      model: the model.
      log: gets how the loss fell.
      data: with representative rows, labelled rows, or both.
      **training: see OPTIONS, and `Settings` for what they mean.

    Raises:
      TfoptError: no rows, no epochs, or nothing that can be trained.
    """
    data.need_rows("distill")
    if not training.get("epochs", OPTIONS["epochs"]):
        raise TfoptError("distill: with epochs=0 it does nothing; give it some, or leave it out of the recipe")
    history = recover(model, log, data, "distill", **training)
    if history is not None and history.best_step:
        log.applied["weight trained"] += len(history.trained)


PASS = Pass(
    "distill",
    run,
    options={
        **OPTIONS,
        "optimizer": "adam",
        "weight_decay": 1e-4,
        "patience": 3,
        "validation": 0.1,
        "max_steps": 0,
        "checkpoint_steps": 500,
    },
    lossless=False,
    learns=True,
    keeps=("sparsity", "clusters"),
)
