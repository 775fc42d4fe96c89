"""Reads the rows that a run was given: to score, to learn from, to calibrate on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import logging

from tfopt import calibration, metrics, passes
from tfopt.data import Dataset, batch_size, load
from tfopt.errors import TfoptError
from tfopt.evaluation import Rows
from tfopt.function import Function
from tfopt.model import Model
from tfopt.serving.encode import encode
from tfopt.tfmot.engine import Engine
from tfopt.verify import features, input_specs

if TYPE_CHECKING:
    from tfopt.optimize import Options

ROWS_IN_MEMORY = 4096  # where Beam reads all rows, what needs them in memory takes the first of them

_EVALUATION_BATCH = 100


def main_signature(model: Model) -> str:
    """The signature that is measured: serving_default where there is one, else the first that takes inputs."""
    names = list(model.signatures)
    return next(
        (n for n in ["serving_default", *names] if n in model.signatures and model.signatures[n].inputs), names[0]
    )


def evaluation_rows(model: Model, options: Options) -> Dataset | None:
    """The labelled rows of --eval_data, the first of them with --beam_args; None where it is not given."""
    if not options.eval_data:
        return None
    return _labelled(model, "--eval_data", options.eval_data, options.label, _limit(options))


def all_evaluation_rows(model: Model, options: Options) -> Rows | None:
    """Where Beam reads --eval_data; None without --beam_args."""
    if not options.eval_data or options.beam_args is None:
        return None
    name = main_signature(model)
    return Rows(options.eval_data, input_specs(model, name), features(model, name), options.label, name)


def _labelled(model: Model, flag: str, source: str, label: str, limit: int | None = None) -> Dataset:
    name = main_signature(model)
    data = load(source, input_specs(model, name), feature_spec=features(model, name), label=label, limit=limit)
    if data.labels is None:
        raise TfoptError(f"{flag}={source}: holds no labels under {label!r} (see --label)")
    return data


def learning_data(model: Model, evaluation: Dataset | None, source: str | Path, options: Options) -> passes.Data:
    """What passes that learn are given; read only where the owner named data."""
    name = main_signature(model)

    def score(candidate: Model) -> float:
        assert evaluation is not None
        size = batch_size(input_specs(candidate, name), _EVALUATION_BATCH)
        with Function(candidate) as function:
            found = metrics.evaluate(
                options.metric,
                lambda arrays: function(name, arrays),
                evaluation,
                options.eval_output,
                batch_size=size,
                pad=size != _EVALUATION_BATCH,
            )
        return -metrics.drop(metrics.Metric(options.metric, 0.0, found.samples), found)

    given, limit = options.representative_data, _limit(options)
    specs, feature_spec = input_specs(model, name), features(model, name)
    return passes.Data(
        signature=name,
        teacher=model,
        labelled=None if options.labels is None else _labelled(model, "--labels", options.labels, options.label),
        rows=None if given is None else load(given, specs, feature_spec=feature_spec, limit=limit),
        score=score if evaluation is not None else None,
        max_drop=options.max_accuracy_drop,
        minimize=options.minimize,
        integer_outputs=options.io_type == "int8" or options.all_integer,
        seed=options.seed,
        observe=_observe(options),
        engine=None if options.engine == "graph" else Engine(source, options.allow_unsafe_deserialization),
    )


def learned_on(data: passes.Data, options: Options) -> str | None:
    """Says that --beam_args left rows out of memory; None where all are there."""
    if data.rows is None or len(data.rows) != _limit(options):
        return None
    return f"the first {len(data.rows):,} rows of the representative data; ranges that passes calibrate: all of it"


def _limit(options: Options) -> int | None:
    return None if options.beam_args is None else ROWS_IN_MEMORY


def _observe(options: Options) -> passes.Observe:
    """What sees the values of tensors: `calibration.observe`, or with --beam_args Beam on all representative rows."""
    source, beam_args = options.representative_data, options.beam_args
    if source is None or beam_args is None:
        return calibration.observe

    def observe(model: Model, signature: str, refs: Sequence[str], _: Dataset, counts: bool = True) -> dict:
        from tfopt.beam import calibrate

        return calibrate.observe(model, signature, refs, source, beam_args, counts)

    return observe


def representative_rows(original: Model, model: Model, source: str, options: Options) -> dict[str, Dataset]:
    """The rows to calibrate on in memory, for every signature that they fit; the first of them with --beam_args.

    Args:
      original: whose rows the source holds.
      model: what is made of it; its inputs may be others.
      source: see `tfopt.data.load`.
      options: of the run.
    """
    rows = {}
    for name in model.signatures:
        of = model.stands_for.get(name, name)
        try:
            specs, feature_spec = input_specs(original, of), features(original, of)
            rows[name] = load(source, specs, feature_spec=feature_spec, limit=_limit(options))
        except TfoptError as error:
            logging.info("representative data do not fit signature %r: %s", name, error)
            continue
        steps = model.requests.get(name, ())
        if steps:
            once = any(step["step"] == "once" for step in steps)  # then each row is a request of its own
            parts = [encode(steps, part) for part in (rows[name].batches(1) if once else [rows[name].inputs])]
            inputs = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
            rows[name] = Dataset(inputs, None, source)
    return rows
