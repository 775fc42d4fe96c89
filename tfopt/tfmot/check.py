"""Looks at a recipe for `--engine=tfmot`, before any work is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from tfopt import passes
from tfopt.errors import TfoptError
from tfopt.tfmot.cluster import INITS

# Pass -> option -> the values of it that TFMOT has; every value of those that are not named here.
_ONLY: dict[str, dict[str, tuple[Any, ...]]] = {
    "prune_magnitude": {
        "scope": ("layer",),
        "criterion": ("magnitude",),
        "first": (1.0,),
        "last": (1.0,),
        "depthwise": (0.0,),
        "temperature": (1.0,),
    },
    "cluster": {
        "init": tuple(INITS),
        "weighting": ("none",),
        "depthwise": (False,),
        "temperature": (1.0,),
    },
    "train_quantized": {"bits": (8,), "calibrator": ("best",)},
}
PASSES = tuple(_ONLY)


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
        if name in PASSES or chosen.lossless:
            pass
        elif chosen.learns and not chosen.device:
            raise TfoptError(f"--engine=tfmot: TFMOT has no {name}; --engine=graph does")
        elif index < theirs[-1]:
            raise TfoptError(
                f"--engine=tfmot: {name} stands before {names[theirs[-1]]}, which starts from the Keras model again: "
                "put it last, or take --engine=graph"
            )
        for option, value in options.items():
            known = _ONLY.get(name, {}).get(option, (value,))
            if value not in known:
                raise TfoptError(
                    f"--engine=tfmot: TFMOT has {name} with {option}={' or '.join(map(str, known))}; received {value}, "
                    "which --engine=graph has"
                )
    if strategy:
        raise TfoptError("--engine=tfmot trains on one device: leave out --strategy, or take --engine=graph")
    for library in ("tensorflow_model_optimization", "tf_keras"):
        if importlib.util.find_spec(library) is None:
            raise TfoptError(
                f"--engine=tfmot needs {library}, which is not installed: pip install 'tfopt[keras2]', or take "
                "--engine=graph"
            )
