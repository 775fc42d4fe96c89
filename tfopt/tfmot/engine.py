"""What `--engine=tfmot` does in place of the passes that learn: TFMOT, on the Keras 2 model that the graph came from.

A child process does it (worker.py): TFMOT wants a process whose Keras is Keras 2. It takes the original with its
layers, not the graph that earlier passes rewrote, and gives back a graph, with zeros, few distinct values or fake-quant
ops, from which the files are made as from one that was made here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from tfopt import invariants, passes, recipe
from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError
from tfopt.fake_quant import OPS
from tfopt.model import Model, load
from tfopt.passes import Data
from tfopt.pruning.sparsity import Pattern
from tfopt.rewrite import Log
from tfopt.tfmot.cluster import DEFAULT_INIT, INITS
from tfopt.verify import Verifier

_TIMEOUT = 7 * 24 * 3600.0  # seconds: a training is as long as its owner makes it


class Engine:
    """TFMOT on the model of one file; it holds the weights between the passes of a run."""

    def __init__(self, source: str | Path, allow_unsafe: bool = False):
        """Nothing is read yet.

        Args:
          source: a Keras file or a SavedModel directory.
          allow_unsafe: run the Python code that it may carry.
        """
        self._source, self._allow_unsafe = source, allow_unsafe
        self._state: tuple[list[np.ndarray], bool] | None = None  # what the child gave, for the next one

    def prune(
        self,
        model: Model,
        log: Log,
        data: Data,
        sparsity: float,
        pattern: str,
        schedule: str,
        begin: float,
        end: float,
        frequency: int,
        skip: str,
        embeddings: bool,
        training: Mapping[str, Any],
    ) -> None:
        """Prunes by TFMOT, in place.

        Args:
          model: gets the graph; its signatures keep their names.
          log: gets what was pruned, and how the loss fell.
          data: with rows or without.
          sparsity, pattern, schedule, begin, end, frequency, skip, embeddings: as of `prune_magnitude`.
          training: `epochs`, `min_steps`, `batch_size`, `learning_rate` and `alpha`.

        Raises:
          TfoptError: TFMOT refuses the model, or there is nothing in it that it prunes.
        """
        wanted = Pattern.parse(pattern)
        options = {
            "sparsity": sparsity,
            "schedule": schedule,
            "begin": begin,
            "end": end,
            "frequency": frequency,
            "n_of_m": (wanted.of - wanted.keep, wanted.of) if wanted.of else None,
            "block": (wanted.columns, wanted.rows),
            "skip": skip,
            "embeddings": embeddings,
        }
        found = self._ask(model, log, data, "prune", options, training)
        self._log_kernels(log, found, "pruned")
        zeros, size = (sum(each[part] for each in found["kernels"].values()) for part in (0, 1))
        log.notes.append(
            f"{zeros / size:.1%} of the {size:,} weights of {len(found['kernels'])} kernels are zero; TFMOT takes the "
            "same share of each: scope, criterion, first, last and depthwise are not used"
        )

    def cluster(
        self,
        model: Model,
        log: Log,
        data: Data,
        clusters: int,
        init: str,
        granularity: str,
        skip: str,
        embeddings: bool,
        training: Mapping[str, Any],
    ) -> None:
        """Clusters by TFMOT, in place; zeros of pruned kernels stay.

        Args:
          model, log, data, training: as for `prune`.
          clusters, init, granularity, skip, embeddings: as of `cluster`; of a start that TFMOT does not have it takes
            its own default.

        Raises:
          TfoptError: TFMOT refuses the model, or there is nothing in it that it clusters.
        """
        options = {
            "clusters": clusters,
            "init": init if init in INITS else DEFAULT_INIT,
            "per_channel": granularity == "channel",
            "skip": skip,
            "embeddings": embeddings,
        }
        found = self._ask(model, log, data, "cluster", options, training)
        self._log_kernels(log, found, "clustered")
        most = max(values for values, _ in found["kernels"].values())
        log.notes.append(
            f"at most {most} distinct values in each of {len(found['kernels'])} kernels; TFMOT started at "
            f"init={options['init']}"
        )

    def train_quantized(self, model: Model, log: Log, data: Data, training: Mapping[str, Any]) -> None:
        """Trains a quantized model by TFMOT, in place; zeros and clusters stay: QAT, PQAT, CQAT or PCQAT.

        Args:
          model: gets the graph, with fake-quant ops.
          log, data, training: as for `prune`; there must be rows.

        Raises:
          TfoptError: TFMOT refuses the model.
        """
        found = self._ask(model, log, data, "quantize", {}, training)
        log.applied["fake quantization by TFMOT"] += sum(node.op in OPS for node in model.graph.nodes.values())
        for what, number in found["kept"].items():
            log.applied[f"kernel whose {what} TFMOT kept"] += number

    def _log_kernels(self, log: Log, found: dict[str, Any], done: str) -> None:
        for layer, reason in found["refused"].items():
            log.refused["TFMOT", layer] = reason
        if not found["kernels"]:
            reasons = "; ".join(dict.fromkeys(found["refused"].values())) or "no layer of it has one"
            raise TfoptError(f"--engine=tfmot: {self._source} has no kernel that TFMOT could have {done}: {reasons}")
        log.applied[f"kernel {done} by TFMOT"] += len(found["kernels"])

    def _ask(
        self,
        model: Model,
        log: Log,
        data: Data,
        task: str,
        options: Mapping[str, Any],
        training: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Has a child do a task, and puts what came out into `model`."""
        logging.info("TFMOT works on %s in a process of its own: %s", self._source, task)
        with tempfile.TemporaryDirectory(prefix="tfopt-tfmot-") as work:
            written = Path(work) / "model"
            job = {
                "task": task,
                "options": dict(options),
                "source": str(self._source),
                "allow_unsafe": self._allow_unsafe,
                "state": self._state,
                "destination": str(written),
                "ends": {name: (sorted(each.inputs), sorted(each.outputs)) for name, each in model.signatures.items()},
                "main": data.signature,
                "rows": data.rows.inputs if data.rows else None,
                "labelled": data.labelled.inputs if data.labelled else None,
                "labels": data.labelled.labels if data.labelled else None,
                "seed": data.seed,
                "min_steps": 0,
                **training,
            }
            try:
                with Child("tfopt.tfmot.worker:worker", {"TF_USE_LEGACY_KERAS": "1"}) as child:
                    found = child.ask(job, _TIMEOUT)
            except ChildError as error:
                raise TfoptError(
                    f"--engine=tfmot: {self._source}: {error}; --engine=graph needs no Keras and works"
                ) from error
            made = load(written, list(model.signatures))
        self._state = found["state"]
        if data.checkpoint:
            log.notes.append("TFMOT keeps no checkpoint: a run that is killed starts this pass anew")
        if "losses" in found:
            log.notes.append(_summary(found))
        elif training["epochs"]:
            log.warnings.append(
                f"{task} by TFMOT: not recovered, there is nothing to train on; --representative_data (or --labels) "
                "gives rows"
            )
        if task == "quantize":
            for name in ("prune_graph", "merge_duplicates"):  # each signature comes with a computation of its own
                passes.get(name).run(made, Log())
        else:
            made = _folded(made, log, data.seed)
        vars(model).update(vars(made))
        return found


