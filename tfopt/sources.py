"""Whatever a trained model comes as -> a SavedModel directory.

| given | how |
|---|---|
| SavedModel directory | as it is |
| .keras, .h5, .hdf5 | Keras 3, then tf_keras where Keras 3 cannot read it: ``keras_file.py`` |
| .pb with a frozen GraphDef | a v1-style SavedModel with one signature: ``frozen_graph.py`` |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tfopt.errors import TfoptError

KERAS_SUFFIXES = (".keras", ".h5", ".hdf5")
_KINDS = "a SavedModel directory, .keras, .h5, .hdf5 or a frozen GraphDef .pb"


def as_saved_model(
    path: str | Path,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    allow_unsafe_deserialization: bool = False,
    workdir: str | Path,
) -> Path:
    """A SavedModel directory that holds the model of ``path``.

    Args:
        path: what the user gave: see the table above.
        inputs: tensor or node names of a frozen GraphDef's inputs; for that only.
        outputs: the same of its outputs.
        allow_unsafe_deserialization: run the Python code that a Keras file may carry (Lambda layers).
        workdir: an existing directory that a converted model is written into.

    Returns:
        ``path`` itself for a SavedModel, else a directory under ``workdir``.

    Raises:
        TfoptError: there is no such file, it is of no known kind, it is damaged, or it carries code.
    """
    path = Path(path)
    if not path.exists():
        raise TfoptError(f"there is no model at {path}: give {_KINDS}")
    suffix = path.suffix.lower()
    if path.name in ("saved_model.pb", "saved_model.pbtxt"):
        raise TfoptError(f"{path} is a part of a SavedModel: give its directory, {path.parent}")
    if (inputs or outputs) and (path.is_dir() or suffix != ".pb"):
        raise TfoptError(f"--inputs and --outputs go with a frozen GraphDef .pb only. Received: {path}")
    if path.is_dir():
        _check_directory(path)
        return path
    destination = Path(workdir) / "source"
    if suffix in KERAS_SUFFIXES:
        from tfopt import keras_file

        keras_file.export(path, destination, allow_unsafe_deserialization)
    elif suffix == ".pb":
        from tfopt import frozen_graph

        frozen_graph.export(path, destination, inputs, outputs)
    elif suffix == ".tflite":
        raise TfoptError(f"{path} is already converted, and cannot be optimized again: give {_KINDS}")
    else:
        raise TfoptError(f"{path} is of no known kind: give {_KINDS}")
    return destination


def _check_directory(path: Path) -> None:
    """Raise where a directory is no SavedModel; a hint names the version directories inside it."""
    if any((path / name).is_file() for name in ("saved_model.pb", "saved_model.pbtxt")):
        return
    versions = sorted(str(file.parent) for file in path.glob("*/saved_model.pb"))
    hint = f"; there is one in {', '.join(versions[:3])}" if versions else ""
    raise TfoptError(f"{path} is not a SavedModel: it has no saved_model.pb{hint}")
