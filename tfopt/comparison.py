"""Two artifacts of any kind side by side: outputs on the same inputs, quality, bytes, latency, memory."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tfopt import cost, equivalence, evaluation, measure, metrics
from tfopt.batches import Part
from tfopt.counterparts import Asked, Counterparts, Inputs, opened
from tfopt.data import STRING, Dataset, probes
from tfopt.errors import TfoptError
from tfopt.report import Metric
from tfopt.side_by_side import Job, Seen, filled
from tfopt.verify import GUESSES

_ROWS = 8  # of random inputs


@dataclasses.dataclass
class Side:
    """One of the two artifacts; what could not be found out is None."""

    path: str
    loader: str = ""
    signature: str = ""
    bytes: int = 0
    gzip_bytes: int = 0
    parameters: int | None = None
    flops: int | None = None
    latency_ms_p50: float | None = None
    latency_ms_p95: float | None = None
    peak_memory_bytes: int | None = None
    metric: Metric | None = None


@dataclasses.dataclass
class Output:
    """One output of both.

    Attributes:
      a, b: its name on either side.
      dtype, shape: of what A gave.
      max_abs_error: max|a - b|; None where it is no float.
      max_rel_error: the same over the scale, max|a|.
      agreement: share of rows with the same top class, where it holds class scores.
      equal: share of equal values, where it is no float.
      problem: why the two cannot be compared, or None.
    """

    a: str
    b: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    agreement: float | None = None
    equal: float | None = None
    problem: str | None = None


@dataclasses.dataclass
class Comparison:
    """The two sides, output by output.

    Attributes:
      source: where the inputs came from.
      rows: how many there were.
    """

    a: Side
    b: Side
    outputs: list[Output]
    source: str
    rows: int
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def max_error(self) -> float:
        """The worst relative error; infinite where an output is missing, or differs though it is no float."""
        return max((_error(output) for output in self.outputs), default=0.0)

    @property
    def agreement(self) -> float | None:
        """The worst top-1 agreement; None where no output holds class scores."""
        return min((o.agreement for o in self.outputs if o.agreement is not None), default=None)

    def to_json(self) -> str:
        """Everything, as JSON."""
        facts = {**dataclasses.asdict(self), "max_error": self.max_error, "agreement": self.agreement}
        return json.dumps(facts, indent=2, default=str) + "\n"


def compare(
    a: str | Path,
    b: str | Path,
    *,
    data: str | None = None,
    signature: str | None = None,
    eval_data: str | None = None,
    metric: str = "accuracy",
    label: str = "label",
    eval_output: str | None = None,
    seed: int = 0,
    latency: bool = True,
    threads: int = 2,
    beam_args: str | None = None,
    allow_unsafe_deserialization: bool = False,
) -> Comparison:
    """Compares B with A.

    Args:
      a, b: SavedModel directories, .tflite files, Keras files; in any mixture.
      data: inputs (see `data.load`), by the names that A has; None draws random ones.
      signature: of both; None takes serving_default, or the one that both have.
      eval_data: labelled inputs, in the same forms.
      metric: to score `eval_data` by, a name of `metrics.METRICS`.
      label: array or feature of `eval_data` that holds the labels.
      eval_output: output of A that `metric` scores, where there are several.
      seed: of random inputs.
      latency: measure latency and memory, each artifact in a process of its own, in turns.
      threads: of the runtimes.
      beam_args: reads `data` and `eval_data` on Beam, with these options of it; None reads them here.
      allow_unsafe_deserialization: run code that a Keras file carries.

    Raises:
      TfoptError: an artifact is missing, damaged or cannot run; the two do not fit each other, or the data them.
    """
    if metric not in metrics.METRICS:
        raise TfoptError(f"--metric: unknown {metric!r}; choose from {', '.join(metrics.METRICS)}")
    if beam_args is not None and not data and not eval_data:
        raise TfoptError("--beam_args needs --data or --eval_data: there are no rows to read")
    with opened((a, b), "AB", signature, threads=threads, unsafe=allow_unsafe_deserialization) as both:
        asked, notes = both.asked, list(both.notes)
        job = evaluation.job_of(both, [metric] if eval_data else [], eval_output)

        def rows(source: str, label: str = "label") -> evaluation.Rows:
            return evaluation.Rows(source, both.specs, both.features, label, asked[0].signature)

        look = functools.partial(evaluation.look, programs=both.programs, beam_args=beam_args, threads=threads)
        apart = dataclasses.replace(job, metrics=())
        if data is None:
            first, seen = _random(apart, both, seed)
        else:
            seen = look(apart, rows(data)) if beam_args is None else Seen(apart)
            first = next(rows(data).cut(job.least).read(Part()))
        answers = [asked[0].run(both.programs[0], filled(first, job.least)) for _ in range(2)]
        if any(not np.array_equal(answers[0][n], v, equal_nan=v.dtype.kind == "f") for n, v in answers[1].items()):
            notes.append("A answers otherwise when asked again (state or random numbers): first answers are compared")
        if beam_args is not None:
            both.close()  # the workers open their own
            seen = look(apart, rows(data)) if data else seen
        if seen.failures:
            raise TfoptError(seen.failures[1])
        pairs = [
            _output(name, asked[1].outputs.get(name, ""), each, seen.rows, answers[0][name].shape)
            for name, each in seen.equivalences[1].outputs.items()
        ]
        notes += [f"output {name!r} of B has no counterpart in A" for name in both.extra[1]]
        notes += sorted(seen.warnings)
        loaders = [program.loader for program in both.programs]
        sides = [Side(str(p), loader, each.signature) for p, loader, each in zip((a, b), loaders, asked, strict=True)]
        for side, each in zip(sides, asked, strict=True):
            _cost(side, each.path, notes)
        if eval_data:
            scored = evaluation.results(job, look(job, rows(eval_data, label)), "AB")
            for side, result in zip(sides, scored, strict=True):
                if result.failure:
                    raise TfoptError(result.failure)
                side.metric = result.metrics[metric]
        if latency:
            _time(sides, asked, first.take(slice(0, job.least)).inputs, threads, notes)
        return Comparison(sides[0], sides[1], pairs, first.source, seen.rows, notes)


def _random(job: Job, both: Counterparts, seed: int) -> tuple[Dataset, Seen]:
    """Random inputs that both accept, and what was seen on them."""
    failure = None
    for guess in GUESSES:
        rows = {"rows": max(job.least, _ROWS), **guess}
        try:
            dataset = probes(both.specs, seed, feature_spec=both.features, **rows)
            seen = Seen(job)
            seen.add(job, both.programs, dataset)
            if not seen.failures:
                return dataset, seen
            failure = failure or TfoptError(seen.failures[1])
        except TfoptError as error:
            failure = failure or error
    raise TfoptError(f"{failure} (on random inputs; give --data)")


def _output(name: str, other: str, apart: equivalence.Output, rows: int, shape: tuple[int, ...]) -> Output:
    """How one output is apart; `shape` is that of a batch of A."""
    dtype = STRING if apart.dtype == "object" else apart.dtype
    found = Output(name, other, dtype, (rows, *shape[1:]) if shape else ())
    if apart.missing:
        found.problem = "B has no such output"
    elif apart.changed:
        ours, _, theirs = apart.changed[0].partition(" to ")
        found.problem = f"A gave {ours}, B gave {theirs}"
    elif apart.dtype not in equivalence.BOUNDS:
        found.equal = 1 - apart.unequal / apart.elements if apart.elements else 1.0
    else:
        found.max_abs_error, found.max_rel_error = apart.absolute, apart.relative
        found.agreement = apart.agreement
    return found


def _error(output: Output) -> float:
    wrong = output.problem is not None or (output.equal is not None and output.equal < 1)
    return float("inf") if wrong else output.max_rel_error or 0.0


def _cost(side: Side, path: str, notes: list[str]) -> None:
    side.bytes, side.gzip_bytes = measure.sizes(side.path)
    try:
        counted = cost.cost(path, side.signature)
        side.parameters, side.flops = counted.parameters, counted.flops
        notes += [note for note in counted.notes if note not in notes]
    except TfoptError as error:
        notes.append(f"parameters and FLOPs could not be counted: {error}")


def _time(sides: list[Side], asked: Sequence[Asked], rows: Inputs, threads: int, notes: list[str]) -> None:
    """Latency of one request, A and B in turns."""
    calls = {name: (each.signature, each.encoded(rows)) for name, each in zip("AB", asked, strict=True)}
    named = {name: each.path for name, each in zip("AB", asked, strict=True)}
    times = measure.latency(named, asked[0].signature, rows, threads=threads, calls=calls)
    for side, name in zip(sides, "AB", strict=True):
        timed = times[name]
        if timed.error:
            notes.append(timed.error)
        side.latency_ms_p50, side.latency_ms_p95 = timed.p50_ms, timed.p95_ms
        side.peak_memory_bytes = timed.peak_memory_bytes