def _summary(found: Mapping[str, Any]) -> str:
    losses, best = found["losses"], found["best"]
    return (
        f"trained by TFMOT: loss on {found['held']:,} rows held back: {losses[0]:.4g} before training, "
        f"{losses[best]:.4g} after {best} of {len(losses) - 1} epochs on {found['rows']:,} rows"
    )


def _folded(model: Model, log: Log, seed: int) -> Model:
    """What the lossless passes make of a graph that Keras wrote; they leave batch norms where clusters need that."""
    folded = model.copy()
    verifier, before = Verifier(model, None, seed), _clustered(model)
    for name in recipe.NAMED["lossless"]["passes"]:
        tried = folded.copy()
        passes.get(name).run(tried, Log())
        broken = verifier.check(tried).broken
        if broken is not None:
            log.warnings.append(f"{name}, on the graph that TFMOT gave back, was undone: {broken}")
        elif name == "fold_affine" and _clustered(tried) < before:
            log.notes.append("scales and shifts were not folded into kernels: that would have undone their clusters")
        else:
            folded = tried
    return folded


def _clustered(model: Model) -> int:
    """The number of kernels that hold few distinct values."""
    constants = (model.graph.constant(node.name) for node in model.graph.nodes.values() if node.op == "Const")
    values = [*model.weights.values(), *(value for value in constants if value is not None)]
    return sum(value.dtype == np.float32 and invariants.clusters(value) is not None for value in values)
