"""Two artifacts of any kind side by side: outputs on the same inputs, quality, bytes, latency, memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from tfopt import cost, measure, metrics, runtime, sources
from tfopt.data import STRING, Dataset, TensorSpec, batch_size, load, probes
from tfopt.errors import TfoptError
from tfopt.report import Metric
from tfopt.serving import request
from tfopt.serving.client_stub import client_steps
from tfopt.serving.encode import encode
from tfopt.verify import GUESSES, difference

_ROWS = 8  # of random inputs
_EVALUATION_BATCH = 32

Inputs = Mapping[str, np.ndarray]
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
    with ExitStack() as stack:
        paths, programs = [], []
        for given in (a, b):
            workdir = stack.enter_context(tempfile.TemporaryDirectory(prefix="tfopt-compare-"))
            paths.append(_runnable(Path(given), workdir, allow_unsafe_deserialization))
            programs.append(stack.enter_context(runtime.open(paths[-1], threads=threads)))
        keys = _signatures(programs, signature)
        ours, theirs = (p.signatures[key] for p, key in zip(programs, keys, strict=True))
        notes = [] if keys[0] == keys[1] else [f"signature {keys[0]!r} of A is compared with {keys[1]!r} of B"]
        steps = client_steps(paths[1], keys[1]) if ours.inputs.keys() != theirs.inputs.keys() else []
        if steps:
            notes.append(
                "B is given rows of A, in the form that its clients make of them (assets.extra/signatures.json)"
            )
        taken = ours.inputs if steps else theirs.inputs
        inputs = _pair(ours.inputs, taken, "input", notes)
        missing = [n for n in ours.inputs if n not in inputs] + [n for n in taken if n not in inputs.values()]
        if missing:
            raise TfoptError(
                f"the two take different inputs: A {_listed(ours.inputs)}; B {_listed(theirs.inputs)}; nothing fits "
                f"{', '.join(map(repr, missing))}"
            )
        outputs = _pair(ours.outputs, theirs.outputs, "output", notes)
        specs = {name: _common(spec, taken[inputs[name]]) for name, spec in ours.inputs.items()}
        features = _features(paths, keys) if any(spec.dtype == STRING for spec in specs.values()) else None

        def run(side: int, rows: Inputs) -> runtime.Outputs:
            if side == 0:
                return programs[0].run(keys[0], rows)
            renamed = {inputs[name]: array for name, array in rows.items()}
            return request.call(steps, lambda arrays: programs[1].run(keys[1], arrays), renamed)

        dataset, results = _results(run, specs, data, seed, features, max(_batches(ours, theirs), _ROWS))
        again = run(0, dataset.inputs)
        if any(not np.array_equal(again[n], v, equal_nan=v.dtype.kind == "f") for n, v in results[0].items()):
            notes.append("A answers otherwise when asked again (state or random numbers): first answers are compared")
        pairs = [_compare(results, name, other) for name, other in outputs.items()]
        pairs += [Output(n, "", problem="B has no such output") for n in ours.outputs if n not in outputs]
        extra = [name for name in theirs.outputs if name not in outputs.values()]
        notes += [f"output {name!r} of B has no counterpart in A" for name in extra]
        sides = [Side(str(given), p.loader, key) for given, p, key in zip((a, b), programs, keys, strict=True)]
        for side, path in zip(sides, paths, strict=True):
            _cost(side, path, notes)
        if eval_data:
            labelled = load(eval_data, specs, feature_spec=features, label=label)
            _score(sides, programs, run, labelled, metric, eval_output, outputs)
        if latency:
            one = dataset.take(slice(0, _batches(ours, theirs))).inputs
            theirs_one = encode(steps, {inputs[name]: array for name, array in one.items()})
            _time(sides, paths, one, theirs_one, threads, notes)
        return Comparison(sides[0], sides[1], pairs, dataset.source, len(dataset), notes)


def _runnable(path: Path, workdir: str, unsafe: bool) -> Path:
    """What the runtime can open: the artifact itself, or the SavedModel that it is converted to."""
    if path.suffix.lower() == ".tflite" and path.is_file():
        return path
    return sources.as_saved_model(path, workdir=workdir, allow_unsafe_deserialization=unsafe)


def _signatures(programs: list[runtime.Program], wanted: str | None) -> list[str]:
    keys = [list(program.signatures) for program in programs]
    if wanted is not None:
        for program, have in zip(programs, keys, strict=True):
            if wanted not in have:
                raise TfoptError(f"{program.path} has no signature {wanted!r}; it has: {', '.join(have)}")
        return [wanted, wanted]
    both = [key for key in keys[0] if key in keys[1]]
    if both:
        return ["serving_default" if "serving_default" in both else both[0]] * 2
    if len(keys[0]) == len(keys[1]) == 1:
        return [keys[0][0], keys[1][0]]
    raise TfoptError(f"no signature is in both: A has {', '.join(keys[0])}; B has {', '.join(keys[1])}")


def _pair(
    ours: Mapping[str, TensorSpec], theirs: Mapping[str, TensorSpec], what: str, notes: list[str]
) -> dict[str, str]:
    """Names of A -> names of B: equal names first, then what alone has a fitting dtype and shape, then in order."""
    pairs = {name: name for name in ours if name in theirs}
    left = [name for name in theirs if name not in pairs]
    for name in ours:
        fitting = [other for other in left if name not in pairs and _fits(ours[name], theirs[other])]
        if fitting:
            pairs[name] = fitting[0]
            left.remove(fitting[0])
            how = "the only one of its dtype and shape" if len(fitting) == 1 else "the first that fits"
            notes.append(f"{what} {name!r} of A is taken for {fitting[0]!r} of B, {how}")
    return pairs


def _fits(a: TensorSpec, b: TensorSpec) -> bool:
    if (a.dtype == STRING) != (b.dtype == STRING) or (a.dtype != STRING and np.dtype(a.dtype) != np.dtype(b.dtype)):
        return False
    if a.shape is None or b.shape is None:
        return True
    sizes = zip(a.shape[1:], b.shape[1:], strict=False)
    return len(a.shape) == len(b.shape) and all(None in pair or pair[0] == pair[1] for pair in sizes)


def _common(a: TensorSpec, b: TensorSpec) -> TensorSpec:
    """The shape that fits both; batches of different size are cut by the runtime."""
    if a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return a if a.shape is not None else b._replace(name=a.name)
    dims = [x if x is not None else y for x, y in zip(a.shape, b.shape, strict=True)]
    if dims and a.shape[0] != b.shape[0]:
        dims[0] = None
    return a._replace(shape=tuple(dims))


def _batches(*signatures: runtime.Signature) -> int:
    """The rows of the larger fixed batch; 1 where there is none."""
    return max(batch_size(signature.inputs, 1) for signature in signatures)


def _features(paths: list[Path], keys: list[str]) -> dict | None:
    """The tf.Example features that A, or else B, parses."""
    from tfopt.model import load as load_model
    from tfopt.verify import features

    for path, key in zip(paths, keys, strict=True):
        if path.is_dir():
            try:
                found = features(load_model(path, [key]), key)
            except TfoptError:
                continue  # it runs, and that is all that is asked of it here
            if found:
                return found
    return None


def _results(
    run: Run, specs: Mapping[str, TensorSpec], data: str | None, seed: int, features: dict | None, rows: int
) -> tuple[Dataset, list[runtime.Outputs]]:
    """Inputs that both accept, and what they answer."""
    if data:
        dataset = load(data, specs, feature_spec=features)
        return dataset, [run(0, dataset.inputs), run(1, dataset.inputs)]
    failure = None
    for guess in GUESSES:
        dataset = probes(specs, seed, feature_spec=features, **{"rows": rows, **guess})
        try:
            return dataset, [run(0, dataset.inputs), run(1, dataset.inputs)]
        except TfoptError as error:
            failure = failure or error
    raise TfoptError(f"{failure} (on random inputs; give --data)")


def _compare(results: list[runtime.Outputs], a: str, b: str) -> Output:
    ours, theirs = np.asarray(results[0][a]), np.asarray(results[1][b])
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


def _cost(side: Side, path: Path, notes: list[str]) -> None:
    side.bytes, side.gzip_bytes = measure.sizes(side.path)
    try:
        counted = cost.cost(path, side.signature)
        side.parameters, side.flops = counted.parameters, counted.flops
        notes += [note for note in counted.notes if note not in notes]
    except TfoptError as error:
        notes.append(f"parameters and FLOPs could not be counted: {error}")


def _score(
    sides: list[Side],
    programs: list[runtime.Program],
    run: Run,
    labelled: Dataset,
    metric: str,
    eval_output: str | None,
    outputs: Mapping[str, str],
) -> None:
    for index, (side, program) in enumerate(zip(sides, programs, strict=True)):
        specs = program.signatures[side.signature].inputs
        rows = batch_size(specs, _EVALUATION_BATCH)
        output = eval_output if index == 0 or eval_output is None else outputs.get(eval_output, eval_output)
        side.metric = metrics.evaluate(
            metric,
            functools.partial(run, index),
            labelled,
            output,
            batch_size=rows,
            pad=rows != _EVALUATION_BATCH,
        )


def _time(sides: list[Side], paths: list[Path], ours: Inputs, theirs: Inputs, threads: int, notes: list[str]) -> None:
    """Latency of one request, A and B in turns."""
    calls = {"A": (sides[0].signature, ours), "B": (sides[1].signature, theirs)}
    named = dict(zip("AB", paths, strict=True))
    times = measure.latency(named, sides[0].signature, ours, threads=threads, calls=calls)
    for side, name in zip(sides, "AB", strict=True):
        timed = times[name]
        if timed.error:
            notes.append(timed.error)
        side.latency_ms_p50, side.latency_ms_p95 = timed.p50_ms, timed.p95_ms
        side.peak_memory_bytes = timed.peak_memory_bytes


def _listed(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(map(str, specs.values())) or "none"
