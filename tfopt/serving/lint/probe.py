"""Runs a model for the linter, in a child process: loads it in a v1 session, calls every signature, replays warmup."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.data import Dataset, load, whole_inputs
from tfopt.errors import TfoptError
from tfopt.model import Model
from tfopt.model import load as load_model
from tfopt.serving import warmup
from tfopt.serving.lint.graph import assigned_state
from tfopt.serving.lint.subject import Probe, Trial
from tfopt.verify import difference, features, input_specs, inputs_for

_ROWS = 3


def worker() -> Callable[[dict[str, Any]], Probe]:
    """Returns the child's side: {"directory", "data"} -> Probe."""
    return lambda request: probe(Path(request["directory"]), request["data"])


def probe(directory: Path, data: str | None = None) -> Probe:
    """Loads and runs a model.

    Args:
      directory: the version directory.
      data: real rows for the signatures that they fit (see `tfopt.data.load`); others get drawn ones.
    """
    try:
        with warmup.Session(directory) as session:
            trials = _trials(directory, session, data)
    except TfoptError as error:
        return Probe(load_error=_bare(error, directory))
    requests = directory / warmup.FILE
    failure = None
    if requests.is_file():
        try:
            with warmup.Session(directory) as session:
                warmup.replay(requests, session)
        except TfoptError as error:
            failure = str(error).removeprefix(f"{requests}: ")
    return Probe(trials=trials, warmup_error=failure)


def _trials(directory: Path, session: warmup.Session, data: str | None) -> dict[str, Trial]:
    try:
        model = load_model(directory)
    except TfoptError:
        return {}  # nothing is known of its inputs
    state = assigned_state(model)
    trials = {}
    for name in model.signatures:
        try:
            rows = _rows(model, name, session, data)
            trials[name] = _batched(model, name, session, rows) if name not in state else Trial()
        except TfoptError as error:
            trials[name] = Trial(error=_bare(error, directory))
    return trials


def _rows(model: Model, name: str, session: warmup.Session, data: str | None) -> Dataset:
    if data:
        try:
            rows = load(data, input_specs(model, name), feature_spec=features(model, name), limit=_ROWS)
            session.call(name, rows.inputs)
            return rows
        except TfoptError:
            pass
    alone = dataclasses.replace(model, signatures={name: model.signatures[name]})
    return inputs_for(alone, None, 0, session.call)[name]


def _batched(model: Model, name: str, session: warmup.Session, rows: Dataset) -> Trial:
    """Compares a batch with its rows one by one."""
    specs = input_specs(model, name)
    first = {spec.shape[0] if spec.shape else None for spec in specs.values()}
    if not specs or whole_inputs(specs) or first != {None} or len(rows) < 2:
        return Trial()
    together = session.call(name, rows.inputs)
    again = session.call(name, rows.inputs)
    unsplit = tuple(key for key, value in together.items() if np.ndim(value) == 0 or len(value) != len(rows))
    if unsplit or difference(together, again).broken:  # random: nothing to compare
        return Trial(unsplit=unsplit)
    alone = [session.call(name, rows.take(slice(i, i + 1)).inputs) for i in range(len(rows))]
    return Trial(mixed=_mixed(together, alone))


def _mixed(together: Mapping[str, np.ndarray], alone: list[dict[str, np.ndarray]]) -> str | None:
    for key, value in together.items():
        parts = [row[key] for row in alone]
        if len({part.shape[1:] for part in parts} | {value.shape[1:]}) > 1:
            return f"output {key!r} has another shape"
        if found := difference({key: value}, {key: np.concatenate(parts)}).broken:
            return found
    return None


def _bare(error: TfoptError, directory: Path) -> str:
    return str(error).removeprefix(f"{directory}: ").removeprefix("does not load in a v1 session: ")
