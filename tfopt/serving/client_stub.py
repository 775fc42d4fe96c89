"""What goes beside a model whose inputs clients must make first: a description of its signatures, and a client."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import TensorInfo

from tfopt.model import Model

DESCRIPTION = "signatures.json"
_HERE = Path(__file__).parent


def describe(model: Model) -> dict[str, Any]:
    """The signatures that clients prepare requests for, as JSON.

    Returns:
      Signature -> {"stands_for": of the original, "inputs" and "outputs": name -> {"dtype", "shape"}, "steps": see
      `tfopt.serving.encode`}.
    """
    return {
        name: {
            "stands_for": model.stands_for.get(name, name),
            "inputs": {key: _tensor(info) for key, info in sorted(model.signatures[name].inputs.items())},
            "outputs": {key: _tensor(info) for key, info in sorted(model.signatures[name].outputs.items())},
            "steps": steps,
        }
        for name, steps in model.requests.items()
    }


def write(model: Model, directory: Path) -> None:
    """Writes `assets.extra/signatures.json` and `assets.extra/client.py` into a SavedModel."""
    extra = directory / "assets.extra"
    extra.mkdir(exist_ok=True)
    (extra / DESCRIPTION).write_text(json.dumps(describe(model), indent=1) + "\n")
    template = jinja2.Template((_HERE / "client_stub.j2").read_text(), keep_trailing_newline=True)
    encode = (_HERE / "encode.py").read_text().partition("import numpy as np\n")[2]
    (extra / "client.py").write_text(template.render(encode=encode.strip()))


def described(model: str | Path) -> dict[str, Any]:
    """What `describe` said of a model that tfopt wrote; of a .tflite file, what lies beside it; empty for others."""
    folder = Path(model).parent if Path(model).is_file() else Path(model)
    file = folder / "assets.extra" / DESCRIPTION
    return json.loads(file.read_text()) if file.is_file() else {}


def _tensor(info: TensorInfo) -> dict[str, Any]:
    shape = None if info.tensor_shape.unknown_rank else [None if d.size < 0 else d.size for d in info.tensor_shape.dim]
    return {"dtype": tf.as_dtype(info.dtype).name, "shape": shape}
