"""Looks at a recipe for `--engine=tfmot`, before any work is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from tfopt import passes, recipe
from tfopt.errors import TfoptError
from tfopt.tfmot.cluster import INITS

_TRAINING = ("epochs", "min_steps", "batch_size", "learning_rate", "alpha")
# Pass -> the options that TFMOT takes as they are, and those of which it has some values. Others keep their default.
_TAKEN: dict[str, tuple[str, ...]] = {
    "prune_magnitude": (
        *("sparsity", "pattern", "schedule", "begin", "end", "frequency", "skip", "embeddings"),
        *_TRAINING,
    ),
    "cluster": ("clusters", "granularity", "skip", "embeddings", *_TRAINING),
    "train_quantized": _TRAINING,
}
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "prune_magnitude": {"scope": ("layer",), "criterion": ("magnitude",), "first": (1.0,), "last": (1.0,)},
    "cluster": {"init": tuple(INITS)},
    "train_quantized": {"bits": (8,)},
}
PASSES = tuple(_TAKEN)


def check(steps: Sequence[tuple[str, Mapping[str, Any]]], strategy: str = "") -> None:
    """Looks at a recipe before any work is done.

    Args:
      steps: (pass, the options that the recipe gives it), in order.
      strategy: of `tf.distribute`; empty for none.

    Raises:
      TfoptError: TFMOT or Keras 2 is not installed, no pass is TFMOT's, one is that it cannot do or that comes where
        its work would be lost, or an option has a value that TFMOT does not have.
    """
    names = [name for name, _ in steps]
    theirs = [index for index, name in enumerate(names) if name in PASSES]
    if not theirs:
        raise TfoptError(
            f"--engine=tfmot goes with a recipe that has one of the passes {', '.join(PASSES)}, such as qat_int8"
        )
    for index, (name, options) in enumerate(steps):
        chosen = passes.get(name)
        if name not in PASSES and "epochs" in chosen.options:
            raise TfoptError(f"--engine=tfmot: TFMOT has no {name}; --engine=graph does")
        if name not in (*PASSES, *recipe.NAMED["lossless"]["passes"]) and index < theirs[-1]:
            raise TfoptError(
                f"--engine=tfmot: {name} stands before {names[theirs[-1]]}, which starts from the Keras model again: "
                "put it last, or take --engine=graph"
            )
        if name == "prune_magnitude" and "cluster" in names[:index]:
            raise TfoptError("--engine=tfmot: TFMOT's pruning undoes clusters; put prune_magnitude before cluster")
        for option, value in options.items() if name in PASSES else ():
            values = _ONLY[name].get(option, (chosen.options[option],))
            if option not in _TAKEN[name] and value not in values:
                known = " or ".join(map(str, values))
                raise TfoptError(
                    f"--engine=tfmot: TFMOT has {name} with {option}={known}; received {value}: --engine=graph has it"
                )
    if strategy:
        raise TfoptError("--engine=tfmot trains on one device: leave out --strategy, or take --engine=graph")
    for library in ("tensorflow_model_optimization", "tf_keras"):
        if importlib.util.find_spec(library) is None:
            raise TfoptError(
                f"--engine=tfmot needs {library}, which is not installed: pip install 'tfopt[keras2]', or take "
                "--engine=graph"
            )
