"""Batch tuning: a batch curve is measured, settings are chosen on it, and checked against a server.

Batching is left off where it cannot work (inputs that do not share dimension 0), where the curve says that larger
batches bring nothing, or where no setting was better than none in the check.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import data
from tfopt.errors import TfoptError
from tfopt.runtime import Signature
from tfopt.serving.batching_parameters import BatchingParameters, cpus
from tfopt.serving.loadtest import requests as loadtest_requests
from tfopt.serving.loadtest.plan import CLOSED, Plan, Request, Target
from tfopt.serving.loadtest.run import run
from tfopt.serving.loadtest.signature import specs_of
from tfopt.serving.loadtest.text import milliseconds
from tfopt.serving.tuning import check as checks
from tfopt.serving.tuning import curve as tuning_curve
from tfopt.serving.tuning.choice import Choice, Workload, choose, judge
from tfopt.serving.tuning.simulation import Overhead

OFF, TUNED, DEFAULTS, GUIDE = "off", "tuned", "defaults", "guide"
PRESETS = {
    # What --enable_batching alone does, and the example file of TensorFlow Serving's configuration guide.
    DEFAULTS: BatchingParameters(),
    GUIDE: BatchingParameters(
        max_batch_size=128, batch_timeout_micros=0, max_enqueued_batches=1_000_000, num_batch_threads=8
    ),
}
_CLOSE = 1.03  # no difference
_CROWD = 16  # clients that keep a server busy
_WORTH = 1.05  # batching has to be better than none by this factor
_GAIN = 1.05  # and larger batches to bring this many times the rows per second


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Attributes:
      model, signature: of what.
      workload: for what.
      parameters: what to serve with; None: leave batching off.
      reason: why, in one sentence.
      curve: measured; None where the signature cannot be batched.
      overhead: what a request takes outside the model, measured at the server; nothing without a check.
      expected: name of a setting -> what the model of the batcher expects.
      settings: name -> parameters; None for off.
      checked: name -> what the load tests found; empty without a check.
    """

    model: str
    signature: str
    workload: Workload
    parameters: BatchingParameters | None
    reason: str
    curve: tuning_curve.Curve | None = None
    overhead: Overhead = Overhead()  # noqa: RUF009 - frozen
    expected: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, BatchingParameters | None] = dataclasses.field(default_factory=dict)
    checked: Mapping[str, checks.Checked] = dataclasses.field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        facts = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "curve"}
        if self.curve is not None:
            facts["curve"] = [
                {"rows": b, "parallel": k, "ms": 1e3 * seconds, "rows_per_second": b * k / seconds}
                for (b, k), seconds in sorted(self.curve.times.items())
            ]
        return {name: _plain(value) for name, value in facts.items()}


