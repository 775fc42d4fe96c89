"""Which variables of a graph are weights and which are state, what the checkpoint holds for each, and how to read it.

A variable that the checkpoint restores, and that everything else only reads, is a weight: its handle becomes a
Placeholder of the value's dtype, also as an argument of branches and loop bodies. What a signature assigns stays state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf import trackable_object_graph_pb2
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef

from tfopt.errors import TfoptError, one_line
from tfopt.graph import Graph, called_functions, const_node, function_body, function_def, make_node, split
from tfopt.rewrite import remove_node

_READS = {
    "ReadVariableOp": "Identity",
    "ResourceGather": "GatherV2",
    "ResourceGatherNd": "GatherNd",
    "VariableShape": "Shape",
    "VarIsInitializedOp": "Const",
}

# Ops that hand their inputs to a function: op -> how many inputs come before the function's arguments.
_CALLERS = {
    "If": 1,
    "StatelessIf": 1,
    "Case": 1,
    "StatelessCase": 1,
    "While": 0,
    "StatelessWhile": 0,
    "PartitionedCall": 0,
    "StatefulPartitionedCall": 0,
}
_LOOPS = ("While", "StatelessWhile")
_GATES = ("Switch", "Enter")  # how v1 branches and loops let a handle in


@dataclasses.dataclass(frozen=True)
class CheckpointKey:
    """Where a value lies in a checkpoint: the tensor's name, and the slice of it ('' for the whole)."""

    name: str
    slice: str
    dtype: tf.DType


def object_graph_keys(meta: MetaGraphDef, prefix: str) -> dict[str, CheckpointKey]:
    """Handles that a TF 2 signature captures, mapped to checkpoint keys by the saved object graph.

    Keras 3 models saved by `tf.saved_model.save` need it: their restore function fills other handles than the ones that
    the signatures read, and only the object graph tells which value belongs to which capture.

    Returns:
      VarHandleOp node name -> key.
    """
    objects = meta.object_graph_def
    handles: dict[str, int] = {}
    for node in meta.graph_def.node:
        function = objects.concrete_functions.get(node.attr["f"].func.name) if "f" in node.attr else None
        if function is not None and function.bound_inputs:
            captured = list(node.input)[-len(function.bound_inputs) :]
            handles.update(zip((split(ref)[0] for ref in captured), function.bound_inputs, strict=False))
    variables = {h: i for h, i in handles.items() if objects.nodes[i].WhichOneof("kind") == "variable"}
    if not variables:
        return {}
    proto = tf.train.load_checkpoint(prefix).get_tensor("_CHECKPOINTABLE_OBJECT_GRAPH")
    saved = trackable_object_graph_pb2.TrackableObjectGraph.FromString(proto)
    # The two graphs number their objects differently; the names of the edges from the root tell which is which.
    same = {0: 0}
    queue = [0]
    while queue:
        index = queue.pop()
        edges = {child.local_name: child.node_id for child in saved.nodes[same[index]].children}
        for child in objects.nodes[index].children:
            if child.local_name in edges and child.node_id not in same:
                same[child.node_id] = edges[child.local_name]
                queue.append(child.node_id)
    keys = {}
    for handle, index in variables.items():
        for attribute in saved.nodes[same[index]].attributes if index in same else []:
            if attribute.name == "VARIABLE_VALUE":
                dtype = tf.as_dtype(objects.nodes[index].variable.dtype)
                keys[handle] = CheckpointKey(attribute.checkpoint_key, "", dtype)
    return keys


def restored_keys(graph: Graph, restore: str) -> tuple[dict[str, CheckpointKey], dict[str, list[CheckpointKey]]]:
    """Walks the inlined restore op.

    Returns:
      VarHandleOp name -> key, and the name of a mutable table's node -> the keys of its keys and values.
    """
    variables: dict[str, CheckpointKey] = {}
    tables: dict[str, list[CheckpointKey]] = {}
    for name in sorted(graph.reachable([restore])):
        node = graph.nodes[name]
        if node.op == "AssignVariableOp":
            key = _restored_key(graph, node.input[1])
            if key:
                variables[split(node.input[0])[0]] = key
        elif node.op == "LookupTableImportV2":
            pair = [_restored_key(graph, ref) for ref in node.input[1:3]]
            if all(pair):
                tables[split(node.input[0])[0]] = [key for key in pair if key]
    return variables, tables


