"""A frozen GraphDef (.pb) -> a v1-style SavedModel with one signature, ``serving_default``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

import tensorflow as tf
from google.protobuf import message
from tensorflow.core.framework import graph_pb2, node_def_pb2
from tensorflow.core.protobuf import saved_model_pb2

from tfopt.errors import TfoptError

_STATE_OPS = {"Variable", "VariableV2", "VarHandleOp", "HashTable", "HashTableV2", "MutableHashTableV2"}
_PLACEHOLDERS = {"Placeholder", "PlaceholderV2", "PlaceholderWithDefault"}


def export(path: Path, destination: Path, inputs: Sequence[str] | None, outputs: Sequence[str] | None) -> None:
    """Write a frozen GraphDef as a SavedModel; shapes and dtypes of its signature are the graph's.

    Args:
        path: a serialized GraphDef without variables.
        destination: directory to write; must not exist.
        inputs: node (``x``) or tensor (``x:0``) names. A node that is no placeholder is made one: the graph is
            cut there.
        outputs: node or tensor names.

    Raises:
        TfoptError: the file is damaged, a name is missing or wrong, or the graph is not frozen.
    """
    graph_def = read(path)
    if not inputs or not outputs:
        raise TfoptError(
            f"{path} is a GraphDef, which names no inputs and outputs: give --inputs and --outputs."
            f" Placeholders: {_some(node.name for node in graph_def.node if node.op in _PLACEHOLDERS)}."
            f" Nodes that nothing reads: {_some(_unread(graph_def))}"
        )
    whole = _import(path, graph_def)
    feeds = [_tensor(path, whole, name, "--inputs") for name in inputs]
    fetches = [_tensor(path, whole, name, "--outputs") for name in outputs]
    for tensor in feeds:
        _make_placeholder(path, graph_def, tensor)
    used = tf.compat.v1.graph_util.extract_sub_graph(graph_def, sorted({tensor.op.name for tensor in fetches}))
    _check(path, used, {tensor.op.name for tensor in feeds})
    graph = _import(path, used)
    with tf.compat.v1.Session(graph=graph) as session:
        builder = tf.compat.v1.saved_model.Builder(str(destination))
        signature = tf.compat.v1.saved_model.predict_signature_def(
            {_key(tensor): graph.get_tensor_by_name(tensor.name) for tensor in feeds},
            {_key(tensor): graph.get_tensor_by_name(tensor.name) for tensor in fetches},
        )
        builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": signature})
        builder.save()


def read(path: Path) -> graph_pb2.GraphDef:
    """Parse a serialized GraphDef.

    Raises:
        TfoptError: the file is empty or damaged, or holds a SavedModel.
    """
    data = path.read_bytes()
    saved_model, graph_def = saved_model_pb2.SavedModel(), graph_pb2.GraphDef()
    if _parses(saved_model, data) and any(meta.graph_def.node for meta in saved_model.meta_graphs):
        raise TfoptError(f"{path} is the graph of a SavedModel: name it saved_model.pb and give its directory")
    if not _parses(graph_def, data) or not graph_def.node or not all(node.op for node in graph_def.node):
        raise TfoptError(f"{path} is damaged or no GraphDef")
    return graph_def


def _parses(proto: message.Message, data: bytes) -> bool:
    """Parse into ``proto``; False where the bytes are not of its kind."""
    try:
        proto.ParseFromString(data)
    except message.DecodeError:
        return False
    return True


def _import(path: Path, graph_def: graph_pb2.GraphDef) -> tf.Graph:
    """The GraphDef as a graph, in which shapes are inferred."""
    graph = tf.Graph()
    try:
        with graph.as_default():
            tf.import_graph_def(graph_def, name="")
    except (ValueError, TypeError, KeyError, tf.errors.OpError) as error:
        raise TfoptError(f"{path} holds a graph that TensorFlow refuses: {' '.join(str(error).split())}") from error
    return graph


def _tensor(path: Path, graph: tf.Graph, name: str, flag: str) -> tf.Tensor:
    """The tensor of a node or tensor name."""
    node, _, port = name.partition(":")
    try:
        operation = graph.get_operation_by_name(node)
    except (KeyError, ValueError):
        near = difflib.get_close_matches(node, [op.name for op in graph.get_operations()], n=3, cutoff=0.4)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise TfoptError(f"{path} has no node for {flag}={name}{hint}") from None
    if not (port or "0").isdecimal() or int(port or 0) >= len(operation.outputs):
        raise TfoptError(
            f"{flag}={name}: node '{node}' ({operation.type}) has {len(operation.outputs)} outputs, counted from 0"
        )
    return operation.outputs[int(port or 0)]


def _make_placeholder(path: Path, graph_def: graph_pb2.GraphDef, tensor: tf.Tensor) -> None:
    """Cut the graph at an input: its node becomes a Placeholder of the same name, dtype and shape."""
    (node,) = (node for node in graph_def.node if node.name == tensor.op.name)
    if node.op in _PLACEHOLDERS:
        return
    if len(tensor.op.outputs) != 1:
        raise TfoptError(f"{path}: --inputs={tensor.name} has sibling outputs, so the graph cannot be cut there")
    placeholder = node_def_pb2.NodeDef(name=node.name, op="Placeholder")
    placeholder.attr["dtype"].type = tensor.dtype.as_datatype_enum
    placeholder.attr["shape"].shape.CopyFrom(tensor.shape.as_proto())
    node.CopyFrom(placeholder)


def _check(path: Path, used: graph_pb2.GraphDef, inputs: set[str]) -> None:
    """Raise where the outputs need more than the inputs: another placeholder, a variable, a table."""
    missing = [node.name for node in used.node if node.op == "Placeholder" and node.name not in inputs]
    if missing:
        raise TfoptError(f"{path}: the outputs need placeholders that --inputs does not name: {_some(missing)}")
    unused = inputs - {node.name for node in used.node}
    if unused:
        raise TfoptError(f"{path}: no output depends on --inputs={_some(sorted(unused))}")
    for node in used.node:
        if node.op in _STATE_OPS:
            raise TfoptError(
                f"{path} is not frozen: node '{node.name}' ({node.op}) needs values that a GraphDef does not hold;"
                " save the model as a SavedModel, or freeze it first"
            )


def _unread(graph_def: graph_pb2.GraphDef) -> list[str]:
    """Names of the nodes that no other node reads."""
    read_names = {name.lstrip("^").split(":")[0] for node in graph_def.node for name in node.input}
    return [node.name for node in graph_def.node if node.name not in read_names and node.op != "NoOp"]


def _key(tensor: tf.Tensor) -> str:
    """The name of a tensor in the signature: that of its node, with the port where it is not the first."""
    return tensor.op.name if tensor.value_index == 0 else f"{tensor.op.name}_{tensor.value_index}"


def _some(names: Iterable[str], limit: int = 8) -> str:
    """Names for a message: the first few, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return (", ".join(listed[:limit]) or "none") + more
