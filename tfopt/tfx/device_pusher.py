"""DevicePusher: .tflite files of a blessed model to a directory or bucket, with a manifest, one directory a version.

    DevicePusher(
        tflite_model=optimizer.outputs["tflite_model"],
        blessing=validator.outputs["tflite_blessing"],
        push_destination="/models/device",
    )

gives `/models/device/<version>/int8.tflite` and `manifest.json` beside it (see `tfopt.tfx.manifest`).
"""

from __future__ import annotations

import json
import posixpath
import time
import uuid
from pathlib import Path
from typing import Any, ClassVar

from tfx import types
from tfx.components.util import model_utils
from tfx.dsl.components.base.base_component import BaseComponent
from tfx.dsl.components.base.base_executor import BaseExecutor
from tfx.dsl.components.base.executor_spec import ExecutorClassSpec
from tfx.dsl.io import fileio
from tfx.types import standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter
from tfx.types.system_executions import Deploy
from tfx.utils import io_utils

from tfopt.errors import TfoptError, one_line
from tfopt.tfx import artifacts
from tfopt.tfx.manifest import NAME, manifest


class DevicePusherExecutor(artifacts.Reporting, BaseExecutor):
    """Pushes all files or none, and never over a version that is there."""

    def _run(
        self,
        inputs: dict[str, list[types.Artifact]],
        outputs: dict[str, list[types.Artifact]],
        parameters: dict[str, Any],
    ) -> None:
        model, blessing = artifacts.single(inputs, "tflite_model"), artifacts.single(inputs, "blessing")
        assert model is not None  # TFX checks inputs that are not optional
        (pushed,) = outputs["pushed_model"]
        files = artifacts.tflite_files(model.uri)
        reason = _reason_against(model, blessing, files)
        if reason:
            artifacts.set_custom_properties(pushed, {"pushed": 0, "reason": reason})
            return
        base = parameters["push_destination"].rstrip("/")
        if not base:
            raise TfoptError("DevicePusher: push_destination is empty; name a directory")
        source = {"artifact_id": model.id, "uri": model.uri, "blessing_id": blessing.id if blessing else None}
        with artifacts.scratch() as folder:
            root = artifacts.local(model.uri, folder)
            local = [Path(root) / posixpath.relpath(file, model.uri) for file in files]
            extra = [Path(root) / name for name in artifacts.client_files(root)]
            version = _version(base, int(parameters.get("version") or 0))
            described = manifest(local, version, artifacts.custom_properties(model), source)
            if extra:
                described["client"] = [f"assets.extra/{file.name}" for file in extra]
            _copy(local, extra, described, pushed.uri)  # first: where it fails, nothing was pushed
            final = _push(local, extra, described, base, version)
        names = ",".join(file.name for file in local)
        artifacts.set_custom_properties(
            pushed, {"pushed": 1, "pushed_destination": final, "pushed_version": version, "files": names}
        )


def _reason_against(model: types.Artifact, blessing: types.Artifact | None, files: list[str]) -> str | None:
    """Why nothing is pushed, or None."""
    if blessing is not None:
        of = blessing.get_string_custom_property("current_model")
        if of and of != model.uri:
            raise TfoptError(
                f"DevicePusher: the blessing is of {of}, and the files are {model.uri}: give it the output "
                "tflite_blessing of OptimizationValidator"
            )
        if not model_utils.is_model_blessed(blessing):
            said = blessing.get_string_custom_property("reasons") or "its blessing does not say why"
            return f"the model is not blessed: {said}"
    if not files:
        said = artifacts.custom_properties(model).get("rejected")
        return f"{model.uri} holds no .tflite file{f': {said}' if said else ''}"
    return None


def _version(base: str, wanted: int) -> str:
    """The version of a push: the one that is wanted, or else the time in seconds, which a later push never repeats."""
    if wanted < 0:
        raise TfoptError(f"DevicePusher: version must be a positive number, or 0 for the time; received {wanted}")
    if wanted:
        if fileio.exists(posixpath.join(base, str(wanted))):
            raise TfoptError(f"push_destination={base}: holds version {wanted} already; leave it out, or raise it")
        return str(wanted)
    version = int(time.time())
    while fileio.exists(posixpath.join(base, str(version))):
        version += 1
    return str(version)


def _push(files: list[Path], extra: list[Path], described: dict[str, Any], base: str, version: str) -> str:
    """Copies the files to `<base>/<version>`.

    A directory appears there by one rename, complete. Object stores have no such rename: there the manifest is written
    last, and a version without one is not complete.
    """
    final = posixpath.join(base, version)
    remote = "://" in base
    place = final if remote else posixpath.join(base, f".{version}.{uuid.uuid4().hex[:8]}")
    try:
        _copy(files, extra, described, place)
        if not remote:
            Path(place).rename(final)
    except BaseException as error:
        if fileio.exists(place):
            fileio.rmtree(place)
        if isinstance(error, Exception):  # of any filesystem
            raise TfoptError(f"push_destination={base}: cannot be written: {one_line(error)}") from error
        raise
    return final


def _copy(files: list[Path], extra: list[Path], described: dict[str, Any], place: str) -> None:
    for file in files:
        io_utils.copy_file(str(file), posixpath.join(place, file.name), overwrite=True)
    for file in extra:
        io_utils.copy_file(str(file), posixpath.join(place, "assets.extra", file.name), overwrite=True)
    io_utils.write_string_file(posixpath.join(place, NAME), json.dumps(described, indent=2) + "\n")


class DevicePusherSpec(ComponentSpec):
    """The interface of DevicePusher."""

    PARAMETERS: ClassVar = {
        "push_destination": ExecutionParameter(type=str),
        "version": ExecutionParameter(type=int),
    }
    INPUTS: ClassVar = {
        "tflite_model": ChannelParameter(type=standard_artifacts.Model),
        "blessing": ChannelParameter(type=standard_artifacts.ModelBlessing, optional=True),
    }
    OUTPUTS: ClassVar = {"pushed_model": ChannelParameter(type=standard_artifacts.PushedModel)}
    TYPE_ANNOTATION = Deploy


class DevicePusher(BaseComponent):
    """Pushes TFLite files with what a device must know about them."""

    SPEC_CLASS = DevicePusherSpec
    EXECUTOR_SPEC = ExecutorClassSpec(DevicePusherExecutor)

    def __init__(
        self,
        tflite_model: types.BaseChannel,
        blessing: types.BaseChannel | None = None,
        push_destination: Any = "",
        version: Any = 0,
    ):
        """Makes the component.

        Args:
          tflite_model: Model with .tflite files; the output of that name of Optimizer.
          blessing: ModelBlessing of these files; the output tflite_blessing of OptimizationValidator. Without it they
            are pushed unseen.
          push_destination: a directory, or whatever `tfx.dsl.io.fileio` writes to, such as gs://bucket/device; or a
            RuntimeParameter or placeholder.
          version: of the push; 0 takes the time in seconds, as the stock Pusher does.

        Raises:
          TfoptError: no destination.
        """
        if not push_destination:
            raise TfoptError("DevicePusher: push_destination is missing: name a directory or bucket")
        super().__init__(
            spec=DevicePusherSpec(
                tflite_model=tflite_model,
                blessing=blessing,
                push_destination=push_destination,
                version=version,
                pushed_model=types.Channel(type=standard_artifacts.PushedModel),
            )
        )
