"""What tfopt reads and writes as TFX artifacts: where a model lies, and what MLMD is told about a run."""

from __future__ import annotations

import contextlib
import json
import numbers
import posixpath
import tempfile
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from absl import logging
from tfx.dsl.io import fileio
from tfx.proto.orchestration.execution_result_pb2 import ExecutionResult, ExecutorOutput
from tfx.types import artifact_utils
from tfx.types.artifact import Artifact, Property, PropertyType
from tfx.utils import io_utils, path_constants

from tfopt.errors import TfoptError, printable
from tfopt.report import Report
from tfopt.serving.client_stub import DESCRIPTION

_MODEL = "saved_model.pb"
_OLD_SERVING = "serving_model_dir"  # before TFX 0.29
_LIMIT = 60_000  # characters of a property: MLMD may run on MySQL, whose TEXT holds 64 KiB
_INVALID_ARGUMENT = 3  # google.rpc.Code; any code but 0 fails the execution

Value = str | int | float


def fields(kind: type, given: str | Mapping[str, Any], what: str, refused: Mapping[str, str]) -> dict[str, Any]:
    """Reads fields of a dataclass that came as a parameter of a component.

    Args:
      kind: the dataclass.
      given: a mapping, or its JSON.
      what: the name of the parameter, for errors.
      refused: fields that are not set by this parameter -> what to use instead.

    Returns:
      Field -> value, lists as tuples.

    Raises:
      TfoptError: a field that there is not, or is refused, or with a value of another type.
    """
    if isinstance(given, str):
        try:
            given = json.loads(given or "{}")
        except ValueError as error:
            raise TfoptError(f"{what}: not JSON: {error}") from error
    if not isinstance(given, Mapping):
        raise TfoptError(f"{what}: wants an object, received {given!r}")
    kinds = {name: hint for name, hint in typing.get_type_hints(kind).items() if name not in refused}
    found = {}
    for name, value in given.items():
        if name in refused:
            raise TfoptError(f"{what}: {name!r} is not set here; use {refused[name]}")
        if name not in kinds:
            raise TfoptError(f"{what}: there is no {name!r}; choose from {', '.join(kinds)}")
        value = tuple(value) if isinstance(value, list) else value
        if not _is(value, kinds[name]):
            wanted = kinds[name].__name__ if isinstance(kinds[name], type) else str(kinds[name])
            raise TfoptError(f"{what}: {name!r} wants {wanted}, received {value!r}")
        found[name] = value
    return found


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: str, int, bool, float, one of several, or a tuple or dict of these."""
    if isinstance(kind, types.UnionType):
        return any(_is(value, each) for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if typing.get_origin(kind) is dict:
        return isinstance(value, Mapping) and all(_is(item, typing.get_args(kind)[1]) for item in value.values())
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


class OptimizationReport(Artifact):
    """report.json and report.html of a run of tfopt, with what matters most as properties.

    Properties; what was not measured is not set, and nothing of a model that was rejected:
      tfopt_version: of the run.
      recipe: its name.
      original_bytes, optimized_bytes: all files of the Serving model, before and after.
      original_gzip_bytes, optimized_gzip_bytes: the same, gzipped.
      original_latency_ms_p50, optimized_latency_ms_p50: median of a request of one row, in milliseconds.
      metric: its name; original_metric, optimized_metric: its values over `samples` rows of the eval split.
      max_abs_error: largest absolute difference of the optimized model's outputs to the original's.
      rejected: "name: reason" of every artifact that was not emitted, joined by "; ".
      warnings: how many the report has.
      kept_original: 1 where the optimized model was rejected, and the original stands in its place.
    """

    TYPE_NAME = "OptimizationReport"
    PROPERTIES: ClassVar = {
        **{name: Property(type=PropertyType.STRING) for name in ("tfopt_version", "recipe", "metric", "rejected")},
        **{
            name: Property(type=PropertyType.INT)
            for name in (
                *("original_bytes", "optimized_bytes", "original_gzip_bytes", "optimized_gzip_bytes"),
                *("samples", "warnings", "kept_original"),
            )
        },
        **{
            name: Property(type=PropertyType.FLOAT)
            for name in (
                *("original_latency_ms_p50", "optimized_latency_ms_p50"),
                *("original_metric", "optimized_metric", "max_abs_error"),
            )
        },
    }


def version() -> str:
    """The version of tfopt; as a parameter of a component it keeps TFX from taking another version's results again."""
    return metadata.version("tfopt")


def properties(report: Report) -> dict[str, Value]:
    """What MLMD is told about a run; the names are those of `OptimizationReport`."""
    found: dict[str, Any] = {
        "tfopt_version": version(),
        "recipe": report.recipe.get("name", ""),
        "rejected": "; ".join(f"{a.name}: {a.rejected}" for a in report.artifacts if a.rejected),
        "warnings": len(report.warnings),
    }
    by_name = {a.name: a for a in report.artifacts}
    for prefix, name in (("original", "original"), ("optimized", "serving")):
        artifact = by_name.get(name)
        if artifact is None or artifact.rejected:
            continue
        found[f"{prefix}_bytes"], found[f"{prefix}_gzip_bytes"] = artifact.bytes, artifact.gzip_bytes
        found[f"{prefix}_latency_ms_p50"] = artifact.latency_ms_p50
        if artifact.accuracy is not None:
            found |= {"metric": artifact.accuracy.name, "samples": artifact.accuracy.samples}
            found[f"{prefix}_metric"] = artifact.accuracy.value
        if name == "serving":
            found["max_abs_error"] = artifact.max_abs_error
    return {name: _plain(value) for name, value in found.items() if value is not None}


