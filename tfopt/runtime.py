"""One face for everything that tfopt compares: SavedModel directories and .tflite files.

    with runtime.open("saved_models/digits", threads=2) as program:
        scores = program.run("serving_default", {"image": images})["scores"]

TensorFlow is imported only where a SavedModel is opened, so that the peak memory of a process that runs a .tflite file
is that of the file.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.data import STRING, TensorSpec
from tfopt.errors import TfoptError

Outputs = dict[str, np.ndarray]

SESSION = "v1 session"  # what TensorFlow Serving does
PYTHON = "tf.saved_model.load"
LITERT = "ai_edge_litert"
PLAIN = "ai_edge_litert without XNNPACK"  # where the delegate cannot prepare the file


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of one signature, by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


class NeedsFlexError(TfoptError):
    """A .tflite file with Select TF ops, which only an interpreter with the Flex delegate runs: there is none here."""


class Program(ABC):
    """An opened artifact; a context manager.

    Attributes:
        path: where it came from.
        loader: SESSION, PYTHON, LITERT or PLAIN.
        signatures: by name.
    """

    loader: str
    signatures: dict[str, Signature]

    def __init__(self, path: str):
        self.path = path

    def run(self, signature: str, inputs: Mapping[str, Any]) -> Outputs:
        """Runs a signature once.

        Args:
            signature: its name.
            inputs: one array per input, of the dtype and shape in `self.signatures`. Where the signature has a fixed
                batch and more rows come, it runs batch by batch, in order.

        Returns:
            One array per output, as the original floats where the artifact has int8 outputs.

        Raises:
            TfoptError: the inputs do not fit, or the runtime failed.
        """
        return self.prepare(signature, inputs)()

    def prepare(self, signature: str, inputs: Mapping[str, Any]) -> Callable[[], Outputs]:
        """Returns a function that runs `signature` on `inputs`, with all checks and casts already done.

        For measuring: what the function does is what a server or a device does for each request.
        """
        if signature not in self.signatures:
            have = ", ".join(sorted(self.signatures))
            raise TfoptError(f"{self.path} has no signature '{signature}'; it has: {have}")
        specs = self.signatures[signature].inputs
        if inputs.keys() != specs.keys():
            raise TfoptError(
                f"{self.path}: signature '{signature}' takes the inputs {sorted(specs)}, received {sorted(inputs)}"
            )
        arrays = {name: self._fit(signature, spec, inputs[name]) for name, spec in specs.items()}
        chunks, rows = _split(arrays, specs)
        for name, spec in specs.items():
            if not _fits(chunks[0][name].shape, spec.shape):
                raise TfoptError(f"{self.path}: signature '{signature}' wants {spec}, received {arrays[name].shape}")
        calls = [self._bind(signature, chunk) for chunk in chunks]
        if len(calls) == 1 and rows is None:
            return calls[0]
        return lambda: self._join([call() for call in calls], signature, rows)

    @abstractmethod
    def close(self) -> None:
        """Frees the artifact; it cannot run after that."""

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @abstractmethod
    def _bind(self, signature: str, arrays: dict[str, np.ndarray]) -> Callable[[], Outputs]:
        """Returns the call; `arrays` have the dtypes of the signature."""

    def _fit(self, signature: str, spec: TensorSpec, value: Any) -> np.ndarray:
        array = np.asarray(value)
        if spec.dtype == STRING:
            if array.dtype.kind in "SUO":
                return array.astype(object)
        elif np.can_cast(array.dtype, spec.dtype, "same_kind") or (
            array.dtype.kind in "iu" and np.dtype(spec.dtype).kind in "iu"
        ):
            return np.ascontiguousarray(array, spec.dtype) if array.ndim else array.astype(spec.dtype)
        raise TfoptError(f"{self.path}: signature '{signature}' wants {spec}, received dtype {array.dtype}")

    def _join(self, parts: list[Outputs], signature: str, rows: int | None) -> Outputs:
        for name, array in parts[0].items():
            if not array.ndim:
                raise TfoptError(
                    f"{self.path}: signature '{signature}' has a fixed batch, and its output '{name}' is a "
                    f"scalar, so it cannot run on {rows} rows; give it one batch at a time"
                )
        return {name: np.concatenate([part[name] for part in parts])[:rows] for name in parts[0]}

    def _failed(self, signature: str, error: Exception) -> TfoptError:
        return TfoptError(f"{self.path}: signature '{signature}' cannot run: {one_line(error)}")


def open(path: str | Path, threads: int | None = None, loader: str | None = None) -> Program:
    """Opens a SavedModel directory or a .tflite file, with fresh state.

    Args:
        path: the directory or the file.
        threads: of the runtime; None leaves it to the runtime. TensorFlow fixes the threads of a process when it first
            makes a session or runs an op, so where threads matter, open in a process of its own (as measure does).
        loader: SESSION or PYTHON, to load a SavedModel in this way or not at all. None tries them in this order: a
            Keras 3 model from `tf.saved_model.save` loads in a session, fails at the first call, and goes to PYTHON.

    Raises:
        TfoptError: there is no such thing, or it cannot be loaded.
    """
    target = Path(path)
    if target.is_file():
        from tfopt.runtime_tflite import LiteProgram

        return LiteProgram(str(path), threads)
    if not target.is_dir():
        raise TfoptError(f"{path}: no such SavedModel directory or .tflite file")
    if not any((target / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt")):
        raise TfoptError(f"{path} is not a SavedModel: it holds no saved_model.pb")
    from tfopt.runtime_saved_model import PythonProgram, SessionProgram

    if loader == PYTHON:
        return PythonProgram(str(path), threads)
    try:
        return SessionProgram(str(path), threads, fall_back=loader is None)
    except TfoptError:
        if loader == SESSION:
            raise
        return PythonProgram(str(path), threads)


def one_line(error: Exception) -> str:
    """Returns what a TensorFlow error says, as one line that names the op where the error knows it."""
    text = str(getattr(error, "message", None) or error)
    node = getattr(getattr(error, "op", None), "name", None)
    if not node:
        found = re.search(r"\{\{(?:function_)?node ([^}]+)\}\}", text) or re.search(r"^Node: '([^']+)'", text, re.M)
        node = found.group(1).strip() if found else None
    # Where the graph remembers Python, the message begins with a traceback of the training code.
    text = re.split(r"^Node: '[^']*'$", text, flags=re.M)[-1].removeprefix("Graph execution error:")
    text = re.sub(r"\{\{(?:function_)?node [^}]*\}\}", "", text)
    lines = (" ".join(line.strip(" \t[]").split()) for line in text.splitlines())
    line = next(filter(None, lines), type(error).__name__)
    line = line if len(line) <= 300 else line[:297] + "..."
    return f"{line} (op '{node}')" if node and node not in line else line


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...] | None) -> bool:
    return wanted is None or (
        len(shape) == len(wanted) and all(w is None or w == s for s, w in zip(shape, wanted, strict=True))
    )


def _split(
    arrays: dict[str, np.ndarray], specs: Mapping[str, TensorSpec]
) -> tuple[list[dict[str, np.ndarray]], int | None]:
    """Cuts the rows into the fixed batches of the signature.

    The last batch is filled up with its last row.

    Returns:
        The batches and the number of rows, or all in one and None where nothing needs to be cut.
    """
    cut = {
        name: spec.shape[0]
        for name, spec in specs.items()
        if spec.shape and spec.shape[0] and arrays[name].ndim and len(arrays[name]) != spec.shape[0]
    }
    rows = {len(arrays[name]) for name in cut}
    if len(rows) != 1 or len(set(cut.values())) != 1 or 0 in rows:
        return [arrays], None
    size, total = next(iter(cut.values())), rows.pop()
    if total < size:
        return [arrays], None
    chunks = []
    for start in range(0, total, size):
        pick = np.minimum(np.arange(start, start + size), total - 1)
        chunks.append({name: array[pick] if name in cut else array for name, array in arrays.items()})
    return chunks, total
