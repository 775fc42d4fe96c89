"""Artifacts that are asked the same: the signature, inputs and outputs of each, by the names of the first (A)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tfopt import runtime, sources
from tfopt.data import STRING, TensorSpec, batch_size
from tfopt.errors import TfoptError
from tfopt.serving import request
from tfopt.serving.encode import Step, encode

Inputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """How one artifact is asked; it can be pickled, so that another process can ask as well.

    Attributes:
      path: a SavedModel directory or a .tflite file.
      signature: the one that is run.
      inputs: input of A -> input of this artifact (of its clients, where there are `steps`).
      outputs: output of A -> output of this artifact; those of A alone are missing.
      steps: how clients make its inputs of rows; see `tfopt.serving.encode`.
      batch: rows of its fixed batch; 1 where it takes any number.
    """

    path: str
    signature: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    steps: Sequence[Step] = ()
    batch: int = 1

    def encoded(self, rows: Inputs) -> dict[str, np.ndarray]:
        """The inputs of the signature for rows by the names of A, in one request."""
        return encode(self.steps, {self.inputs[name]: array for name, array in rows.items()})

    def run(self, program: runtime.Program, rows: Inputs) -> runtime.Outputs:
        """Runs the signature on rows; inputs and outputs have the names of A."""
        own = {self.inputs[name]: array for name, array in rows.items()}
        outputs = request.call(self.steps, lambda arrays: program.run(self.signature, arrays), own)
        return {name: outputs[theirs] for name, theirs in self.outputs.items()}


@dataclass(frozen=True)
class Counterparts:
    """What all artifacts are asked.

    Attributes:
      asked: of each artifact; A is the first.
      programs: opened; closed with the context.
      specs: of the rows that all accept, by the names of A.
      features: the tf.Example features that A, or else another, parses.
      notes: what was assumed, in words.
      extra: for each artifact, its outputs that A has not.
      running: what closes the programs.
    """

    asked: list[Asked]
    programs: list[runtime.Program]
    specs: dict[str, TensorSpec]
    features: dict | None
    notes: list[str] = field(default_factory=list)
    extra: list[list[str]] = field(default_factory=list)
    running: ExitStack = field(default_factory=ExitStack)

    def close(self) -> None:
        """Closes the programs, where other processes open the artifacts again."""
        self.running.close()

    @property
    def batch(self) -> int:
        """Rows of the largest fixed batch; 1 where there is none."""
        return max(each.batch for each in self.asked)


@contextmanager
def opened(
    paths: Sequence[str | Path],
    names: Sequence[str],
    signature: str | None = None,
    *,
    threads: int | None = 2,
    unsafe: bool = False,
) -> Iterator[Counterparts]:
    """Opens artifacts, and finds what in each stands for what in the first.

    Args:
      paths: SavedModel directories, .tflite files, Keras files; in any mixture.
      names: what notes and errors call them.
      signature: of all; None takes serving_default, or the first that all have.
      threads: of the runtimes.
      unsafe: run code that a Keras file carries.

    Raises:
      TfoptError: an artifact is missing or damaged, or does not fit the first.
    """
    with ExitStack() as folders, ExitStack() as running:
        found, programs = [], []
        for given in paths:
            workdir = folders.enter_context(TemporaryDirectory(prefix="tfopt-opened-"))
            found.append(_runnable(Path(given), workdir, unsafe))
            programs.append(running.enter_context(runtime.open(found[-1], threads=threads)))
        keys = _signatures(programs, found, names, signature)
        signatures = [program.signatures[key] for program, key in zip(programs, keys, strict=True)]
        features = _features(found, keys, signatures[0].inputs)
        together = Counterparts([], programs, dict(signatures[0].inputs), features, running=running)
        for index, (path, key, theirs) in enumerate(zip(found, keys, signatures, strict=True)):
            _add(together, path, key, signatures[0], theirs, (names[0], names[index]), keys[0])
        yield together


def _add(
    together: Counterparts,
    path: Path,
    key: str,
    ours: runtime.Signature,
    theirs: runtime.Signature,
    names: tuple[str, str],
    first_key: str,
) -> None:
    """Adds one artifact, whose signature `theirs` is asked as `ours`."""
    a, b = names
    if key != first_key:
        together.notes.append(f"signature {first_key!r} of {a} is compared with {key!r} of {b}")
    steps = _described(path).get(key, {}).get("steps", []) if ours.inputs.keys() != theirs.inputs.keys() else []
    if steps:
        together.notes.append(
            f"{b} is given rows of {a}, in the form that its clients make of them (assets.extra/signatures.json)"
        )
    taken = ours.inputs if steps else theirs.inputs
    inputs = _pair(ours.inputs, taken, "input", names, together.notes)
    missing = [n for n in ours.inputs if n not in inputs] + [n for n in taken if n not in inputs.values()]
    if missing:
        raise TfoptError(
            f"the two take different inputs: {a} {_listed(ours.inputs)}; {b} {_listed(theirs.inputs)}; nothing fits "
            f"{', '.join(map(repr, missing))}"
        )
    outputs = _pair(ours.outputs, theirs.outputs, "output", names, together.notes)
    together.extra.append([name for name in theirs.outputs if name not in outputs.values()])
    together.asked.append(Asked(str(path), key, inputs, outputs, steps, batch_size(theirs.inputs, 1)))
    for name, spec in together.specs.items():
        together.specs[name] = _common(spec, taken[inputs[name]])


def _described(path: Path) -> dict[str, Any]:
    from tfopt.serving.client_stub import described  # which needs TensorFlow

    return described(path)


def _runnable(path: Path, workdir: str, unsafe: bool) -> Path:
    """What the runtime can open: the artifact itself, or the SavedModel that it is converted to."""
    if path.suffix.lower() == ".tflite" and path.is_file():
        return path
    return sources.as_saved_model(path, workdir=workdir, allow_unsafe_deserialization=unsafe)


def _signatures(
    programs: list[runtime.Program], paths: list[Path], names: Sequence[str], wanted: str | None
) -> list[str]:
    keys = [list(program.signatures) for program in programs]
    alike = {key: [_stand_in(key, path, have) for path, have in zip(paths, keys, strict=True)] for key in keys[0]}
    if wanted is not None:
        found = alike.get(wanted, [None])
        for program, have, key in zip(programs, keys, found, strict=False):
            if key is None:
                raise TfoptError(f"{program.path} has no signature {wanted!r}; it has: {', '.join(have)}")
        return [str(key) for key in found]
    all_have = [key for key in keys[0] if None not in alike[key]]
    if all_have:
        return [str(key) for key in alike["serving_default" if "serving_default" in all_have else all_have[0]]]
    if all(len(have) == 1 for have in keys):
        return [have[0] for have in keys]
    lists = "; ".join(f"{name} has {', '.join(have)}" for name, have in zip(names, keys, strict=True))
    raise TfoptError(f"no signature is in {'both' if len(keys) == 2 else 'all'}: {lists}")


def _stand_in(key: str, path: Path, have: Sequence[str]) -> str | None:
    """The signature of that name, or else one that says of itself that it computes the same (`compact_signature`)."""
    if key in have:
        return key
    described = _described(path)
    return next((new for new in have if described.get(new, {}).get("stands_for") == key), None)


def _pair(
    ours: Mapping[str, TensorSpec],
    theirs: Mapping[str, TensorSpec],
    what: str,
    names: tuple[str, str],
    notes: list[str],
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
            notes.append(f"{what} {name!r} of {names[0]} is taken for {fitting[0]!r} of {names[1]}, {how}")
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


def _features(paths: list[Path], keys: list[str], inputs: Mapping[str, TensorSpec]) -> dict | None:
    if not any(spec.dtype == STRING for spec in inputs.values()):
        return None
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


def _listed(specs: Mapping[str, TensorSpec]) -> str:
    return ", ".join(map(str, specs.values())) or "none"
