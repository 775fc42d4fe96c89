"""SavedModel -> TFLite files for devices: float, quantized weights, and integer activations (docs/devices.md).

The work is done in a child process (tflite_worker.py): the converter, the quantizers and the interpreter are native
code, and what aborts there ends in an error line of one file. A file appears under its name when it is complete.

A quantized file is made by every engine that can make it (tflite_kinds.py), each result is run, and the best is kept:
all-integer before one with float ops where activations are integers, then the highest signal-to-noise ratio of the
outputs against those of the float32 file on the representative data; among those within 0.5 dB of it, the smallest.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tfopt.child import Child, ChildError
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export.tflite_choice import Candidate, choose, decibel, grouped, left
from tfopt.export.tflite_kinds import LITERT, NAMES, OLD, RUNTIMES, STATIC, Engine, engines
from tfopt.export.tflite_rows import not_finite, pick

IO_TYPES = ("float32", "int8")
_MOST = 0.6  # of the bytes of float32: a file of 8-bit weights is smaller
CALIBRATION_ROWS = 200
_OLD_WORDS = "tflite-runtime 2.14 cannot run it: "


@dataclass(frozen=True)
class Converted:
    """One requested file.

    Attributes:
        name: one of NAMES.
        path: of the file; None where there is none.
        error: why there is none, in one line.
        notes: what a reader of the report should know.
        engine: which of the engines made it.
        snr: signal-to-noise ratio of the worst output against float32, in dB; None where nothing was compared.
    """

    name: str
    path: Path | None
    error: str | None = None
    notes: tuple[str, ...] = ()
    engine: str | None = None
    snr: float | None = None


def check_names(names: Sequence[str]) -> None:
    """Raises TfoptError for a name that is none of NAMES."""
    for name in names:
        if "int2" in name.split("_"):
            raise TfoptError(f"{name!r}: 2-bit weights are not made, since CONV_2D gives NaN with them")
        if name not in NAMES:
            raise TfoptError(f"unknown name {name!r}; choose from {', '.join(NAMES)}")


def convert(
    saved_model_dir: str | Path,
    names: Sequence[str] = ("float32", "float16", "dynamic_int8", "int8"),
    output_dir: str | Path = "device",
    *,
    representative: Mapping[str, Dataset] | None = None,
    io_type: str = "float32",
    runtime: str = LITERT,
    all_integer: bool = False,
    fake_quantized: str | Path | None = None,
    trained: bool = False,
    allow_select_tf_ops: bool = False,
    calibration_rows: int = CALIBRATION_ROWS,
    timeout: float = 1800,
) -> list[Converted]:
    """Converts all signatures of a SavedModel, each kind into one file `<output_dir>/<name>.tflite`.

    The same input gives the same bytes. A signature that cannot be converted is left out, with a note, where
    another one can.

    Args:
        saved_model_dir: as `saved_model.save` writes it: v1 style, weights as constants, the batch fixed or not.
        names: what to make, of NAMES.
        output_dir: made where missing; existing files of these names are replaced.
        representative: rows by signature, for calibrating integer activations; also the data on which quantized files
            are compared with float32.
        io_type: type of the inputs and outputs of int8, int4 and mixed files, where the original's are float32.
        runtime: "litert", or "tflite-2.14": only what the frozen tflite-runtime runs; the rest is refused.
        all_integer: refuse int8, int16x8, int4 and mixed files in which an op was left in float.
        fake_quantized: a SavedModel like the first, whose graph holds fake-quant nodes: int8, int4 and mixed files take
            their ranges from these, and need no representative rows.
        trained: whether its weights were trained under these nodes: without that, int8 and int4 files are made by the
            other engines too, and the best is kept.
        allow_select_tf_ops: let ops without a TFLite kernel through; the device then needs the Flex delegate.
        calibration_rows: how many rows, evenly spaced, to use of the representative data.
        timeout: seconds for one step (one conversion, calibration or comparison).

    Returns:
        One result for each of `names`, in their order.

    Raises:
        TfoptError: an unknown name, io_type or runtime.
    """
    check_names(names)
    for what, value, known in (("io_type", io_type, IO_TYPES), ("runtime", runtime, RUNTIMES)):
        if value not in known:
            raise TfoptError(f"unknown {what} '{value}'; choose from {', '.join(known)}")
    with tempfile.TemporaryDirectory(prefix="tfopt-tflite-") as work:
        options = {"select": allow_select_tf_ops, "io_type": io_type, "runtime": runtime, "all_integer": all_integer}
        options["trained"] = trained
        ranges = Path(fake_quantized) if fake_quantized else None
        rows = {key: pick(dataset, calibration_rows) for key, dataset in (representative or {}).items()}
        bad = {key: reason for key, data in (representative or {}).items() if (reason := not_finite(key, data))}
        with _Conversion(Path(saved_model_dir), Path(work), rows, bad, ranges, options, timeout) as conversion:
            made = {name: conversion.make(name) for name in dict.fromkeys(names)}
            made = {name: conversion.alias(result) for name, result in made.items()}
        return [_publish(made[name], Path(output_dir)) for name in names]


class _Conversion:
    """One run: a child that is replaced when it dies, and the float32 file on which all others stand."""

    def __init__(
        self,
        saved_model: Path,
        work: Path,
        rows: Mapping[str, Any],
        bad_rows: Mapping[str, str],
        fake_quantized: Path | None,
        options: Mapping[str, Any],
        timeout: float,
    ):
        self._saved_model, self._work, self._rows, self._timeout = saved_model, work, rows, timeout
        self._bad_rows, self._fake_quantized, self._options = bad_rows, fake_quantized, options
        (work / "rows.pickle").write_bytes(pickle.dumps(dict(rows)))
        self._common = {"saved_model": str(saved_model), "rows": str(work / "rows.pickle"), **options}
        self._base = work / "float32.tflite"
        self._child: Child | None = None
        self._float32: Converted | None = None
        self._inputs: dict[str, list[str]] = {}  # by signature
        self._aliases: dict[str, str] = {}  # other names of the same signatures
        self._signatures: list[str] = []  # those that float32 has

    def __enter__(self) -> _Conversion:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._child:
            self._child.close()

    def make(self, name: str) -> Converted:
        """Makes one file in the working folder."""
        if self._float32 is None:
            self._float32 = self._make_float32()
        if name == "float32":
            return self._float32
        if not self._signatures:
            return Converted(name, None, f"{name} stands on {self._float32.error}")
        notes = tuple(note for note in self._float32.notes if "left out" in note)
        keys, static = self._signatures, name in STATIC
        candidates = engines(name, self._options["runtime"], self._fake_quantized, self._options["trained"])
        if not candidates:
            return Converted(name, None, f"{name} needs a graph with fake-quant nodes; choose a recipe that makes one")
        if static and candidates[0].needs_rows:
            # Without data, nobody knows the ranges of a signature's activations.
            keys = [key for key in self._signatures if key in self._rows or not self._inputs[key]]
            missing = sorted(set(self._signatures) - set(keys))
            if missing and not any(self._inputs[key] for key in keys):
                why = f"needs representative data for signature '{missing[0]}'; give it, or drop {name}"
                return Converted(name, None, f"{name} {why}")
            for key in keys:
                if key in self._bad_rows:
                    return Converted(name, None, f"{name} cannot be calibrated: {self._bad_rows[key]}")
            notes += tuple(
                f"signature '{key}' was left out of {name}: it has no representative data" for key in missing
            )
        return self._best(name, candidates, keys, notes)

    def alias(self, made: Converted) -> Converted:
        """Adds the other names of its signatures to a finished file."""
        if made.path is None or not self._aliases:
            return made
        try:
            self._ask("alias", path=str(made.path), aliases=self._aliases)
        except ChildError as error:
            return Converted(made.name, None, f"{made.name}: naming its signatures failed: {error}")
        return made

    def _make_float32(self) -> Converted:
        try:
            self._inputs, self._aliases = self._ask("signatures")
        except ChildError as error:
            return Converted("float32", None, f"{self._saved_model} cannot be read: {error}")
        keys, notes = sorted(self._inputs), []
        (engine,) = engines("float32")
        found = self._try("float32", engine, self._base, keys)
        self._signatures = [] if isinstance(found, str) else keys
        if isinstance(found, str) and len(keys) > 1:
            # One that cannot be converted hides the others: take them one by one.
            alone = {key: self._try("float32", engine, self._base, [key]) for key in keys}
            reasons = {key: result for key, result in alone.items() if isinstance(result, str)}
            if len(reasons) < len(keys):
                self._signatures = [key for key in keys if key not in reasons]
                found = self._try("float32", engine, self._base, self._signatures)
                notes = [f"signature '{key}' was left out: {reason}" for key, reason in reasons.items()]
        if isinstance(found, str):
            self._signatures = []
            return Converted("float32", None, f"float32: {found}")
        if refused := self._refused(found):  # the others may still do without
            return Converted("float32", None, f"float32: {refused}", (*notes,))
        return Converted("float32", found.path, None, (*notes, *found.facts["notes"]), engine.by)

    def _best(self, name: str, candidates: list[Engine], keys: list[str], notes: tuple[str, ...]) -> Converted:
        found, reasons = self._run(name, candidates, keys)
        full = self._base.stat().st_size
        if name in ("int8", "int4") and not self._options["all_integer"]:
            smallest = min((each.size for each in found), default=full)
            if smallest > _MOST * full:  # loops hold most of the weights, and no quantizer sees into them
                dynamic, _ = self._run(f"dynamic_{name}", engines(f"dynamic_{name}", self._options["runtime"]), keys)
                if dynamic := [each for each in dynamic if each.size < _MOST * full]:
                    found = dynamic
                    notes += (
                        f"{name} leaves most of the weights in float, as those of loops are: this file has {name} "
                        "weights, and the ranges of its activations are found at run time",
                    )
        if not found:
            why = grouped(reasons, ": ") if len(set(reasons.values())) > 1 else next(iter(reasons.values()))
            return Converted(name, None, f"{name}: {why}")
        best = choose(found)
        others = [f"{each.engine.by} gave {each}" for each in found if each is not best]
        others += [grouped(reasons, " failed: ")] if reasons else []
        if others:
            notes += (f"quantized by {best.engine.by}, {best}; {'; '.join(others)}",)
        if best.facts["static"] and best.facts["float_ops"]:
            notes += (f"not all-integer: {left(best.facts)} left in float",)
        if best.facts["snr"] is not None:
            rows = f"on {best.facts['rows']} representative rows"
            notes += (f"signal-to-noise ratio against float32, {rows}: {decibel(best.facts)}",)
        notes += tuple(best.facts["notes"])
        if best.size >= full:
            notes += (f"no smaller than float32: {best.size:,} bytes against {full:,}",)
        return Converted(name, best.path, None, notes, best.engine.by, best.facts["snr"])

    def _run(self, name: str, candidates: list[Engine], keys: list[str]) -> tuple[list[Candidate], dict[str, str]]:
        """Lets engines make a file; returns those that differ, and the reason by engine where there is none."""
        found: list[Candidate] = []
        reasons: dict[str, str] = {}
        compared, sound = any(key in self._rows for key in keys), self._rows.keys() - self._bad_rows.keys()
        contents: set[bytes] = set()
        for number, engine in enumerate(candidates):
            if engine.needs_rows and not all(key in sound or not self._inputs[key] for key in keys):
                continue
            if found and not compared:
                break  # nothing to choose by
            result = self._try(name, engine, self._work / f"{name}-{number}.tflite", keys)
            if isinstance(result, str):
                reasons[engine.by] = result
            elif refused := self._refused(result):
                reasons[engine.by] = refused
            elif (content := result.path.read_bytes()) not in contents:
                contents.add(content)
                found.append(result)
        return found, reasons

    def _refused(self, made: Candidate) -> str | None:
        """Returns why a file that runs here is not what was asked for; adds a note where it only might not be."""
        facts = made.facts
        if made.path != self._base:
            if not facts["quantized"]:
                return "nothing to quantize: the float32 file has no weights large enough for it"
            if facts["static"] and facts["float_ops"] and self._options["all_integer"]:
                return f"no integer kernel for {left(facts)}, and all_integer leaves no op in float"
        if facts["problems"]:
            words = _OLD_WORDS + "; ".join(facts["problems"])
            if self._options["runtime"] == OLD:
                return words
            facts["notes"].append(words)
        return None

    def _try(self, name: str, engine: Engine, path: Path, signatures: list[str]) -> Candidate | str:
        """Makes a file and examines it.

        Returns:
            The file and what was found out, or the reason why there is none.
        """
        job = {**self._common, "signatures": signatures, "path": str(path), "float32": str(self._base), "name": name}
        try:
            notes = self._ask(engine.task, **{**job, **engine.options})
            facts = self._ask("examine", **job)
        except ChildError as error:
            return str(error).replace(f"{path.name}: ", "")
        facts["notes"] = [*notes, *facts["notes"]]
        facts["static"] = name in STATIC
        return Candidate(engine, path, facts)

    def _ask(self, task: str, **job: Any) -> Any:
        if self._child is None or not self._child.alive:
            if self._child:
                self._child.close()
            self._child = Child("tfopt.export.tflite_worker:worker")
        return self._child.ask({"task": task, **self._common, **job}, self._timeout)


def _publish(made: Converted, output_dir: Path) -> Converted:
    """Moves a finished file to its place; a killed run leaves no half of one."""
    if made.path is None:
        return made
    output_dir.mkdir(parents=True, exist_ok=True)
    final = output_dir / f"{made.name}.tflite"
    beside = output_dir / f".{made.name}.{os.getpid()}.tmp"
    shutil.copyfile(made.path, beside)
    beside.replace(final)
    return replace(made, path=final)
