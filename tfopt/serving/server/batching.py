"""Dynamic batching by TensorFlow's own BatchFunction kernel, whose scheduler is the one that TensorFlow Serving uses.

    batched(inputs) = BatchFunction(f, inputs, captured)    f = the signature's subgraph, as a function

What the subgraph needs and does not compute from the inputs is copied into f, but for what holds state: handles of
variables and tables, and the values of TF 1 reference variables, come in as captured tensors. f has one output more,
(rows, 2): the size of the batch that each row was in, and when that batch ran, from which the metrics are made.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2, function_pb2, graph_pb2, types_pb2
from tensorflow.python.client import pywrap_tf_session
from tensorflow.python.framework import c_api_util

from tfopt.serving.batching_parameters import BatchingParameters

_HANDLES = (tf.resource, tf.variant)


@dataclasses.dataclass(frozen=True)
class Batched:
    """A signature as one BatchFunction.

    Attributes:
      outputs: the graph tensor of each output.
      report: the graph tensor (rows, 2), float64: size of the row's batch with its padding, and when it ran, in s.
      parameters: those that it was built with, defaults filled in.
    """

    outputs: dict[str, str]
    report: str
    parameters: BatchingParameters


def obstacle(signature: Any, parameters: BatchingParameters) -> str | None:
    """Why a signature cannot be batched; None where it can: all its tensors share dimension 0, which is free."""
    if not signature.inputs:
        return "it has no inputs"
    for kind, infos in (("input", signature.inputs), ("output", signature.outputs)):
        for name, info in sorted(infos.items()):
            if info.WhichOneof("encoding") != "name":
                return f"{kind} {name!r} is not a dense tensor"
            if info.tensor_shape.unknown_rank:
                continue
            dims = [dim.size for dim in info.tensor_shape.dim]
            if not dims or dims[0] != -1:
                return f"{kind} {name!r} has shape {dims}, so that rows of several requests cannot be put together"
            if kind == "input" and parameters.pad_variable_length_inputs and -1 in dims[1:]:
                return f"input {name!r} has shape {dims}, and this server does not pad_variable_length_inputs"
    return None


def batch(
    graph: tf.Graph, name: str, inputs: dict[str, str], outputs: dict[str, str], parameters: BatchingParameters
) -> Batched:
    """Adds a signature's BatchFunction to the graph that it is in.

    Args:
      graph: of the session; grows.
      name: of the signature; tells its queue from those of others.
      inputs: graph tensor of each input.
      outputs: graph tensor of each output.
      parameters: how to batch.

    Raises:
      ValueError, tf.errors.OpError: the subgraph cannot be made a function.
    """
    with graph.as_default(), tf.device(None):
        fed = [graph.get_tensor_by_name(tensor) for tensor in inputs.values()]
        results = [tf.identity(graph.get_tensor_by_name(tensor)) for tensor in outputs.values()]
        rows = tf.shape(fed[0], out_type=tf.int64)[:1]
        row = tf.stack([tf.cast(rows[0], tf.float64), tf.timestamp()])
        results.append(tf.tile(row[None], tf.concat([rows, [1]], 0)))
        body, captured = _subgraph(fed, results)
        if any(tensor.dtype._is_ref_dtype for tensor in captured):
            body, captured, results = _by_value(graph, body, fed, captured, results)
        function = _function(graph, f"tfopt_batch_{len(graph.get_operations())}", body, [*fed, *captured], results)
        tensors = _call(function, name, fed, captured, results, parameters.filled())
    return Batched(dict(zip(outputs, tensors, strict=False)), tensors[-1], parameters.filled())


def _subgraph(inputs: list[Any], outputs: list[Any]) -> tuple[list[Any], list[Any]]:
    """The operations between inputs and outputs, in the graph's order, and the tensors that come from outside."""
    given = {tensor.name for tensor in inputs}
    body: dict[str, Any] = {}
    captured: dict[str, Any] = {}
    pending = [tensor.op for tensor in outputs]
    while pending:
        operation = pending.pop()
        if operation.name in body:
            continue
        body[operation.name] = operation
        for tensor in operation.inputs:
            if tensor.name in given:
                continue
            holds_state = tensor.dtype._is_ref_dtype or (tensor.dtype in _HANDLES and not list(tensor.op.inputs))
            if holds_state:
                captured[tensor.name] = tensor
            else:
                pending.append(tensor.op)
        pending += operation.control_inputs
    return sorted(body.values(), key=lambda o: o._id), list(captured.values())


