"""Rules for --prefer_tflite_model: what the server sees of `model.tflite` (see tfopt/export/serving_tflite.py)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from tfopt.export.tflite_file import OP_NAMES, builtin
from tfopt.opportunities import select_ops
from tfopt.serving.lint.subject import ERROR, INFO, WARNING, Finding, Subject

FILE = "model.tflite"
_STATE = ("VAR_HANDLE", "ASSIGN_VARIABLE")
_PUT = "write it with tfopt-optimize --serving_tflite"


def tflite_model(subject: Subject) -> Iterator[Finding]:
    """The server can run the file, and finds its inputs and outputs."""
    if not subject.flags.prefer_tflite_model:
        return
    path = subject.directory / FILE
    if not path.is_file():
        ops = select_ops(subject.model) if subject.model else []
        no = f"; {', '.join(ops[:3])} would need Select TF ops, which the server lacks" if ops else ""
        yield Finding(
            "tflite-missing", WARNING, FILE, f"is not there, so that saved_model.pb is served{no}",
            "leave --prefer_tflite_model out" if ops else _PUT,
        )  # fmt: skip
        return
    try:
        model: Any = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
        codes = [((c.customCode or b"").decode(), OP_NAMES.get(builtin(c), "?")) for c in model.operatorCodes]
        graph = model.subgraphs[0]
    except Exception as error:  # whatever the reader of a damaged flatbuffer stumbles over
        yield Finding("tflite-unreadable", ERROR, FILE, f"cannot be read: {error}", _PUT)
        return
    for custom, name in codes:
        if custom and custom != "ParseExample":
            kind = "a Select TF op" if custom.startswith("Flex") else "a custom op"
            yield Finding(
                "tflite-op", ERROR, f"{FILE}: {custom}", f"is {kind}, and the server runs TFLite's own ops alone",
                "convert without --allow_select_tf_ops and without custom ops, or leave --prefer_tflite_model out",
            )  # fmt: skip
        elif name in _STATE:
            yield Finding(
                "tflite-state", ERROR, f"{FILE}: {name}",
                "keeps state, and the server runs several copies, each with its own", "leave --prefer_tflite_model out",
            )  # fmt: skip
    yield from _signatures(subject, model)
    if subject.batches:
        for index in graph.inputs:
            tensor = graph.tensors[index]
            shape = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
            if shape is not None and len(shape) and shape[0] >= 0:
                yield Finding(
                    "tflite-fixed-batch", ERROR, f"{FILE}: {(tensor.name or b'').decode()}",
                    f"its batch is fixed to {int(shape[0])}: batches of another size fail",
                    "convert with --keep_batch, or leave --enable_batching off",
                )  # fmt: skip


def _signatures(subject: Subject, model: Any) -> Iterator[Finding]:
    """Names come from old-style metadata; signatures beyond it cannot be called."""
    found = [entry for entry in model.metadata or [] if entry.name == b"signature_defs_metadata"]
    if not found:
        yield Finding(
            "tflite-metadata", ERROR if len(model.subgraphs[0].inputs) > 1 else WARNING, FILE,
            "has no old-style signature metadata: clients must name inputs and outputs by their tensors, cut at the "
            "first colon", _PUT,
        )  # fmt: skip
        return
    try:
        buffer = bytes(model.buffers[found[0].buffer].data)
        seen = [str(key.AsKey) for key in flexbuffers.GetRoot(buffer).AsMap.Keys]
    except Exception as error:  # likewise
        yield Finding("tflite-metadata", ERROR, FILE, f"its signature metadata cannot be read: {error}", _PUT)
        return
    hidden = [name for name in subject.signatures if name not in seen]
    if hidden:
        yield Finding(
            "tflite-signatures", WARNING, FILE,
            f"answers {', '.join(map(repr, seen))} alone: requests to {', '.join(map(repr, hidden))} fail",
            "leave --prefer_tflite_model out where clients call them",
        )  # fmt: skip
    yield Finding(
        "tflite-allocates", INFO, FILE, "the server allocates all tensors anew when the size of a request changes",
        "keep to few batch sizes",
    )  # fmt: skip


RULES = (tflite_model,)