def tune(
    model: str | Path,
    workload: Workload,
    *,
    signature: str = "serving_default",
    source: str | None = None,
    largest: int = 128,
    check: bool = True,
    check_s: float = 4.0,
    serve: checks.Serve | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Tuning:
    """Tunes batching for a model and a workload.

    Args:
      model: SavedModel directory, or one whose numbered directories are versions (the latest is taken).
      workload: the rate, the SLO or both; rows of a request.
      signature: which is asked.
      source: rows in the forms of `tfopt.data.load`; random ones where not given.
      largest: no batch of more rows.
      check: check the choice by load tests.
      check_s: measured seconds of each of these.
      serve: starts a server with a setting; tfopt-serve on this machine where not given.
      seed: of random rows and arrivals.
      progress: show bars.

    Raises:
      TfoptError: neither rate nor SLO, no such model or signature, or data that does not fit.
    """
    if workload.rate is None and workload.slo_ms is None:
        raise TfoptError("--rate, --slo_ms: give at least one of them: what is tuned for")
    directory = version_directory(Path(model))
    definition, specs = _signature(directory, signature)
    if obstacle := _obstacle(definition):
        return Tuning(str(model), signature, workload, None, f"leave batching off: {obstacle}")
    rows = _rows(specs, source, max(largest, workload.rows), seed)

    def batch(size: int) -> Mapping[str, np.ndarray]:
        pick = np.arange(size) % len(rows)
        return {name: array[pick] for name, array in rows.inputs.items()}

    curve = tuning_curve.measure(
        directory,
        signature,
        batch,
        smallest=workload.rows,
        largest=largest,
        limit_s=2 * workload.slo_ms / 1e3 if workload.slo_ms else 2.0,
        cpus=cpus(),
        progress=progress,
    )
    found = Tuning(str(model), signature, workload, None, "", curve)
    threads = list(curve.parallel)
    if not check:
        off, best = choose(curve, workload, threads, Overhead())
        return _decided(_with_choices(found, off, best, Overhead()))
    target = Target("localhost:1", model_name="model", signature_name=signature)
    bodies = loadtest_requests.from_rows(target, Signature(specs, {}), rows, workload.rows)
    return _checked(found, serve or functools.partial(checks.local, directory), target, bodies, check_s, seed, progress)


def version_directory(path: Path) -> Path:
    """The SavedModel itself: the directory, or its latest version."""
    versions = [p for p in path.iterdir() if p.name.isdigit()] if path.is_dir() else []
    return max(versions, key=lambda p: int(p.name)) if versions and not (path / "saved_model.pb").exists() else path


def _checked(
    found: Tuning,
    serve: checks.Serve,
    target: Target,
    bodies: list[Request],
    check_s: float,
    seed: int,
    progress: bool,
) -> Tuning:
    """Measures what requests cost outside the model, chooses, and load tests off, the presets and the choices."""
    assert found.curve is not None
    workload, curve = found.workload, found.curve
    plan = Plan(
        duration_s=check_s, warmup_s=min(1, check_s / 4), seed=seed, slo_ms=workload.slo_ms, rate=workload.rate or 1.0
    )
    crowded = dataclasses.replace(plan, mode=CLOSED, concurrency=_CROWD, duration_s=check_s / 2, slo_ms=None)
    with contextlib.ExitStack() as servers:
        addresses = {OFF: servers.enter_context(serve(target.model_name, None))}

        def measure(name: str) -> checks.Measure:
            at = dataclasses.replace(target, server=addresses[name])
            return lambda plan: run(at, bodies, plan)

        alone = measure(OFF)(dataclasses.replace(crowded, concurrency=1))
        crowd = measure(OFF)(crowded)
        if alone.failed or not alone.answered or not crowd.achieved:
            raise TfoptError(f"the server does not answer: {alone.messages or crowd.messages}")
        cost = max(0.0, 1 / crowd.achieved - workload.rows / curve.best(workload.rows))
        latency = max(0.0, alone.latency.p50 / 1e3 - curve.seconds(workload.rows) - cost)
        overhead = Overhead(latency, cost)
        off, best = choose(curve, workload, list(curve.parallel), overhead)
        found = _with_choices(found, off, best, overhead)
        for name, parameters in found.settings.items():
            if name != OFF:
                addresses[name] = servers.enter_context(serve(target.model_name, parameters))
        measures = {name: measure(name) for name in found.settings}
        for name in list(measures)[1:]:  # the first batch of each size takes longer, which a deployment's warmup hides
            measures[name](crowded)
        if workload.rate is not None:
            checked = checks.at_rate(measures, plan, progress)
        else:
            checked = checks.knees(measures, plan, 0.4 * crowd.achieved, progress)
    return _decided(dataclasses.replace(found, checked=checked))


def _with_choices(found: Tuning, off: Choice, best: list[Choice], overhead: Overhead) -> Tuning:
    """Adds the settings that are compared: off, the presets, and the best for each number of threads."""
    assert found.curve is not None
    expected = {OFF: off}
    for name, preset in PRESETS.items():
        expected[name] = judge(found.curve, preset.filled(), found.workload, overhead)
    for choice in best:
        assert choice.parameters is not None
        expected[f"{TUNED}, {choice.parameters.num_batch_threads} threads".replace(" 1 threads", " 1 thread")] = choice
    settings = {name: PRESETS.get(name, choice.parameters) for name, choice in expected.items()}
    return dataclasses.replace(found, expected=expected, settings=settings, overhead=overhead)


def _decided(found: Tuning) -> Tuning:
    """Takes the best setting: of the check where there was one, else of the model; or off."""
    assert found.curve is not None
    workload, curve = found.workload, found.curve
    scores = {name: _score(found, name) for name in found.settings}
    best = max(scores, key=lambda name: scores[name])
    if best in PRESETS:  # a tuned setting that is as good has a queue that is bounded, and sizes that can be warmed up
        close = [name for name in scores if name not in (OFF, *PRESETS) and scores[name] * _CLOSE >= scores[best]]
        best = max(close, key=lambda name: scores[name], default=best)
    how = "in the check" if found.checked else "as far as the model of the batcher goes (no check)"
    gain = max(curve.best(size) for size in curve.sizes) / curve.best(workload.rows)
    # A score is what is better when higher: the rate, or one over the p99.
    times = scores[best] / scores[OFF] if scores[OFF] else float("inf") if scores[best] else 0.0
    if best == OFF or times < _WORTH or (gain < _GAIN and not found.checked):
        why = f"no setting was better than none by {_WORTH - 1:.0%} {how}"
        if gain < _GAIN:
            why = f"larger batches bring {gain:.2f} times the rows per second of single requests; {why}"
        return dataclasses.replace(found, reason=f"leave batching off: {why}")
    return dataclasses.replace(
        found,
        parameters=found.settings[best],
        reason=f"{best}: {_figure(found, best)}, {_figure(found, OFF)} off, {how}",
    )


def _figure(found: Tuning, name: str) -> str:
    """What a setting reached, in words."""
    workload = found.workload
    if found.checked:
        rate, p99, failed = found.checked[name].rate, found.checked[name].p99, bool(found.checked[name].failed)
    else:
        choice = found.expected[name]
        rate, p99, failed = choice.rate, choice.expected.p99, bool(choice.expected.failed)
    if workload.rate is None:
        return f"{rate:,.1f} requests/s within the SLO"
    met = ""
    if workload.slo_ms is not None:
        met = " (SLO met)" if p99 <= workload.slo_ms and not failed else " (SLO missed)"
    return "requests failed" if failed else f"p99 {milliseconds(p99)} ms{met}"


def _score(found: Tuning, name: str) -> float:
    workload = found.workload
    if found.checked:
        each = found.checked[name]
        return each.rate if workload.rate is None else 0.0 if each.failed else 1 / each.p99
    choice = found.expected[name]
    return choice.rate if workload.rate is None else 0.0 if choice.expected.failed else 1 / choice.expected.p99


def _signature(directory: Path, name: str) -> tuple[Any, dict[str, data.TensorSpec]]:
    from tfopt.model import read_meta_graph

    signatures = read_meta_graph(directory).signature_def
    if name not in signatures:
        have = ", ".join(sorted(key for key in signatures if not key.startswith("__")))
        raise TfoptError(f"--signature_name={name}: {directory} has no such signature; it has: {have}")
    return signatures[name], specs_of(signatures[name].inputs)


def _obstacle(definition: Any) -> str | None:
    """Why a server cannot batch a signature, with what could be done."""
    from tfopt.serving.server.batching import obstacle

    reason = obstacle(definition, BatchingParameters())
    if reason is None:
        return None
    return f"it cannot work, since {reason}; a client can send more rows in one request instead"


def _rows(specs: dict[str, data.TensorSpec], source: str | None, most: int, seed: int) -> data.Dataset:
    if source is not None:
        return data.load(source, specs, limit=max(most, 1000))
    if any(spec.dtype == data.STRING for spec in specs.values()):
        raise TfoptError("--data: the signature takes strings, which random inputs cannot stand for; give real data")
    return data.probes(specs, seed, min(most, 64))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value