def _restored_key(graph: Graph, ref: str) -> CheckpointKey | None:
    name, port = split(ref)
    while graph.nodes[name].op == "Identity":
        name, port = split(graph.nodes[name].input[0])
    node = graph.nodes[name]
    if node.op != "RestoreV2":
        return None
    names, slices = (_waiting_constant(graph, ref) for ref in node.input[1:3])
    if names is None or slices is None:
        return None
    return CheckpointKey(names[port].decode(), slices[port].decode(), tf.as_dtype(node.attr["dtypes"].list.type[port]))


def _waiting_constant(graph: Graph, ref: str) -> np.ndarray | None:
    """The value of a Const that may wait for something by a control edge, as inlined ones do."""
    node = graph.producer(ref)
    while node.op == "Identity":
        node = graph.producer(node.input[0])
    return tf.make_ndarray(node.attr["value"].tensor) if node.op == "Const" else None


def read_checkpoint(prefix: str, keys: list[CheckpointKey]) -> list[np.ndarray]:
    """Reads values, without a second copy of them where NumPy can look into TensorFlow's memory.

    Raises:
      TfoptError: the checkpoint is missing, damaged, or lacks a key.
    """
    if not keys:
        return []
    if not Path(f"{prefix}.index").is_file():
        raise TfoptError(f"{prefix}.index: not found; the SavedModel has variables, but its checkpoint is missing")
    try:
        tensors = tf.raw_ops.RestoreV2(
            prefix=prefix,
            tensor_names=[key.name for key in keys],
            shape_and_slices=[key.slice for key in keys],
            dtypes=[key.dtype for key in keys],
        )
    except (tf.errors.OpError, ValueError, MemoryError) as error:
        raise TfoptError(f"{prefix}: the checkpoint cannot be read: {one_line(error)}") from error
    return [_as_array(tensor) for tensor in tensors]


def _as_array(tensor: tf.Tensor) -> np.ndarray:
    try:
        return np.asarray(memoryview(tensor))
    except (TypeError, ValueError, BufferError, NotImplementedError):  # strings, bfloat16 and the like
        return np.asarray(tensor.numpy())


def bypass_handle_identities(graph: Graph) -> None:
    """Takes out the Identity nodes through which inlining hands resource handles on, in place."""
    for name, node in list(graph.nodes.items()):
        if node.op == "Identity" and node.attr["T"].type == tf.resource.as_datatype_enum:
            remove_node(graph, name, node.input[0])


def read_only(graph: Graph, handle: str, library: Mapping[str, FunctionDef], live: set[str] | None = None) -> bool:
    """Whether everything that takes a variable's handle only reads it, in branches and loops too.

    Args:
      graph: the body.
      handle: the node that gives the handle.
      library: the functions by name.
      live: the consumers that count; None for all.
    """
    if graph.output_labels(handle):
        return False
    for user, index, port in graph.uses(handle):
        node = graph.nodes[user]
        if port == -1 or (live is not None and user not in live):
            continue
        if node.op in _READS or (node.op in _GATES and read_only(graph, user, library, live)):
            continue
        if node.op not in _CALLERS:
            return False
        for function in called_functions(node):
            try:
                body = function_body(library[function], library)
            except ValueError:
                return False
            bypass_handle_identities(body)
            argument = body.arguments[index - _CALLERS[node.op]]
            passed = body.output_labels(argument)
            if node.op in _LOOPS and passed:
                if any(port == index for _, _, port in graph.uses(user)):
                    return False
                body.outputs = {k: ref for k, ref in body.outputs.items() if k not in passed}
            if not read_only(body, argument, library):
                return False
    return True


