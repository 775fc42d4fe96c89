"""Writes the artifacts: the serving model, the TFLite files, and the TFLite file that TensorFlow Serving prefers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from tfopt.errors import TfoptError, one_line
from tfopt.export import saved_model, serving_tflite, tflite
from tfopt.export.fake_quant_form import for_converter
from tfopt.export.fixed_batch import fix_batch
from tfopt.fake_quant import is_quantized, strip
from tfopt.model import Model
from tfopt.publish import Workspace
from tfopt.report import Artifact
from tfopt.run_data import representative_rows
from tfopt.serving import client_stub, deployment, deployment_text

if TYPE_CHECKING:
    from tfopt.optimize import Options

SERVING_TFLITE = "serving_tflite"
_EXTRA = "assets.extra"
_PREFERRED = ("int8", "mixed", "dynamic_int8")  # where none was asked for by name


def targets(options: Options) -> list[str]:
    """What a run writes below its output directory."""
    beside = deployment.FILES if options.deployment else ()
    return [f"serving/{options.version}", *(f"serving/{f}" for f in beside), "device", "report.json", "report.html"]


def files(options: Options) -> tuple[str, ...]:
    """The TFLite files of a run: those that were asked for, or else what the data allow."""
    if options.tflite is not None:
        return options.tflite
    return ("float32", "dynamic_int8", *(["int8"] if options.representative_data else []))


def emit(
    model: Model, for_devices: Model, trained: bool, workspace: Workspace, options: Options, original: Model
) -> list[Artifact]:
    """Writes the serving model, and the TFLite files of what may hold fake-quant ops, into the workspace."""
    serving = workspace.path(f"serving/{options.version}")
    limit = options.max_constant_bytes
    saved_model.save(model, serving, max_constant_bytes=saved_model.MAX_CONSTANT_BYTES if limit is None else limit)
    if model.requests:
        client_stub.write(model, serving)
        shutil.copytree(serving / _EXTRA, workspace.scratch / _EXTRA)
    artifacts = [Artifact("serving", "saved_model", str(serving))]
    names = files(options)
    if not names:
        return artifacts
    frozen, ranges = workspace.scratch / "device_model", workspace.scratch / "quantized_model"
    try:
        device = strip(for_devices, snap=True) if trained else model.copy()
        for name in device.stands_for.values():  # parsing nodes do not convert
            device.signatures.pop(name, None)
        device = device if options.keep_batch else fix_batch(device, 1)
        if is_quantized(for_devices):
            quantized = for_devices.copy() if options.keep_batch else fix_batch(for_devices, 1)
            for_converter(quantized)
            saved_model.save(quantized, ranges, max_constant_bytes=1 << 31)
    except (ValueError, RuntimeError) as error:
        reason = f"the batch cannot be fixed to 1 ({one_line(error)}); --keep_batch leaves it open"
        return [*artifacts, *(Artifact(name, "tflite", rejected=f"{name}: {reason}") for name in names)]
    saved_model.save(device, frozen, max_constant_bytes=1 << 31)
    representative = (
        representative_rows(original, model, options.representative_data, options)
        if options.representative_data
        else None
    )
    converted = tflite.convert(
        frozen,
        names,
        workspace.path("device"),
        representative=representative,
        io_type=options.io_type,
        runtime=options.runtime,
        all_integer=options.all_integer,
        fake_quantized=ranges if is_quantized(for_devices) else None,
        trained=trained,
        allow_select_tf_ops=options.allow_select_tf_ops,
    )
    for result in converted:
        artifact = Artifact(result.name, "tflite", str(result.path or ""), notes=list(result.notes))
        artifact.rejected = result.error
        artifacts.append(artifact)
    return artifacts


def warmup_data(original: Model, served: Model, workspace: Workspace, options: Options) -> str | None:
    """The rows of --representative_data in the form that the serving model takes; None where they have none.

    Args:
      original: whose rows the source holds.
      served: whose inputs clients may have to make first.
      workspace: where a changed form is written.
      options: of the run.
    """
    source = options.representative_data
    if not options.deployment or not source or not served.requests:
        return source
    rows = representative_rows(original, served, source, options)
    if not rows or any(step["step"] == "once" for steps in served.requests.values() for step in steps):
        return None
    arrays: dict[str, Any] = {key: array for found in rows.values() for key, array in found.inputs.items()}
    path = workspace.scratch / "warmup.npz"
    np.savez(path, **{k: a.astype("S") if a.dtype == object else a for k, a in arrays.items()})
    return str(path)


def add_client(artifacts: list[Artifact], workspace: Workspace) -> None:
    """Puts what clients need beside the TFLite files too, where the recipe changed the inputs of signatures."""
    client = workspace.scratch / _EXTRA
    if client.is_dir() and any(a.kind == "tflite" and a.path and not a.rejected for a in artifacts):
        shutil.copytree(client, workspace.path("device") / _EXTRA)


def add_deployment(artifacts: list[Artifact], data: str | None, options: Options) -> None:
    """Writes what TensorFlow Serving needs beside the serving model, where --deployment asks for it."""
    (serving,) = (a for a in artifacts if a.name == "serving")
    if not options.deployment or serving.rejected:
        return
    chosen = deployment_text.Options(data=data, cpus=options.threads, seed=options.seed)
    written = deployment.files(Path(serving.path).parent, options.deployment, options.version, chosen)
    notes = [note.strip().replace(str(data), str(options.representative_data)) for note in written.notes]
    serving.notes += [*notes, f"served by: {written.command}"]


def add_serving_tflite(
    artifacts: list[Artifact], signatures: Mapping[str, SignatureDef], options: Options
) -> list[Artifact]:
    """Puts a quantized TFLite file beside the serving model, for --prefer_tflite_model.

    Args:
      artifacts: all that were assessed; the serving model gets notes.
      signatures: of the serving model.
      options: what the run was asked for; the first fitting file of `tflite` is taken.

    Returns:
      A rejected artifact with the reason where it cannot be done, else nothing: the file itself was assessed already.
    """
    files = {a.name: a for a in artifacts if a.kind == "tflite" and not a.rejected and a.path}
    (serving,) = (a for a in artifacts if a.name == "serving")
    wanted = [name for name in options.tflite or _PREFERRED if name not in ("float32", "float16")]
    reasons = [f"no quantized file was made of {', '.join(wanted) or 'those asked for'}"]
    if serving.rejected:
        wanted, reasons = [], ["the serving model was rejected"]
    for name in wanted:
        if name not in files:
            continue
        try:
            notes = serving_tflite.add(serving.path, files[name].path, signatures)
        except TfoptError as error:
            reasons.append(str(error).replace(f"{files[name].path}: ", f"{name}: "))
            continue
        serving.notes.append(f"{serving_tflite.FILE} beside it is {name}, for --prefer_tflite_model")
        serving.notes += notes
        return []
    reason = "; ".join(reasons[1:] or reasons)
    return [Artifact(SERVING_TFLITE, "tflite", rejected=f"--serving_tflite: {reason}")]
