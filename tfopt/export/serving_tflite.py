"""A .tflite file beside saved_model.pb, for a TensorFlow Serving that runs with --prefer_tflite_model.

That server reads `model.tflite` of the version directory, and of it only what belongs to the first subgraph. Names of
inputs and outputs come from metadata called "signature_defs_metadata", a FlexBuffer map from the key of a signature to
a serialized SignatureDef; without them the names of tensors are taken, cut at the first colon. The SignatureDef is read
as a C string, up to the first zero byte: an empty message inside, such as the shape of a scalar, would cut it off.

Source: tensorflow_serving/servables/tensorflow/tflite_session.cc, tensorflow/lite/tools/signature/.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef, TensorInfo

from tfopt.errors import TfoptError
from tfopt.export.tflite_file import OP_NAMES, builtin
from tfopt.export.tflite_names import pack

FILE = "model.tflite"
_METADATA = b"signature_defs_metadata"
_MAIN = "serving_default"
_STATE = ("VAR_HANDLE", "ASSIGN_VARIABLE")
_DTYPES = {
    getattr(schema.TensorType, name): getattr(tf, name.lower()).as_datatype_enum
    for name in ("FLOAT32", "FLOAT64", "INT8", "UINT8", "INT16", "INT32", "INT64", "BOOL", "STRING", "COMPLEX64")
}


def add(version_dir: str | Path, tflite_path: str | Path, signatures: Mapping[str, SignatureDef]) -> list[str]:
    """Writes `<version_dir>/model.tflite`, which TensorFlow Serving can serve instead of saved_model.pb.

    Args:
      version_dir: the directory of the serving model.
      tflite_path: a file whose signatures were converted from that model; best one with an open batch.
      signatures: those of the serving model, by name.

    Returns:
      What a server with --prefer_tflite_model cannot do with it, each in one line.

    Raises:
      TfoptError: the file cannot be read, has none of the signatures, keeps state, or has ops that TensorFlow Serving
        lacks.
    """
    path = Path(tflite_path)
    try:
        model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    except Exception as error:  # whatever the reader of a damaged flatbuffer stumbles over
        raise TfoptError(f"{path}: cannot be read as a TFLite model: {error}") from error
    _check_ops(path, model)
    present = {entry.signatureKey.decode(): entry for entry in model.signatureDefs or []}
    known = [name for name in signatures if name in present]
    if not known:
        raise TfoptError(
            f"{path}: has none of the signatures {', '.join(map(repr, signatures))}, so it cannot stand in for them; "
            f"it has {', '.join(map(repr, present)) or 'no signatures'}"
        )
    main = _MAIN if _MAIN in known else known[0]
    _bring_first(model, present[main].subgraphIndex)
    visible = [name for name in known if _same_ends(present[name], present[main])]
    _name_ends(model.subgraphs[0], present[main])
    _write_metadata(model, {name: _definition(signatures[name], present[main], model.subgraphs[0]) for name in visible})
    content = pack(model, path.stat().st_size)
    (Path(version_dir) / FILE).write_bytes(content)
    return _notes(model.subgraphs[0], present[main], main, visible, signatures)


def _notes(
    subgraph: Any, entry: Any, main: str, visible: list[str], signatures: Mapping[str, SignatureDef]
) -> list[str]:
    """What a server that prefers this file does otherwise than one that reads saved_model.pb."""
    notes = []
    hidden = [name for name in signatures if name not in visible]
    if hidden:
        notes.append(
            f"--prefer_tflite_model serves signature {main!r} alone; {', '.join(map(repr, hidden))} "
            f"{'is' if len(hidden) == 1 else 'are'} answered only without that flag"
        )
    tensors = {end.name.decode(): subgraph.tensors[end.tensorIndex] for end in [*entry.inputs, *entry.outputs]}
    fixed = []
    for end in entry.inputs:
        name, tensor = end.name.decode(), tensors[end.name.decode()]
        signature = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
        wanted = signatures[main].inputs[name].tensor_shape.dim if name in signatures[main].inputs else []
        if signature is not None and len(signature) and signature[0] >= 0 and (not wanted or wanted[0].size < 0):
            fixed.append(f"{name!r} ({int(signature[0])})")
    if fixed:
        notes.append(
            f"the batch of input {', '.join(fixed)} is fixed in the TFLite file: --prefer_tflite_model answers "
            "requests of that size only, and cannot batch; --keep_batch leaves it open"
        )
    else:
        notes.append(
            "--prefer_tflite_model allocates tensors anew whenever the size of a request changes: "
            "keep to few batch sizes"
        )
    for name, tensor in tensors.items():
        known = {**signatures[main].inputs, **signatures[main].outputs}.get(name)
        dtype = _DTYPES.get(tensor.type)
        if known is not None and dtype is not None and dtype != known.dtype:
            notes.append(
                f"{name!r} is {tf.as_dtype(dtype).name} in the TFLite file and {tf.as_dtype(known.dtype).name} in the "
                "SavedModel: clients of --prefer_tflite_model must quantize it themselves (--io_type=float32)"
            )
    return notes


def _check_ops(path: Path, model: Any) -> None:
    for code in model.operatorCodes:
        custom = (code.customCode or b"").decode()
        name = custom or OP_NAMES.get(builtin(code), "?")
        if custom and custom != "ParseExample":
            raise TfoptError(
                f"{path}: op {custom} is not one of TFLite's own, and --prefer_tflite_model runs no others; "
                "convert without --allow_select_tf_ops, or leave out --serving_tflite"
            )
        if name in _STATE:
            raise TfoptError(
                f"{path}: keeps state ({name}), and TensorFlow Serving runs several copies of a TFLite model, each "
                "with state of its own; leave out --serving_tflite"
            )


def _bring_first(model: Any, index: int) -> None:
    """Swaps a subgraph with the first one; control flow and signatures that name either follow."""
    if not index:
        return
    swapped = {0: index, index: 0}
    model.subgraphs[0], model.subgraphs[index] = model.subgraphs[index], model.subgraphs[0]
    for entry in model.signatureDefs:
        entry.subgraphIndex = swapped.get(entry.subgraphIndex, entry.subgraphIndex)
    for subgraph in model.subgraphs:
        for operator in subgraph.operators or []:
            for options in (operator.builtinOptions, getattr(operator, "builtinOptions2", None)):
                for name, value in vars(options).items() if options is not None else ():
                    if name.lower().endswith("subgraphindex") or (
                        name == "subgraph" and type(options).__name__ == "CallOptionsT"
                    ):
                        setattr(options, name, swapped.get(value, value))


def _same_ends(one: Any, other: Any) -> bool:
    """Whether two signatures are one computation under two names."""

    def ends(entry: Any) -> tuple:
        return (
            entry.subgraphIndex,
            *(sorted((e.name, e.tensorIndex) for e in side) for side in (entry.inputs, entry.outputs)),
        )

    return ends(one) == ends(other)


def _name_ends(subgraph: Any, entry: Any) -> None:
    """Gives tensors the names of the signature, since a server may fall back on them, without colons."""
    used: set[str] = set()
    for side, prefix in ((entry.inputs, "input"), (entry.outputs, "output")):
        for end in side:
            tensor = subgraph.tensors[end.tensorIndex]
            name = end.name.decode().replace(":", "_")
            if any(end.tensorIndex == other.tensorIndex for other in entry.inputs) and side is entry.outputs:
                continue  # handed through: it has the name of the input
            while name in used:
                name = f"{prefix}_{name}"
            used.add(name)
            tensor.name = name.encode()
    for index, tensor in enumerate(subgraph.tensors):
        ends = {end.tensorIndex for side in (entry.inputs, entry.outputs) for end in side}
        if index not in ends and (tensor.name or b"").decode() in used:
            tensor.name = f"inner_{index}".encode()


def _definition(signature: SignatureDef, entry: Any, subgraph: Any) -> SignatureDef:
    """The SignatureDef in terms of the TFLite tensors."""
    found = SignatureDef(method_name=signature.method_name)
    for side, wanted, target in (
        (entry.inputs, signature.inputs, found.inputs),
        (entry.outputs, signature.outputs, found.outputs),
    ):
        for end in side:
            tensor, name = subgraph.tensors[end.tensorIndex], end.name.decode()
            dtype = wanted[name].dtype if name in wanted else 0
            info = TensorInfo(name=tensor.name.decode(), dtype=_DTYPES.get(tensor.type, dtype))
            shape = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
            sizes = [] if shape is None else [int(size) for size in shape]
            if sizes and all(sizes):  # see above: no zero byte may come out
                for size in sizes:
                    info.tensor_shape.dim.add(size=size)
            target[name].CopyFrom(info)
    return found


class _Encoded:
    """Bytes where the builder encodes text."""

    def __init__(self, content: bytes):
        self._content = content

    def encode(self, _: str) -> bytes:
        """The bytes as they are."""
        return self._content


def _write_metadata(model: Any, definitions: Mapping[str, SignatureDef]) -> None:
    builder = flexbuffers.Builder()
    with builder.Map():
        for key, definition in sorted(definitions.items()):
            text = definition.SerializeToString(deterministic=True)
            if b"\0" in text:
                raise TfoptError(f"signature {key!r}: TensorFlow Serving cannot read names with zero bytes")
            builder.String(key, _Encoded(text))
    buffer = schema.BufferT()
    buffer.data = list(builder.Finish())
    model.metadata = [entry for entry in model.metadata or [] if entry.name != _METADATA]
    entry = schema.MetadataT()
    entry.name, entry.buffer = _METADATA, len(model.buffers)
    model.buffers.append(buffer)
    model.metadata.append(entry)