def set_custom_properties(artifact: Artifact, values: Mapping[str, Any]) -> None:
    """Sets custom properties by the type of each value; None is left out."""
    setters = {
        int: artifact.set_int_custom_property,
        float: artifact.set_float_custom_property,
        str: artifact.set_string_custom_property,
    }
    for name, value in values.items():
        if value is not None:
            plain = _plain(value)
            setters[type(plain)](name, plain)


def _plain(value: Any) -> Value:
    """A value as MLMD holds it: NumPy's scalars become numbers, and texts are cut."""
    if isinstance(value, str):
        return value[:_LIMIT]
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def custom_properties(artifact: Artifact) -> dict[str, Any]:
    """The custom properties of an artifact, as Python values."""
    values = artifact.mlmd_artifact.custom_properties
    return {name: getattr(value, value.WhichOneof("value")) for name, value in values.items()}


def serving_model(artifact: Artifact) -> str:
    """Returns the SavedModel directory of a Model artifact.

    Where it may lie: `Format-Serving/` as the Trainer writes it, `serving_model_dir/` and
    `serving_model_dir/export/<name>/<time>/` of old TFX, the artifact's directory itself, or the highest version number
    below it, as TensorFlow Serving takes it.

    Raises:
      TfoptError: there is none.
    """
    uri = artifact.uri.rstrip("/")
    tried = [posixpath.join(uri, path_constants.SERVING_MODEL_DIR), posixpath.join(uri, _OLD_SERVING), uri]
    export = posixpath.join(uri, _OLD_SERVING, "export")
    tried += [path for name in folders(export) for path in _versions(posixpath.join(export, name))]
    tried += _versions(tried[0]) + _versions(uri)
    for path in tried:
        if fileio.exists(posixpath.join(path, _MODEL)):
            return path
    holds = ", ".join(folders(uri)) or "no directory"
    raise TfoptError(
        f"{uri}: no {_MODEL} in it, in Format-Serving/, {_OLD_SERVING}/ or a version directory; it holds {holds}"
    )


def tflite_files(uri: str) -> list[str]:
    """The paths of the .tflite files of a Model artifact, by name; none is no error."""
    found = [
        posixpath.join(folder, name)
        for folder, _, names in fileio.walk(uri)
        for name in names
        if name.endswith(".tflite")
    ]
    return sorted(found)


def client_files(folder: str) -> list[str]:
    """What clients need where a recipe changed the inputs of signatures, relative to the model's directory."""
    names = [f"assets.extra/{name}" for name in (DESCRIPTION, "client.py")]
    return [name for name in names if fileio.exists(posixpath.join(folder, name))]


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A local directory for what is made before it goes to its artifact; TMPDIR says where."""
    with tempfile.TemporaryDirectory(prefix="tfopt-") as folder:
        yield folder


def local(path: str, folder: str) -> str:
    """The directory or file itself where it is on this machine, or else its copy below `folder`."""
    if Path(path).exists():
        return path
    copied = posixpath.join(tempfile.mkdtemp(dir=folder), posixpath.basename(path.rstrip("/")))
    if fileio.isdir(path):
        io_utils.copy_dir(path, copied)
    else:
        io_utils.copy_file(path, copied, overwrite=True)
    return copied


def single(artifacts: Mapping[str, Sequence[Artifact]], name: str) -> Artifact | None:
    """The one artifact of an input or output; None where the channel was not given."""
    given = artifacts.get(name)
    if not given:
        return None
    if len(given) > 1:
        raise TfoptError(f"{name}: wants one artifact, received {len(given)}; choose one by a Resolver")
    return artifact_utils.get_single_instance(list(given))


class Reporting:
    """What the executors here have in common, to be inherited before one of TFX's: `_run` does the work.

    The launcher of TFX writes a failed result with its message into MLMD, which it does not do with an exception. Other
    orchestrators ignore results, so that there only an exception fails the component.
    """

    def Do(  # noqa: N802 (TFX's name)
        self,
        input_dict: dict[str, list[Artifact]],
        output_dict: dict[str, list[Artifact]],
        exec_properties: dict[str, Any],
    ) -> ExecutorOutput | None:
        """See `tfx.dsl.components.base.base_executor.BaseExecutor.Do`; a TfoptError reaches the pipeline's owner."""
        executor: Any = self
        executor._log_startup(input_dict, output_dict, exec_properties)
        try:
            executor._run(input_dict, output_dict, exec_properties)
        except TfoptError as error:
            line = printable(" ".join(str(error).split()))
            context = executor._context
            if context is None or context.pipeline_node is None:
                raise TfoptError(line) from error
            logging.error("%s", line)
            return ExecutorOutput(execution_result=ExecutionResult(code=_INVALID_ARGUMENT, result_message=line))
        return None


def folders(path: str) -> list[str]:
    """The names of the directories of a directory; none where it is none."""
    if not fileio.isdir(path):
        return []
    names = (name.rstrip("/") for name in fileio.listdir(path))
    return sorted(name for name in names if fileio.isdir(posixpath.join(path, name)))


def _versions(path: str) -> list[str]:
    """The version directories below a directory, the latest first."""
    numbers = [name for name in folders(path) if name.isdigit()]
    return [posixpath.join(path, name) for name in sorted(numbers, key=int, reverse=True)]
