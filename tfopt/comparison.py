"""Two artifacts of any kind side by side: outputs on the same inputs, quality, bytes, latency, memory."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tfopt import cost, measure, metrics, runtime
from tfopt.counterparts import Asked, Counterparts, Inputs, opened
from tfopt.data import STRING, Dataset, load, probes
from tfopt.errors import TfoptError
from tfopt.report import Metric
from tfopt.verify import GUESSES, difference

_ROWS = 8  # of random inputs
_EVALUATION_BATCH = 32

Run = Callable[[int, Inputs], runtime.Outputs]  # (0 for A, 1 for B; inputs by the names of A)


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
      allow_unsafe_deserialization: run code that a Keras file carries.

    Raises:
      TfoptError: an artifact is missing, damaged or cannot run; the two do not fit each other, or the data them.
    """
    if metric not in metrics.METRICS:
        raise TfoptError(f"--metric: unknown {metric!r}; choose from {', '.join(metrics.METRICS)}")
    with opened((a, b), "AB", signature, threads=threads, unsafe=allow_unsafe_deserialization) as both:
        asked, programs, notes = both.asked, both.programs, list(both.notes)

        def run(side: int, rows: Inputs) -> runtime.Outputs:
            return asked[side].run(programs[side], rows)

        dataset, results = _results(run, both, data, seed)
        again = run(0, dataset.inputs)
        if any(not np.array_equal(again[n], v, equal_nan=v.dtype.kind == "f") for n, v in results[0].items()):
            notes.append("A answers otherwise when asked again (state or random numbers): first answers are compared")
        pairs = [_compare(results, name, other) for name, other in asked[1].outputs.items()]
        pairs += [Output(n, "", problem="B has no such output") for n in asked[0].outputs if n not in asked[1].outputs]
        notes += [f"output {name!r} of B has no counterpart in A" for name in both.extra[1]]
        sides = [Side(str(given), p.loader, e.signature) for given, p, e in zip((a, b), programs, asked, strict=True)]
        for side, each in zip(sides, asked, strict=True):
            _cost(side, each.path, notes)
        if eval_data:
            labelled = load(eval_data, both.specs, feature_spec=both.features, label=label)
            _score(sides, run, labelled, metric, eval_output, asked)
        if latency:
            _time(sides, asked, dataset.take(slice(0, both.batch)).inputs, threads, notes)
        return Comparison(sides[0], sides[1], pairs, dataset.source, len(dataset), notes)


def _results(run: Run, both: Counterparts, data: str | None, seed: int) -> tuple[Dataset, list[runtime.Outputs]]:
    """Inputs that both accept, and what they answer."""
    if data:
        dataset = load(data, both.specs, feature_spec=both.features)
        return dataset, [run(0, dataset.inputs), run(1, dataset.inputs)]
    failure = None
    for guess in GUESSES:
        dataset = probes(both.specs, seed, feature_spec=both.features, **{"rows": max(both.batch, _ROWS), **guess})
        try:
            return dataset, [run(0, dataset.inputs), run(1, dataset.inputs)]
        except TfoptError as error:
            failure = failure or error
    raise TfoptError(f"{failure} (on random inputs; give --data)")


def _compare(results: list[runtime.Outputs], a: str, b: str) -> Output:
    ours, theirs = np.asarray(results[0][a]), np.asarray(results[1][a])
    found = Output(a, b, ours.dtype.name if ours.dtype.kind != "O" else STRING, ours.shape)
    if ours.shape != theirs.shape:
        if ours.size != theirs.size:
            found.problem = f"A gave {list(ours.shape)}, B gave {list(theirs.shape)}"
            return found
        theirs = theirs.reshape(ours.shape)
    if ours.dtype.kind not in "fV":
        found.equal = float(np.mean(ours == theirs)) if ours.size else 1.0
        return found
    apart = difference({a: ours}, {a: theirs.astype(ours.dtype)})
    found.max_abs_error, found.max_rel_error = apart.absolute, apart.relative
    found.agreement = metrics.agreement(theirs, ours)
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


def _score(
    sides: list[Side], run: Run, labelled: Dataset, metric: str, output: str | None, asked: Sequence[Asked]
) -> None:
    for index, (side, each) in enumerate(zip(sides, asked, strict=True)):
        side.metric = metrics.evaluate(
            metric,
            functools.partial(run, index),
            labelled,
            output,
            batch_size=each.batch if each.batch > 1 else _EVALUATION_BATCH,
            pad=each.batch > 1,
        )


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