def _by_value(
    graph: Any, body: list[Any], inputs: list[Any], captured: list[Any], outputs: list[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """A copy of a subgraph that takes the values of TF 1 reference variables: a function has no reference arguments."""
    values = [tf.identity(tensor) if tensor.dtype._is_ref_dtype else tensor for tensor in captured]
    copy = graph_pb2.GraphDef(versions=graph.graph_def_versions)
    for operation in body:
        node = copy.node.add()
        node.CopyFrom(operation.node_def)
        node.attr.pop("_class", None)
    inside = {operation.name for operation in body}
    for outside in {tensor.op.name: tensor for tensor in [*inputs, *captured]}.values():
        if outside.op.name not in inside:
            node = copy.node.add(name=outside.op.name, op="Placeholder")
            node.attr["dtype"].type = outside.dtype.base_dtype.as_datatype_enum
    before = {operation.name for operation in graph.get_operations()}
    replaced = {old.name: new for old, new in zip([*inputs, *captured], [*inputs, *values], strict=True)}
    results = tf.import_graph_def(copy, replaced, [tensor.name for tensor in outputs], name="tfopt_by_value")
    added = [o for o in graph.get_operations() if o.name not in before and o.name.partition("/")[2] in inside]
    return added, values, results


def _function(graph: Any, name: str, body: list[Any], inputs: list[Any], outputs: list[Any]) -> Any:
    """A FunctionDef of operations that are in a graph."""
    with graph._c_graph.get() as native:
        made = pywrap_tf_session.TF_GraphToFunction_wrapper(
            native,
            name,
            False,
            [operation._c_op for operation in body],
            [tensor._as_tf_output() for tensor in inputs],
            [tensor._as_tf_output() for tensor in outputs],
            [],
            [],
            [],
            None,
            "",
        )
    with c_api_util.tf_buffer() as buffer:
        pywrap_tf_session.TF_FunctionToFunctionDef(made, buffer)
        function = function_pb2.FunctionDef.FromString(pywrap_tf_session.TF_GetBuffer(buffer))
    pywrap_tf_session.TF_DeleteFunction(made)
    for node in function.node_def:
        node.attr.pop("_class", None)  # may name nodes that are outside
    return function


def _call(
    function: Any, name: str, inputs: list[Any], captured: list[Any], outputs: list[Any], p: BatchingParameters
) -> list[str]:
    """Adds the function and its BatchFunction to the current graph; the names of its results."""
    definition = graph_pb2.GraphDef(versions=tf.compat.v1.get_default_graph().graph_def_versions)
    definition.library.function.append(function)
    for index, tensor in enumerate([*inputs, *captured]):
        node = definition.node.add(name=f"in{index}", op="Placeholder")
        node.attr["dtype"].type = tensor.dtype.as_datatype_enum
    node = definition.node.add(name="call", op="BatchFunction", input=[n.name for n in definition.node])
    most = p.max_execution_batch_size if p.enable_large_batch_splitting else p.max_batch_size
    assert p.max_batch_size is not None and most is not None
    sizes = p.allowed_batch_sizes
    if p.enable_large_batch_splitting and most < p.max_batch_size:
        # The kernel takes the largest batch that it runs from this list only.
        sizes = tuple(sorted({most, *(size for size in sizes or range(1, most) if size < most)}))
    attributes: dict[str, Any] = {
        "num_batch_threads": p.num_batch_threads,
        "max_batch_size": p.max_batch_size,
        "batch_timeout_micros": p.batch_timeout_micros,
        "max_enqueued_batches": p.max_enqueued_batches,
    }
    for key, value in attributes.items():
        node.attr[key].i = value
    node.attr["allowed_batch_sizes"].list.i.extend(sizes)
    node.attr["enable_large_batch_splitting"].b = bool(p.enable_large_batch_splitting)
    node.attr["shared_name"].s = node.attr["batching_queue"].s = f"batch/{name}".encode()
    node.attr["f"].func.name = function.signature.name
    for key, tensors in (("Tin", inputs), ("Tcaptured", captured), ("Tout", outputs)):
        types: list[types_pb2.DataType] = [tensor.dtype.as_datatype_enum for tensor in tensors]
        node.attr[key].CopyFrom(attr_value_pb2.AttrValue(list=attr_value_pb2.AttrValue.ListValue(type=types)))
    replaced = {f"in{index}:0": tensor for index, tensor in enumerate([*inputs, *captured])}
    wanted = [f"call:{index}" for index in range(len(outputs))]
    return [t.name for t in tf.import_graph_def(definition, replaced, wanted, name="tfopt_batch")]
