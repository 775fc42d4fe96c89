"""SavedModel -> TFLite files for devices: float32, float16, dynamic_int8 and int8.

The work is done in a child process (tflite_worker.py): the converter, the quantizers and the interpreter are native
code, and what aborts there ends in an error line of one file. A file appears under its name when it is complete.

Full integer quantization is done twice, by the converter and by litert-quantizer, and the better file is kept: an
all-integer one before one with float ops, then the one with the higher signal-to-noise ratio of its outputs against
those of the float32 file on the representative data. Neither wins on all models.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.child import Child, ChildError
from tfopt.data import Dataset
from tfopt.errors import TfoptError

NAMES = ("float32", "float16", "dynamic_int8", "int8")
IO_TYPES = ("float32", "int8")
CALIBRATION_ROWS = 200

_CONVERTER, _QUANTIZER = "the converter", "litert-quantizer"


@dataclass(frozen=True)
class Converted:
    """One requested file.

    Attributes:
        name: one of NAMES.
        path: of the file; None where there is none.
        error: why there is none, in one line.
        notes: what a reader of the report should know.
    """

    name: str
    path: Path | None
    error: str | None = None
    notes: tuple[str, ...] = ()


def convert(
    saved_model_dir: str | Path,
    names: Sequence[str] = NAMES,
    output_dir: str | Path = "device",
    *,
    representative: Mapping[str, Dataset] | None = None,
    io_type: str = "float32",
    allow_select_tf_ops: bool = False,
    per_channel_dense: bool = False,
    calibration_rows: int = CALIBRATION_ROWS,
    timeout: float = 1800,
) -> list[Converted]:
    """Converts all signatures of a SavedModel, each kind into one file `<output_dir>/<name>.tflite`.

    The same input gives the same bytes. A signature that cannot be converted is left out, with a note, where
    another one can.

    Args:
        saved_model_dir: as `saved_model.save` writes it: v1 style, weights as constants, the batch fixed or not.
        names: what to make.
        output_dir: made where missing; existing files of these names are replaced.
        representative: rows by signature, for calibrating int8; also the data on which quantized files are compared
            with float32.
        io_type: type of the inputs and outputs of the int8 file, where the original's are float32.
        allow_select_tf_ops: let ops without a TFLite kernel through; the device then needs the Flex delegate.
        per_channel_dense: in dynamic_int8, one scale for each output of a fully connected layer instead of one for
            all of them: closer to float32, and not loadable by tflite-runtime 2.14 (FULLY_CONNECTED version 12).
        calibration_rows: how many rows, evenly spaced, to use of the representative data.
        timeout: seconds for one step (one conversion, calibration or comparison).

    Returns:
        One result for each of `names`, in their order.

    Raises:
        TfoptError: an unknown name or io_type.
    """
    for name in names:
        if name not in NAMES:
            raise TfoptError(f"unknown TFLite file '{name}'; choose from {', '.join(NAMES)}")
    if io_type not in IO_TYPES:
        raise TfoptError(f"unknown io_type '{io_type}'; choose from {', '.join(IO_TYPES)}")
    with tempfile.TemporaryDirectory(prefix="tfopt-tflite-") as work:
        options = {"select": allow_select_tf_ops, "per_channel_dense": per_channel_dense, "io_type": io_type}
        rows = {key: _pick(dataset, calibration_rows) for key, dataset in (representative or {}).items()}
        with _Conversion(Path(saved_model_dir), Path(work), rows, options, timeout) as conversion:
            made = {name: conversion.make(name) for name in dict.fromkeys(names)}
            made = {name: conversion.alias(result) for name, result in made.items()}
        return [_publish(made[name], Path(output_dir)) for name in names]


class _Conversion:
    """One run: a child that is replaced when it dies, and the float32 file on which all others stand."""

    def __init__(
        self, saved_model: Path, work: Path, rows: Mapping[str, Any], options: Mapping[str, Any], timeout: float
    ):
        self._saved_model, self._work, self._rows, self._timeout = saved_model, work, rows, timeout
        (work / "rows.pickle").write_bytes(pickle.dumps(dict(rows)))
        self._common = {"saved_model": str(saved_model), "rows": str(work / "rows.pickle"), **options}
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
        if self._float32.error:
            return Converted(name, None, f"{name} stands on {self._float32.error}")
        left_out = tuple(note for note in self._float32.notes if "left out" in note)
        if name == "int8":
            return self._make_int8(left_out)
        found = self._try(name, _CONVERTER)
        if isinstance(found, str):
            return Converted(name, None, f"{name}: {found}")
        path, facts = found
        if not facts["quantized"]:
            return Converted(
                name, None, f"{name}: nothing to quantize: the float32 file has no weights large enough for it"
            )
        return Converted(name, path, notes=(*left_out, *_ratio(facts), *facts["notes"]))

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
        self._signatures = keys
        found = self._try("float32", _CONVERTER)
        if isinstance(found, str) and len(keys) > 1:
            # One that cannot be converted hides the others: take them one by one.
            reasons = {}
            for key in keys:
                self._signatures = [key]
                alone = self._try("float32", _CONVERTER)
                if isinstance(alone, str):
                    reasons[key] = alone
            self._signatures = [key for key in keys if key not in reasons]
            if self._signatures:
                found = self._try("float32", _CONVERTER)
                notes = [f"signature '{key}' was left out: {reason}" for key, reason in reasons.items()]
        if isinstance(found, str):
            return Converted("float32", None, f"float32: {found}")
        path, facts = found
        return Converted("float32", path, notes=(*notes, *facts["notes"]))

    def _make_int8(self, notes: tuple[str, ...]) -> Converted:
        # Without data, nobody knows the ranges of a signature's activations.
        keys = [key for key in self._signatures if key in self._rows or not self._inputs[key]]
        missing = sorted(set(self._signatures) - set(keys))
        if missing and not any(self._inputs[key] for key in keys):
            return Converted(
                "int8", None, f"int8 needs representative data for signature '{missing[0]}'; give it, or drop int8"
            )
        notes += tuple(f"signature '{key}' was left out of int8: it has no representative data" for key in missing)
        found: dict[str, tuple[Path, dict[str, Any]]] = {}
        reasons = {}
        for by in (_CONVERTER, _QUANTIZER):
            result = self._try("int8", by, keys)
            if isinstance(result, str):
                reasons[by] = result
            elif not result[1]["quantized"]:
                reasons[by] = "nothing to quantize"
            else:
                found[by] = result
        if not found:
            same = len(set(reasons.values())) == 1
            why = reasons[_CONVERTER] if same else "; ".join(f"{by}: {reason}" for by, reason in reasons.items())
            return Converted("int8", None, f"int8: {why}")

        def worth(by: str) -> tuple[bool, float]:
            facts = found[by][1]
            return not facts["float_ops"], -np.inf if facts["snr"] is None else facts["snr"]

        best = max(found, key=worth)
        path, facts = found[best]
        for by, (_, other) in found.items():
            if by != best:
                floats = f" and {sum(other['float_ops'].values())} float ops" if other["float_ops"] else ""
                notes += (f"quantized by {best}, {_decibel(facts)}; {by} gave {_decibel(other)}{floats}",)
        notes += tuple(f"quantized by {best}; {by} failed: {reason}" for by, reason in reasons.items())
        if facts["float_ops"]:
            left = ", ".join(f"{count} x {op}" for op, count in facts["float_ops"].items())
            notes += (f"not all-integer: {left} left in float",)
        return Converted("int8", path, notes=(*notes, *_ratio(facts), *facts["notes"]))

    def _try(self, name: str, by: str, signatures: list[str] | None = None) -> tuple[Path, dict[str, Any]] | str:
        """Makes a file and examines it.

        Returns:
            The path and what was found out, or the reason why there is none.
        """
        path = self._work / f"{name}-{by.split()[-1]}.tflite"
        base = self._work / f"float32-{_CONVERTER.split()[-1]}.tflite"
        keys = signatures or self._signatures
        job = {**self._common, "signatures": keys, "path": str(path), "float32": str(base)}
        try:
            notes = self._ask("quantize" if by == _QUANTIZER else "convert", name=name, **job)
            facts = self._ask("examine", name=name, **job)
        except ChildError as error:
            return str(error)
        facts["notes"] = [*notes, *facts["notes"]]
        if name != "float32" and (size := path.stat().st_size) >= (full := base.stat().st_size):
            facts["notes"].append(f"no smaller than float32: {size:,} bytes against {full:,}")
        return path, facts

    def _ask(self, task: str, **job: Any) -> Any:
        if self._child is None or not self._child.alive:
            if self._child:
                self._child.close()
            self._child = Child("tfopt.export.tflite_worker:worker")
        return self._child.ask({"task": task, **self._common, **job}, self._timeout)


def _pick(dataset: Dataset, limit: int) -> tuple[dict[str, np.ndarray], frozenset[str]]:
    """Returns up to `limit` evenly spaced rows (sorted data would show one class only), and what has no rows."""
    picks = np.unique(np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(int))
    arrays = {n: array if n in dataset.whole else array[picks] for n, array in dataset.inputs.items()}
    return arrays, dataset.whole


def _decibel(facts: Mapping[str, Any]) -> str:
    if facts["snr"] is None:
        return "not compared"
    return f"{facts['snr']:.1f} dB" if np.isfinite(facts["snr"]) else "no error"


def _ratio(facts: Mapping[str, Any]) -> Iterable[str]:
    if facts["snr"] is not None:
        yield f"signal-to-noise ratio against float32, on {facts['rows']} representative rows: {_decibel(facts)}"


def _publish(made: Converted, output_dir: Path) -> Converted:
    """Moves a finished file to its place; a killed run leaves no half of one."""
    if made.path is None:
        return made
    output_dir.mkdir(parents=True, exist_ok=True)
    final = output_dir / f"{made.name}.tflite"
    beside = output_dir / f".{made.name}.{os.getpid()}.tmp"
    shutil.copyfile(made.path, beside)
    beside.replace(final)
    return Converted(made.name, final, None, made.notes)
