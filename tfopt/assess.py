"""Proof: what every artifact costs, how far its outputs are from the original's, and whether it passes the bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from tfopt import cost, evaluation, measure, metrics, runtime
from tfopt.counterparts import Asked
from tfopt.data import STRING, Dataset, TensorSpec, batch_size
from tfopt.errors import TfoptError
from tfopt.evaluation import Rows
from tfopt.report import Artifact
from tfopt.serving import request
from tfopt.serving.encode import Step, encode
from tfopt.side_by_side import Job
from tfopt.verify import Difference, difference, worst
from tfopt.weight_statistics import arrays_of, is_compressed, statistics

_EVALUATION_BATCH = 32
_SCORES = "class scores of the evaluation rows"  # no signature is called that


@dataclasses.dataclass(frozen=True)
class Assessment:
    """What to compare with, and by what.

    Attributes:
      original: the SavedModel as it was given.
      signature: the one whose accuracy, cost and latency are measured.
      comparison: signature -> inputs on which outputs are compared.
      random: signatures whose outputs differ from call to call; not compared.
      evaluation: labelled rows for `metric`, or None.
      everything: where Beam is to read all such rows, by `beam_args`, where `evaluation` holds the first of them only.
      metric: a name of `metrics.METRICS`.
      output: the output that `metric` scores; None where one alone fits.
      max_accuracy_drop: in the metric's own units; what is worse is rejected.
      latency: whether to measure latency and memory, in one child process per artifact.
      threads: of the runtimes.
      lossless: whether the serving model must give what the original gives, within rounding.
      requests: signature of the artifacts -> how a client makes its inputs of rows; see `tfopt.serving.encode`.
      stands_for: signature that only the artifacts have -> the one of the original that it computes.
    """

    original: Path
    signature: str
    comparison: Mapping[str, Dataset]
    random: frozenset[str] = frozenset()
    evaluation: Dataset | None = None
    everything: Rows | None = None
    beam_args: str | None = None
    metric: str = "accuracy"
    output: str | None = None
    max_accuracy_drop: float | None = None
    latency: bool = True
    threads: int = 2
    lossless: bool = True
    requests: Mapping[str, list[Step]] = dataclasses.field(default_factory=dict)
    stands_for: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def main(self, artifact: Artifact) -> str:
        """The signature of an artifact that is measured in the place of `signature`."""
        new = [new for new, of in self.stands_for.items() if of == self.signature]
        return new[0] if new and artifact.name != "original" else self.signature

    def steps(self, artifact: Artifact, name: str) -> Sequence[Step]:
        """How a client makes the inputs of a signature of an artifact of rows as the original takes them."""
        return () if artifact.name == "original" else self.requests.get(name, ())

    def run(self, artifact: Artifact, program: runtime.Program, name: str, rows: Mapping[str, np.ndarray]) -> dict:
        """Runs a signature on rows as the original takes them."""
        return request.call(self.steps(artifact, name), lambda arrays: program.run(name, arrays), rows)


def assess(job: Assessment, artifacts: list[Artifact]) -> list[Artifact]:
    """Measures the original and all artifacts.

    Args:
      job: what to compare with.
      artifacts: those that were emitted; filled in, in place. One that cannot be run, or misses the bar, is rejected.

    Returns:
      The original, followed by `artifacts`.

    Raises:
      TfoptError: the original itself cannot be run or scored.
    """
    original = Artifact("original", "saved_model", str(job.original))
    expected: dict[str, dict[str, np.ndarray]] = {}
    everything = [original, *artifacts]
    asked: dict[str, Asked | None] = {}
    for artifact in tqdm(everything, desc="assess", unit="artifact", leave=False, disable=None):
        if artifact.rejected:
            continue
        try:
            _fill(job, artifact, expected, asked)
        except TfoptError as error:
            if artifact is original:
                raise
            artifact.rejected = str(error)
    runnable = [artifact for artifact in everything if artifact.name in asked and not artifact.rejected]
    if job.everything is not None:
        _score_all(job, job.everything, runnable, asked, expected[job.signature])
    for artifact in artifacts:  # not the original: a bar that asks for a gain is no reason against the yardstick
        if not artifact.rejected:
            _hold_to_bar(job, original, artifact, artifact in runnable)
    _look_into_weights(everything)
    if job.latency:
        _time(job, [a for a in runnable if not a.rejected])
    return everything


def _hold_to_bar(job: Assessment, original: Artifact, artifact: Artifact, runs: bool) -> None:
    """Rejects an artifact that lost too much."""
    if job.max_accuracy_drop is None:
        return
    if not runs:
        artifact.rejected = "its accuracy cannot be measured here, so it cannot pass --max_accuracy_drop"
    elif artifact.accuracy and original.accuracy:
        lost = metrics.drop(original.accuracy, artifact.accuracy)
        if lost > job.max_accuracy_drop:
            artifact.rejected = (
                f"{job.metric} falls by {lost:.6g}, more than --max_accuracy_drop={job.max_accuracy_drop:g}"
            )


def _fill(
    job: Assessment, artifact: Artifact, expected: dict[str, dict[str, np.ndarray]], asked: dict[str, Asked | None]
) -> None:
    """Fills in what can be known of an artifact, and how it is asked where it runs; the original fills `expected`."""
    artifact.bytes, artifact.gzip_bytes = measure.sizes(artifact.path)
    try:
        counted = cost.cost(artifact.path, job.main(artifact))
        artifact.parameters, artifact.flops = counted.parameters, counted.flops
        artifact.notes += [note for note in counted.notes if note not in artifact.notes]
    except TfoptError as error:
        artifact.notes.append(f"parameters and FLOPs could not be counted: {error}")
    try:
        program = runtime.open(artifact.path, threads=job.threads)
    except runtime.NeedsFlexError:
        artifact.notes.append("its outputs were not compared, nor its accuracy or latency measured")
        return
    with program:
        _compare_outputs(job, artifact, program, expected)
        if job.evaluation is not None and job.everything is None and job.main(artifact) in program.signatures:
            _score(job, artifact, program, expected)
        asked[artifact.name] = _asked(job, artifact, program, expected[job.signature])


def _asked(
    job: Assessment, artifact: Artifact, program: runtime.Program, original: Mapping[str, np.ndarray]
) -> Asked | None:
    """How the signature that is scored is asked on rows as the original takes them; None where it has none such."""
    name = job.main(artifact)
    if name not in program.signatures:
        return None
    inputs, outputs = program.signatures[name].inputs, program.signatures[name].outputs
    rows, kept = job.comparison[job.signature].inputs, [output for output in outputs if output in original]
    steps, fixed = job.steps(artifact, name), batch_size(inputs, 1)
    return Asked(artifact.path, name, {n: n for n in rows}, {n: n for n in kept}, steps, fixed)


def _look_into_weights(artifacts: list[Artifact]) -> None:
    """Zeros and entropy of all artifacts, where one of those that were made is sparse or clustered."""
    there = [artifact for artifact in artifacts if not artifact.rejected]
    try:
        if any(is_compressed(arrays_of(artifact.path)) for artifact in there[1:]):
            for artifact in there:
                found = statistics(arrays_of(artifact.path))
                artifact.zeros = found.zeros / max(found.elements, 1)
                artifact.entropy_bytes = found.coded_bytes
    except TfoptError as error:
        logging.warning("weights were not counted: %s", error)


def _compare_outputs(
    job: Assessment, artifact: Artifact, program: runtime.Program, expected: dict[str, dict[str, np.ndarray]]
) -> None:
    found: list[Difference] = []
    added = {} if artifact.name == "original" else job.stands_for
    for name in [*job.comparison, *added]:
        of = added.get(name, name)
        if name not in program.signatures:
            if of not in added.values():
                artifact.notes.append(f"signature {name!r} is not in this artifact")
            continue
        received = job.run(artifact, program, name, job.comparison[of].inputs)
        if artifact.name == "original":
            expected[name] = received
        elif of not in job.random:
            found.append(_compare(expected[of], received))
            _check_finite(name, expected[of], received)
    if found:
        difference = worst(found)
        artifact.max_abs_error, artifact.max_rel_error = difference.absolute, difference.relative
        if artifact.name == "serving" and job.lossless and difference.broken:
            raise TfoptError(f"its outputs differ from the original's: {difference.broken}")


def _score(
    job: Assessment, artifact: Artifact, program: runtime.Program, expected: dict[str, dict[str, np.ndarray]]
) -> None:
    assert job.evaluation is not None
    name = job.main(artifact)
    size = batch_size(program.signatures[name].inputs, _EVALUATION_BATCH)
    artifact.accuracy = metrics.evaluate(
        job.metric,
        lambda rows: job.run(artifact, program, name, rows),
        job.evaluation,
        job.output,
        batch_size=size,
        pad=size != _EVALUATION_BATCH,
    )
    scores = _scores(job, artifact, program)
    if scores is not None and artifact.name == "original":
        expected[_SCORES] = {"": scores}
    elif scores is not None and _SCORES in expected:
        artifact.agreement = metrics.agreement(scores, expected[_SCORES][""])


def _score_all(
    job: Assessment,
    rows: Rows,
    artifacts: list[Artifact],
    asked: Mapping[str, Asked | None],
    original: Mapping[str, np.ndarray],
) -> None:
    """Scores the original, some outputs of which are given, and all artifacts, in one pass over the rows, on Beam."""
    scored = [(artifact, each) for artifact in artifacts if (each := asked[artifact.name]) is not None]
    outputs = {n: TensorSpec(n, STRING if a.dtype == object else a.dtype, None) for n, a in original.items()}
    output = evaluation.scored_output(job.metric, outputs, job.output)
    every = tuple(each for _, each in scored)
    work = Job(every, (job.metric,), output, max(each.batch for each in every))
    seen = evaluation.look(work, rows, (), batch_size=_EVALUATION_BATCH, beam_args=job.beam_args, threads=job.threads)
    results = evaluation.results(work, seen, [artifact.name for artifact, _ in scored])
    for (artifact, _), result in zip(scored, results, strict=True):
        artifact.rejected = result.failure
        artifact.accuracy = result.metrics.get(job.metric)
        if result.equivalence is not None:
            artifact.agreement = result.equivalence.outputs[output].agreement


def _compare(expected: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray]) -> Difference:
    """The difference, for artifacts that may hold floats of another width or ints of another size."""
    return difference(expected, {k: v.astype(expected[k].dtype) if k in expected else v for k, v in received.items()})


def _check_finite(name: str, expected: Mapping[str, np.ndarray], received: Mapping[str, np.ndarray]) -> None:
    for output, value in received.items():
        wrong = value.dtype.kind == "f" and not np.isfinite(value).all()
        if wrong and np.isfinite(expected[output]).all():
            raise TfoptError(f"signature {name!r}: output {output!r} is not finite, while the original's is")


def _scores(job: Assessment, artifact: Artifact, program: runtime.Program) -> np.ndarray | None:
    """The class scores of the first rows, to compare which class comes out on top."""
    assert job.evaluation is not None
    rows = job.evaluation.take(slice(0, 256))
    outputs = job.run(artifact, program, job.main(artifact), rows.inputs)
    floats = [v for k, v in outputs.items() if v.dtype.kind == "f" and (job.output is None or k == job.output)]
    return floats[0] if len(floats) == 1 else None


def _time(job: Assessment, artifacts: list[Artifact]) -> None:
    """Latency of one request (the first row), all artifacts in turns."""
    rows = job.comparison[job.signature]
    one = rows.take(slice(0, 1)).inputs
    paths = {a.name: a.path for a in artifacts}
    calls = {a.name: (job.main(a), encode(job.steps(a, job.main(a)), one)) for a in artifacts}
    times = measure.latency(paths, job.signature, one, threads=job.threads, calls=calls)
    for artifact in artifacts:
        timed = times[artifact.name]
        if timed.error:
            artifact.notes.append(timed.error)
        fed = len(calls[artifact.name][1])
        if artifact.kind == "saved_model" and fed > len(one):
            artifact.notes.append(
                f"its latency holds the handing over of {fed} inputs from Python, where the original takes {len(one)}: "
                "tfopt-loadtest measures requests"
            )
        artifact.latency_ms_p50, artifact.latency_ms_p95 = timed.p50_ms, timed.p95_ms
        artifact.peak_memory_bytes = timed.peak_memory_bytes
