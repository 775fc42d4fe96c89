"""Keras files (.keras, .h5, .hdf5) -> SavedModel.

A child process loads and exports each file: which Keras TensorFlow works with is decided once a process, and a file may
crash its reader.

A Keras file can carry Python code (Lambda layers) or name any function to be called. Neither library refuses all of it:
tf_keras ignores ``safe_mode`` for .h5 and imports any module that a .keras file names. So the configuration is checked
here, before anything is deserialized.
"""

from __future__ import annotations

import builtins
import importlib.util
import json
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tfopt.child import Child, ChildError
from tfopt.errors import TfoptError

_TIMEOUT = 3600.0  # seconds, for a load and an export; gigabytes take minutes

# Where a function may come from by name, below the package of Keras.
_FUNCTION_MODULES = {"activations", "constraints", "initializers", "losses", "metrics", "ops", "regularizers"}
# Namespaces and functions of tf.* whose calls (TFOpLambda layers) do no more than compute.
_TF_NAMESPACES = {"__operators__", "bitwise", "dtypes", "image", "linalg", "math", "nn", "quantization", "ragged"}
_TF_NAMESPACES |= {"random", "sets", "signal", "sparse", "strings"}
_TF_NOT_PURE = {"load_library", "load_op_library", "numpy_function", "py_func", "py_function"}


def export(path: Path, destination: Path, allow_unsafe: bool = False) -> None:
    """Write a Keras file's model as a SavedModel with the signature ``serving_default``.

    Args:
        path: a .keras, .h5 or .hdf5 file that holds a whole model.
        destination: directory to write; must not exist.
        allow_unsafe: run the Python code that the file may carry.

    Raises:
        TfoptError: the file is damaged, holds weights only, carries code, or no Keras can read it.
    """
    config = read_config(path)
    if not allow_unsafe:
        for layer, reason in unsafe(config):
            raise TfoptError(
                f"{path}: layer '{layer}' {reason}; loading it could run code that the file's author chose."
                " Give --allow_unsafe_deserialization if you trust the file"
            )
    failures = []
    for library in ("keras", "tf_keras"):
        if importlib.util.find_spec(library) is None:
            failures.append(f"{library} is not installed (pip install 'tfopt[keras2]')")
            continue
        try:
            return _export_in_child(library, path, destination, allow_unsafe)
        except ChildError as error:
            failures.append(f"{library}: {_one_line(error)}")
            shutil.rmtree(destination, ignore_errors=True)
    raise TfoptError(f"{path} could not be read as a Keras model. {'; '.join(failures)}")


def _one_line(error: Exception, limit: int = 300) -> str:
    """A message without line breaks, cut where it is long; an exception that says nothing is named."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= limit else line[:limit] + "..."


def read_config(path: Path) -> dict[str, Any]:
    """The model's configuration, as the file has it.

    Args:
        path: a .keras (zip) or .h5 file.

    Returns:
        The parsed JSON.

    Raises:
        TfoptError: the file is damaged or holds weights only.
    """
    import h5py

    try:
        # As both libraries decide it: a file that is zip and HDF5 at once must not show one face here, another there.
        if str(path).endswith(".keras") and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                text = archive.read("config.json")
        else:
            with h5py.File(path, "r") as file:
                if "model_config" not in file.attrs:
                    raise TfoptError(
                        f"{path} holds weights without a model: save the whole model (model.save) in place of"
                        " its weights"
                    )
                text = file.attrs["model_config"]
        config = json.loads(text)
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise TfoptError(f"{path} is damaged or no Keras file: {_one_line(error)}") from error
    if not isinstance(config, dict):
        raise TfoptError(f"{path} is damaged: its configuration is no JSON object")
    return config


def unsafe(config: Any, layer: str = "model") -> Iterator[tuple[str, str]]:
    """What in a Keras configuration could run code of its author's choice.

    Args:
        config: parsed JSON, or a part of it.
        layer: name of the innermost layer around ``config``.

    Yields:
        The layer's name, and a reason that reads on after it.
    """
    if isinstance(config, list):
        for item in config:
            yield from unsafe(item, layer)
    if not isinstance(config, dict):
        return
    inner = config.get("config")
    if isinstance(inner, dict) and isinstance(inner.get("name"), str):
        layer = inner["name"]
    reason = _unsafe_object(config)
    if reason is not None:
        yield layer, reason
    for value in config.values():
        yield from unsafe(value, layer)


def _unsafe_object(config: dict[str, Any]) -> str | None:
    """Why one object of a configuration, its children apart, is unsafe; None where it is not."""
    kind = config.get("class_name")
    if not isinstance(kind, str):
        kind = ""
    # A registered name is "package>Lambda".
    if kind.split(">")[-1] in ("Lambda", "__lambda__"):
        return "holds Python code (Lambda)"
    for key, value in config.items():
        if key.endswith(("fn_type", "function_type")) and value == "lambda":
            return f"holds Python code ({key})"
    module = config.get("module")
    if kind and isinstance(module, str):
        package, *parts = module.split(".")
        if package == "builtins" and kind == "function" and not hasattr(builtins, str(config.get("config"))):
            return None  # How Keras 3 writes the name of a function that the user defined.
        if package not in ("keras", "tf_keras") and module != "builtins":
            return f"needs code of the Python module '{module}'"
        if module == "builtins" or (kind == "function" and parts and not _FUNCTION_MODULES & set(parts)):
            return f"names the function '{config.get('config')}' of '{module}'"
    inner = config.get("config")
    if kind in ("TFOpLambda", "ClassMethod") and isinstance(inner, dict):
        symbol = str(inner.get("function", inner.get("cls_symbol", "")))
        namespace, _, rest = symbol.removeprefix("compat.v1.").partition(".")
        if (rest and namespace not in _TF_NAMESPACES) or namespace in _TF_NOT_PURE:
            return f"calls tf.{symbol}"
    return None


def _export_in_child(library: str, path: Path, destination: Path, allow_unsafe: bool) -> None:
    """Load with one library and export, in a process of its own; raises ChildError in one line."""
    environ = {
        "KERAS_BACKEND": "tensorflow",
        "TF_USE_LEGACY_KERAS": "1" if library == "tf_keras" else "0",
        "CUDA_VISIBLE_DEVICES": "-1",
    }
    with Child("tfopt.keras_file:exporter", environ) as child:
        child.ask((library, str(path), str(destination), allow_unsafe), _TIMEOUT)


def exporter():
    """The worker of the child: a function of (library, path, destination, allow_unsafe)."""

    def answer(request: tuple[str, str, str, bool]) -> None:
        library, path, destination, allow_unsafe = request
        if library == "keras":
            import keras

            if allow_unsafe:
                keras.config.enable_unsafe_deserialization()
            model = keras.saving.load_model(path, compile=False, safe_mode=not allow_unsafe)
            model.export(destination, verbose=False)
        else:
            import tf_keras

            if allow_unsafe:
                tf_keras.__internal__.enable_unsafe_deserialization()
            model = tf_keras.models.load_model(path, compile=False, safe_mode=not allow_unsafe)
            model.export(destination)

    return answer