def demote(graph: Graph, handles: Mapping[str, tf.DType], library: dict[str, FunctionDef]) -> None:
    """Turns handles into plain values, in place: reads become Identity, gathers from a variable gathers from a tensor.

    Args:
      graph: the body; the node of every handle must already give the value.
      handles: node name -> dtype of the value.
      library: gets rewritten branches and loop bodies under new names.
    """
    callers: dict[str, dict[int, tf.DType]] = {}
    for handle, dtype in handles.items():
        for user, index, port in graph.uses(handle):
            node = graph.nodes[user]
            if port == -1:
                continue
            if node.op in _CALLERS:
                callers.setdefault(user, {})[index - _CALLERS[node.op]] = dtype
            elif node.op in _GATES:
                node.attr["T"].type = dtype.as_datatype_enum
                demote(graph, {user: dtype}, library)
            elif node.op in _READS:
                _demote_read(graph, node, dtype)
    for user, arguments in callers.items():
        _demote_call(graph.nodes[user], arguments, library)


def _demote_read(graph: Graph, node: NodeDef, dtype: tf.DType) -> None:
    attrs = {key: node.attr[key] for key in ("Tindices", "batch_dims", "out_type") if key in node.attr}
    new = make_node(node.name, _READS[node.op], node.input)
    for key, attr in attrs.items():
        new.attr[key].CopyFrom(attr)
    if new.op == "Const":
        control = [ref for ref in node.input if ref.startswith("^")]
        new = const_node(node.name, np.array(True))
        new.input.extend(control)
    elif new.op == "GatherV2":
        axis = graph.add(const_node(graph.unique_name(f"{node.name}/axis"), np.array(attrs["batch_dims"].i, np.int32)))
        inputs = list(node.input)
        del new.input[:]
        new.input.extend([*inputs[:2], axis, *inputs[2:]])
        new.attr["Tparams"].type = dtype.as_datatype_enum
        new.attr["Taxis"].type = tf.int32.as_datatype_enum
    else:
        new.attr["Tparams" if new.op == "GatherNd" else "T"].type = dtype.as_datatype_enum
    graph.replace(new)


def _demote_call(node: NodeDef, arguments: Mapping[int, tf.DType], library: dict[str, FunctionDef]) -> None:
    for _, attr in sorted(node.attr.items()):
        for func in [attr.func] if attr.HasField("func") else list(attr.list.func):
            original = library[func.name]
            body = function_body(original, library)
            bypass_handle_identities(body)
            names = {body.arguments[index]: dtype for index, dtype in arguments.items()}
            for name, dtype in names.items():
                placeholder = make_node(name, "Placeholder", dtype=dtype)
                body.replace(placeholder)
            demote(body, names, library)
            signature = FunctionDef()
            signature.CopyFrom(original)
            signature.arg_attr.clear()
            for index, dtype in arguments.items():
                signature.signature.input_arg[index].type = dtype.as_datatype_enum
                signature.signature.input_arg[index].ClearField("handle_data")
            for output in signature.signature.output_arg:
                if body.outputs[output.name] in names:
                    output.type = names[body.outputs[output.name]].as_datatype_enum
                    output.ClearField("handle_data")
            func.name = new_function_name(func.name, library)
            library[func.name] = function_def(body, signature, func.name, library)
    for key in ("T", "Tin"):
        if key in node.attr:
            for index, dtype in arguments.items():
                node.attr[key].list.type[index] = dtype.as_datatype_enum
    node.attr.pop("output_shapes", None)
    for key in [key for key in node.attr if key.startswith("_")]:
        node.attr.pop(key)


def new_function_name(name: str, library: Mapping[str, FunctionDef]) -> str:
    """A free function name made from `name`; rewriting twice does not grow it."""
    stem = name.split("__tfopt_")[0]
    count = 1
    while f"{stem}__tfopt_{count}" in library:
        count += 1
    return f"{stem}__tfopt_{count}"
