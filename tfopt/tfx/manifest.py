"""manifest.json: what a device must know of .tflite files before it loads one of them.

Read from the flatbuffers, without running anything. A quantized input or output is given as q, and means
scale * (q - zero_point).
"""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ai_edge_litert import schema_py_generated as schema

from tfopt.errors import TfoptError

NAME = "manifest.json"
SCHEMA_VERSION = 1

_TYPES = {value: name.lower() for name, value in vars(schema.TensorType).items() if not name.startswith("_")}


def manifest(files: list[Path], version: str, facts: Mapping[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Describes the files of one push.

    Args:
      files: .tflite files on this machine.
      version: of the push.
      facts: custom properties of the artifact that holds them, as Optimizer writes them.
      source: which artifact that is, and which blessing it has.

    Returns:
      What goes to JSON: schema_version, version, created (ISO 8601), tfopt_version and recipe of the run that made the
      files, source, and files: name, bytes, sha256, minimum_runtime_version (of TensorFlow Lite, as the converter wrote
      it), metric {name, value, samples} where it was measured, and signatures: inputs and outputs by name, each with
      dtype, shape (null where open) and, where quantized, scale and zero_point.

    Raises:
      TfoptError: a file that is no .tflite file.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "version": version,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "tfopt_version": facts.get("tfopt_version"),
        "recipe": facts.get("recipe"),
        "source": dict(source),
        "files": [_file(path, facts) for path in files],
    }


def _file(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    data = path.read_bytes()
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        signatures = _signatures(model)
        runtime = _minimum_runtime(model)
    except Exception as error:  # the reader raises anything on a damaged file
        raise TfoptError(f"{path}: not a .tflite file: {error}") from error
    value = facts.get(f"{path.stem}_metric")
    metric = None if value is None else {"name": facts["metric"], "value": value, "samples": facts["samples"]}
    return {
        "name": path.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "minimum_runtime_version": runtime,
        "metric": metric,
        "signatures": signatures,
    }


def _signatures(model: Any) -> dict[str, Any]:
    found = {}
    for each in model.signatureDefs or []:
        tensors = model.subgraphs[each.subgraphIndex].tensors
        ends = {
            end: {item.name.decode(): _tensor(tensors[item.tensorIndex]) for item in items or []}
            for end, items in (("inputs", each.inputs), ("outputs", each.outputs))
        }
        found[each.signatureKey.decode()] = ends
    return found


def _tensor(tensor: Any) -> dict[str, Any]:
    shape = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
    described: dict[str, Any] = {
        "dtype": _TYPES[tensor.type],
        "shape": [None if size < 0 else int(size) for size in (() if shape is None else shape)],
    }
    scales = None if tensor.quantization is None else tensor.quantization.scale
    if scales is not None and len(scales):
        described |= {"scale": float(scales[0]), "zero_point": int(tensor.quantization.zeroPoint[0])}
    return described


def _minimum_runtime(model: Any) -> str | None:
    for each in model.metadata or []:
        if each.name == b"min_runtime_version":
            return bytes(model.buffers[each.buffer].data).rstrip(b"\0").decode() or None
    return None
