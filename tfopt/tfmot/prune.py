"""Magnitude pruning by TFMOT (Zhu & Gupta 2017), of a Keras 2 model.

s(t) = s_end + (s_start - s_end) (1 - t / T)^3    the share of smallest weights that is zero at step t
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfopt.errors import TfoptError
from tfopt.tfmot.keras_model import refusing, wrapped
from tfopt.tfmot.train import Training

_MASKS = 50  # in a training, where the frequency does not say
_FIRST = 1  # TFMOT's step counter of the first batch


def prune(student: Any, training: Training | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Prunes the kernels that TFMOT prunes, in place, and trains while and after that.

    Args:
      student: the Keras model.
      training: None: zeros without training.
      options: `sparsity`, of each kernel; `schedule`, `begin`, `end` and `frequency` as of `prune_magnitude`; `n_of_m`,
        such as (2, 4), zeros among neighbours, or None; `block`, (inputs, outputs) of matrices; `skip`, a regular
        expression for layers; `embeddings`, whether they are pruned too.

    Returns:
      `kernels`, name -> its zeros and its size; `refused`, name of a layer -> reason; what `Training.run` gives.

    Raises:
      TfoptError: TFMOT refuses the model, or it cannot be trained.
    """
    import tensorflow_model_optimization as tfmot
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_wrapper
    from tensorflow_model_optimization.python.core.sparsity.keras.prune_registry import PruneRegistry

    schedule, end = _schedule(training.steps if training else 0, options)
    groups, block = options["n_of_m"], tuple(options["block"])
    refused: dict[str, str] = {}
    skipped = re.compile(options["skip"]) if options["skip"] else None

    def reason(layer: Any) -> str | None:
        """Why a layer with kernels is left dense."""
        if skipped and skipped.match(layer.name):
            return "left dense as skip wants it"
        if type(layer).__name__ == "Embedding" and not options["embeddings"]:
            return "a table that is looked up; embeddings prunes it too"
        taken = PruneRegistry.make_prunable(layer).get_prunable_weights() if PruneRegistry.supports(layer) else []
        shapes = [tuple(weight.shape) for weight in taken]
        if not taken:
            return f"TFMOT does not prune {type(layer).__name__}"
        for shape in shapes:
            if groups and len(shape) not in (2, 4):
                return f"TFMOT has no N:M sparsity for kernels of {len(shape)} axes"
            if groups and shape[-2] % groups[1]:
                return f"{shape[-2]} inputs do not make groups of {groups[1]}"
            if block != (1, 1) and len(shape) != 2:
                return f"TFMOT has blocks for matrices, none for kernels of {len(shape)} axes"
        return None

    def wrap(layer: Any) -> Any:
        if not any(len(weight.shape) > 1 for weight in layer.trainable_weights):
            return layer
        why = reason(layer)
        if why:
            refused[layer.name] = why
            return layer
        return tfmot.sparsity.keras.prune_low_magnitude(layer, schedule, block_size=block, sparsity_m_by_n=groups)

    model = wrapped(student, wrap)
    if skipped and not any("skip" in why for why in refused.values()):
        raise TfoptError(f"skip={options['skip']!r} matches no layer that has a kernel")
    pruned = pruning_wrapper.collect_prunable_layers(model)
    found: dict[str, Any] = {}
    if training and training.steps and pruned:
        with refusing():
            found = training.run(model, (tfmot.sparsity.keras.UpdatePruningStep(),), end)
    else:
        for layer in pruned:
            layer.pruning_step.assign(_FIRST)
            layer.pruning_obj.conditional_mask_update()
            layer.pruning_obj.weight_mask_op()
    kernels = {}
    for layer in pruned:
        for weight in layer.prunable_weights:
            value = weight.numpy()
            kernels[f"{layer.layer.name}/{weight.name}"] = value.size - int(np.count_nonzero(value)), value.size
    student.set_weights(tfmot.sparsity.keras.strip_pruning(model).get_weights())
    return {**found, "kernels": kernels, "refused": refused}


def _schedule(steps: int, options: Mapping[str, Any]) -> tuple[Any, int]:
    """TFMOT's schedule for a training of so many steps, and the number of steps after which masks are final."""
    from tensorflow_model_optimization.python.core.sparsity.keras import pruning_schedule

    sparsity = options["sparsity"]
    begin = _FIRST + int(steps * options["begin"])
    end = max(int(steps * options["end"]), _FIRST)
    if options["n_of_m"] or options["schedule"] == "one_shot" or end <= begin:
        begin = _FIRST if options["n_of_m"] else min(begin, max(steps, _FIRST))  # N:M masks are of the first step
        return pruning_schedule.ConstantSparsity(sparsity, begin, begin, 1), begin
    every = min(options["frequency"] or max((end - begin) // _MASKS, 1), end - begin)
    end = begin + (end - begin) // every * every  # the last mask must fall on the end
    if options["schedule"] == "constant":
        return pruning_schedule.ConstantSparsity(sparsity, begin, end, every), end
    return pruning_schedule.PolynomialDecay(0.0, sparsity, begin, end, frequency=every), end
