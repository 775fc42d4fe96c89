"""Evaluation: the quality of several artifacts, and how far their outputs are apart, in one pass over the rows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import batches, evaluation_bars, runtime
from tfopt.counterparts import Counterparts, opened
from tfopt.data import STRING, TensorSpec
from tfopt.environment import need_beam
from tfopt.equivalence import Equivalence, Output
from tfopt.errors import TfoptError
from tfopt.report import Metric
from tfopt.side_by_side import Job, Seen, observe
from tfopt.tally import METRICS

BATCH = 32  # rows of one call, where no artifact has a fixed batch


@dataclasses.dataclass
class Result:
    """What was found of one artifact.

    Attributes:
      path: as it was given.
      signature: the one that ran.
      metrics: name -> value.
      counts: metric -> the integers behind it.
      equivalence: how far its outputs are from those of the first artifact; None for that one itself.
      failure: why it cannot be run or scored on these rows; it has no figures then.
    """

    path: str
    signature: str
    metrics: dict[str, Metric] = dataclasses.field(default_factory=dict)
    counts: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    equivalence: Equivalence | None = None
    failure: str | None = None


@dataclasses.dataclass
class Evaluation:
    """Several artifacts on the same rows; the first is the reference.

    Attributes:
      source: where the rows came from.
      rows: how many there were.
      notes: what a reader should know; artifacts are called by `letters`.
    """

    results: list[Result]
    source: str
    rows: int
    notes: list[str] = dataclasses.field(default_factory=list)

    def problems(
        self,
        *,
        max_accuracy_drop: float | None = None,
        max_error: float | None = None,
        min_agreement: float | None = None,
        bars: Mapping[str, float] | None = None,
    ) -> list[str]:
        """Says why artifacts do not pass.

        Args:
          max_accuracy_drop: how much worse than the first each metric may be, in the metric's own units.
          max_error: largest max|a - b| / max|a| of any output; values that are no floats must be equal.
          min_agreement: smallest share of rows with the same top class, of any output that holds class scores.
          bars: metric -> the worst value that is accepted: the least where higher is better, else the largest.

        Returns:
          One line each. All artifacts but the first are held to the bars; where it is alone, it is.

        Raises:
          TfoptError: a bar on what was not measured.
        """
        return evaluation_bars.problems(
            self.results,
            max_accuracy_drop=max_accuracy_drop,
            max_error=max_error,
            min_agreement=min_agreement,
            bars=bars,
        )

    def to_json(self) -> str:
        """Everything, as JSON."""
        facts = {"source": self.source, "rows": self.rows, "notes": self.notes}
        return json.dumps({**facts, "artifacts": [_facts(result) for result in self.results]}, indent=2) + "\n"


def evaluate(
    paths: Sequence[str | Path],
    source: str,
    *,
    metrics: Sequence[str] = (),
    label: str = "label",
    signature: str | None = None,
    output: str | None = None,
    beam_args: str | None = None,
    threads: int = 2,
    batch_size: int = BATCH,
    allow_unsafe_deserialization: bool = False,
) -> Evaluation:
    """Runs artifacts side by side, in one pass over the rows.

    Args:
      paths: SavedModel directories, .tflite files, Keras files; in any mixture. The first is the reference.
      source: of the rows, by the names of inputs that the first has; see `data.load`.
      metrics: names of `metrics.METRICS`; none for rows without labels.
      label: array or feature that holds the labels.
      signature: of all; None takes serving_default, or the first that all have.
      output: of the first, which the metrics score; None where one alone is of a float dtype.
      beam_args: Beam's options, such as "--direct_num_workers=2"; None runs in this process.
      threads: of the runtimes, in each process.
      batch_size: rows of a call.
      allow_unsafe_deserialization: run code that a Keras file carries.

    Returns:
      The same to the last bit with and without Beam, however many workers there are.

    Raises:
      TfoptError: an artifact is missing or damaged, or does not fit the first; the first cannot be run on the rows; the
        rows do not fit, or have no labels to score by.
    """
    if not paths or (len(paths) == 1 and not metrics):
        raise TfoptError("one artifact is evaluated by a metric, and several may be compared: give either")
    names = letters(len(paths))
    with opened(paths, names, signature, threads=threads, unsafe=allow_unsafe_deserialization) as together:
        job = job_of(together, metrics, output)
        rows = Rows(source, together.specs, together.features, label, together.asked[0].signature)
        if beam_args is not None:
            together.close()
        seen = look(job, rows, together.programs, batch_size=batch_size, beam_args=beam_args, threads=threads)
        notes = [*together.notes, *sorted(seen.warnings)]
        notes += [
            f"output {name!r} of {each} has no counterpart in A"
            for each, extra in zip(names, together.extra, strict=True)
            for name in extra
        ]
    return Evaluation(results(job, seen, [str(path) for path in paths]), source, seen.rows, notes)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where rows come from; see `data.load` for all of it.

    Attributes:
      specs: the inputs, by the names of the first artifact.
      features: what the model parses tf.Examples by.
      signature: of the first artifact, which logged requests must name.
    """

    source: str
    specs: Mapping[str, TensorSpec]
    features: Mapping[str, Any] | None = None
    label: str = "label"
    signature: str | None = None

    def cut(self, size: int) -> batches.Batches:
        """Opens them here; reads no more than the first."""
        return batches.cut(
            self.source,
            self.specs,
            size=size,
            feature_spec=self.features,
            label=self.label,
            signature=self.signature,
        )


