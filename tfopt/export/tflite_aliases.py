"""Signatures that are one computation under several names, as a Keras export has `serve` and `serving_default`.

The converter would write the computation once for each. It is converted once, and the other names are added to the
finished file, as further signatures of the same subgraph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfopt.export.tflite_names import pack, unpack


def find(saved_model: str | Path) -> dict[str, str]:
    """Finds the signatures of a SavedModel that have the same tensors, under the same names, as another.

    Returns:
        Alias -> the signature to convert; `serving_default` is never the alias.
    """
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    content = SavedModel.FromString((Path(saved_model) / "saved_model.pb").read_bytes())
    signatures = content.meta_graphs[0].signature_def
    kept: dict[Any, str] = {}
    aliases = {}
    for key in sorted(signatures, key=lambda name: (name != "serving_default", name)):
        ends = (signatures[key].inputs, signatures[key].outputs)
        same = tuple(
            tuple(sorted((n, info.SerializeToString(deterministic=True)) for n, info in e.items())) for e in ends
        )
        first = kept.setdefault(same, key)
        if first != key:
            aliases[key] = first
    return aliases


def add(path: str | Path, aliases: Mapping[str, str]) -> None:
    """Adds names to the signatures of a .tflite file, in place; those whose original the file lacks are left out."""
    from ai_edge_litert import schema_py_generated as schema

    model = unpack(Path(path).read_bytes())
    present = {definition.signatureKey.decode(): definition for definition in model.signatureDefs or []}
    for alias, original in sorted(aliases.items()):
        if original in present and alias not in present:
            known = present[original]
            copy = schema.SignatureDefT()
            copy.signatureKey, copy.subgraphIndex = alias.encode(), known.subgraphIndex
            copy.inputs, copy.outputs = known.inputs, known.outputs
            model.signatureDefs.append(copy)
    Path(path).write_bytes(pack(model))