def look(
    job: Job,
    rows: Rows,
    programs: Sequence[runtime.Program],
    *,
    batch_size: int = BATCH,
    beam_args: str | None = None,
    threads: int = 2,
) -> Seen:
    """Reads the rows once, here or on Beam; arguments as of `evaluate`.

    Args:
      job: what to ask of which artifacts.
      programs: these artifacts, opened; Beam's workers open them themselves.
    """
    size = max(batch_size, job.least)
    if beam_args is None:
        return observe(job, programs, rows.cut(size))
    need_beam("--beam_args")
    from tfopt.beam import evaluate as on_beam

    read = on_beam.ReadRows(rows.source, rows.specs, rows.features, rows.label, size, signature=rows.signature)
    return on_beam.observe(job, read, beam_args, threads)


def letters(count: int) -> list[str]:
    """What artifacts are called in notes and tables: A, the reference, B, ..., Z, A1, ..."""
    return [chr(ord("A") + index % 26) + str(index // 26 or "") for index in range(count)]


def job_of(together: Counterparts, metrics: Sequence[str], output: str | None = None) -> Job:
    """What to do with opened artifacts; arguments as those of `evaluate`.

    Raises:
      TfoptError: a metric is unknown, or it is not clear which output it scores.
    """
    for metric in metrics:
        if metric not in METRICS:
            raise TfoptError(f"--metric: unknown {metric!r}; choose from {', '.join(METRICS)}")
    outputs = together.programs[0].signatures[together.asked[0].signature].outputs
    scored = scored_output(metrics[0], outputs, output) if metrics else None
    return Job(tuple(together.asked), tuple(metrics), scored, together.batch)


def scored_output(metric: str, outputs: Mapping[str, TensorSpec], output: str | None) -> str:
    """The output that a metric scores: the one that was named, or else the only one, or the only one of floats.

    Raises:
      TfoptError: there is none such, or several.
    """
    if output is None:
        floats = [name for name, spec in outputs.items() if len(outputs) == 1 or _is_float(spec)]
        if len(floats) != 1:
            have = ", ".join(sorted(floats or outputs))
            raise TfoptError(f"{metric}: which output holds the scores? Choose from {have}")
        output = floats[0]
    if output not in outputs:
        raise TfoptError(f"{metric}: no output '{output}': choose from {', '.join(sorted(outputs))}")
    return output


def results(job: Job, seen: Seen, names: Sequence[str]) -> list[Result]:
    """What was found of each artifact.

    Args:
      names: of the artifacts.

    Raises:
      TfoptError: the reference cannot be scored on these rows.
    """
    found = []
    for index, (asked, name) in enumerate(zip(job.asked, names, strict=True)):
        result = Result(name, asked.signature, failure=seen.failures.get(index))
        found.append(result)
        if result.failure:
            continue
        result.equivalence = seen.equivalences.get(index)
        try:
            for metric in job.metrics:
                result.metrics[metric] = seen.tallies[index, metric].value()
                result.counts[metric] = seen.tallies[index, metric].counts()
        except TfoptError as error:
            if not index:
                raise
            result.failure = str(error)
    return found


def _is_float(spec: TensorSpec) -> bool:
    return spec.dtype != STRING and np.dtype(spec.dtype).kind in "fV"  # bfloat16 is of kind V to NumPy


def _output_facts(output: Output) -> dict[str, Any]:
    figures = {"absolute": output.absolute, "relative": output.relative, "agreement": output.agreement}
    powers = dict(sorted(output.powers.items()))  # in the order of workers otherwise
    return {**figures, **dataclasses.asdict(output), "powers": powers}


def _facts(result: Result) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "path": result.path,
        "signature": result.signature,
        "metrics": {name: metric.value for name, metric in result.metrics.items()},
        "counts": result.counts,
        "failure": result.failure,
    }
    if result.equivalence is not None:
        facts["max_error"], facts["agreement"] = result.equivalence.max_error, result.equivalence.agreement
        facts["outputs"] = {n: _output_facts(output) for n, output in result.equivalence.outputs.items()}
    return facts
