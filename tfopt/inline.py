"""From a MetaGraphDef to one inlined body: signatures made independent, ref variables upgraded, calls inlined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import tensorflow as tf
from tensorflow.core.framework.graph_pb2 import GraphDef
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.config_pb2 import ConfigProto
from tensorflow.core.protobuf.meta_graph_pb2 import MetaGraphDef, SignatureDef, TensorInfo
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig
from tensorflow.python.grappler import tf_optimizer

from tfopt.errors import TfoptError
from tfopt.graph import join, op_def, split

INIT_SIGNATURE = "__saved_model_init_op"
TRAIN_SIGNATURE = "__saved_model_train_op"

# Attributes that name a device, a colocation, another graph's functions, or shapes that a rewrite would falsify.
_STALE_ATTRS = (
    "_class",
    "_gradient_op_type",
    "_input_shapes",
    "_lower_using_switch_merge",
    "_noinline",
    "_output_shapes",
    "api_implements",
    "_XlaMustCompile",
)

_CALLS = ("PartitionedCall", "StatefulPartitionedCall", "TPUPartitionedCall")


@dataclasses.dataclass
class Inlined:
    """The result of inlining, before variables are told apart.

    Attributes:
      graph_def: nodes, and the functions that could not be inlined (branches and loop bodies).
      outputs: `signature:output[:component]` -> node that holds the result.
      init: node that initialises tables and whatever else serving initialises, or None.
      restore: node that restores the checkpoint, or None where there is none.
    """

    graph_def: GraphDef
    outputs: dict[str, str]
    init: str | None
    restore: str | None


def tensor_names(info: TensorInfo) -> Iterator[tuple[str, str]]:
    """Yields (component, tensor name) of a signature's tensor; the component of a dense tensor is ''."""
    kind = info.WhichOneof("encoding")
    if kind == "coo_sparse":
        yield "values", info.coo_sparse.values_tensor_name
        yield "indices", info.coo_sparse.indices_tensor_name
        yield "dense_shape", info.coo_sparse.dense_shape_tensor_name
    elif kind == "composite_tensor":
        for index, component in enumerate(info.composite_tensor.components):
            yield str(index), component.name
    else:
        yield "", info.name


def set_tensor_name(info: TensorInfo, component: str, name: str) -> None:
    """Writes one tensor name into a signature's tensor; the counterpart of `tensor_names`."""
    if not component:
        info.name = name
    elif info.WhichOneof("encoding") == "coo_sparse":
        setattr(info.coo_sparse, f"{component}_tensor_name", name)
    else:
        info.composite_tensor.components[int(component)].name = name


def label(signature: str, output: str, component: str) -> str:
    """The key of a signature's result in `Graph.outputs`."""
    return f"{signature}:{output}:{component}" if component else f"{signature}:{output}"


def inline(meta: MetaGraphDef, signatures: dict[str, SignatureDef]) -> Inlined:
    """Inlines every function call that TensorFlow can inline, whole model at once.

    Args:
      meta: the model; left as it is.
      signatures: the signatures to keep. Input tensor names are changed in place where a signature feeds a tensor
        that another one computes: it gets a Placeholder of its own.

    Raises:
      TfoptError: the graph uses an op that this TensorFlow does not have.
    """
    graph_def = GraphDef()
    graph_def.CopyFrom(meta.graph_def)
    _check_ops(graph_def)
    _check_graph(graph_def)
    for holder in (graph_def.node, *(f.node_def for f in graph_def.library.function)):
        for node in holder:
            node.device = ""
            for attr in _STALE_ATTRS:
                node.attr.pop(attr, None)
            _add_defaults(node)
    for function in graph_def.library.function:
        for attr in _STALE_ATTRS:
            function.attr.pop(attr, None)
        for arg_attr in function.arg_attr.values():
            arg_attr.attr.pop("_output_shapes", None)
    nodes = {node.name: node for node in graph_def.node}
    results = _upgrade_ref_variables(graph_def, nodes)
    fetches = _separate_fed_tensors(graph_def, nodes, signatures)

    keep = [
        split(name)[0] for s in signatures.values() for _, i in sorted(s.inputs.items()) for _, name in tensor_names(i)
    ]
    keep += [split(asset.tensor_info.name)[0] for asset in meta.asset_file_def]
    outputs: dict[str, str] = {}
    for key, ref, dtype in fetches:
        ref = results.get(ref.removesuffix(":0"), ref)
        producer = nodes[split(ref)[0]]
        control = [f"^{producer.name}"] if producer.op in _CALLS or op_def(producer.op) is None else []
        node = _add(graph_def, nodes, f"tfopt_result/{len(outputs)}", "Identity", [ref, *control])
        node.attr["T"].type = dtype % 100  # reference types are 100 above their value types
        outputs[key] = node.name

    def hold(name: str, ops: list[str]) -> str | None:
        ops = [split(op)[0] for op in ops if split(op)[0] in nodes]
        return _add(graph_def, nodes, name, "NoOp", [f"^{op}" for op in ops]).name if ops else None

    init = hold("tfopt_init", _init_ops(meta))
    restore = hold("tfopt_restore", [meta.saver_def.restore_op_name] if meta.saver_def.restore_op_name else [])
    if restore:
        keep.append(split(meta.saver_def.filename_tensor_name)[0])
    keep += [*outputs.values(), *(name for name in (init, restore) if name)]
    return Inlined(_run_function_optimizer(graph_def, keep), outputs, init, restore)


def _check_ops(graph_def: GraphDef) -> None:
    functions = {f.signature.name for f in graph_def.library.function}
    for holder in (graph_def.node, *(f.node_def for f in graph_def.library.function)):
        for node in holder:
            if node.op not in functions and op_def(node.op) is None:
                raise TfoptError(
                    f"node {node.name!r} uses op {node.op!r}, which TensorFlow {tf.__version__} does not have; "
                    "export the model without it, or load the library that registers the op first"
                )
            if node.op == "Const" and node.attr["value"].tensor.dtype != node.attr["dtype"].type:
                raise TfoptError(f"the graph is damaged: constant {node.name!r} holds a value of another dtype")


def _add_defaults(node: NodeDef) -> None:
    """Writes out the attributes that an exporter left out because they have their default value."""
    definition = op_def(node.op)
    for attr in definition.attr if definition is not None else ():
        if attr.HasField("default_value") and attr.name not in node.attr:
            node.attr[attr.name].CopyFrom(attr.default_value)


def _check_graph(graph_def: GraphDef) -> None:
    """Checks what TensorFlow checks while it inlines, where there is nothing to inline.

    Raises:
      ValueError: a reference to nothing, a missing or wrong attribute, two nodes of one name.
    """
    if not graph_def.library.function:
        with tf.Graph().as_default():
            tf.graph_util.import_graph_def(graph_def, name="")


def _init_ops(meta: MetaGraphDef) -> list[str]:
    if INIT_SIGNATURE in meta.signature_def:
        return [info.name for info in meta.signature_def[INIT_SIGNATURE].outputs.values()]
    for collection in ("saved_model_main_op", "legacy_init_op"):
        if collection in meta.collection_def:
            return list(meta.collection_def[collection].node_list.value)
    return []


def _add(graph_def: GraphDef, nodes: dict[str, NodeDef], name: str, op: str, inputs: list[str]) -> NodeDef:
    """Appends a node under a free name made from `name`."""
    free, count = name, 0
    while free in nodes:
        count += 1
        free = f"{name}_{count}"
    node = graph_def.node.add(name=free, op=op, input=inputs)
    nodes[free] = node
    return node


_REF_ASSIGNMENTS = {
    "Assign": "AssignVariableOp",
    "AssignAdd": "AssignAddVariableOp",
    "AssignSub": "AssignSubVariableOp",
    "ScatterUpdate": "ResourceScatterUpdate",
    "ScatterAdd": "ResourceScatterAdd",
    "ScatterSub": "ResourceScatterSub",
}


def _upgrade_ref_variables(graph_def: GraphDef, nodes: dict[str, NodeDef]) -> dict[str, str]:
    """Turns TF 1 reference variables into resource variables.

    Returns:
      Names of former reference outputs -> the read that now gives their value, for whoever fetched them.
    """
    variables = {n.name: n for n in graph_def.node if n.op in ("VariableV2", "Variable", "TemporaryVariable")}
    if not variables:
        return {}
    source = dict.fromkeys(variables, "")
    for name in source:
        source[name] = name
    # What an assignment gives back is the variable again.
    for node in list(graph_def.node):
        if node.op in _REF_ASSIGNMENTS and split(node.input[0])[0] in source:
            source[node.name] = source[split(node.input[0])[0]]
    results: dict[str, str] = {}

    def read(variable: str, after: list[str]) -> str:
        node = _add(graph_def, nodes, f"{variable}/tfopt_read", "ReadVariableOp", [variable, *after])
        node.attr["dtype"].CopyFrom(variables[variable].attr["dtype"])
        return node.name

    for node in list(graph_def.node):
        control = [ref for ref in node.input if ref.startswith("^")]
        handle_op = {**_REF_ASSIGNMENTS, "IsVariableInitialized": "VarIsInitializedOp"}.get(node.op)
        for index, ref in enumerate(node.input):
            name, port = split(ref)
            if port != 0 or name not in source or name == node.name:
                continue
            if index == 0 and handle_op:
                node.input[0] = source[name]
                if name != source[name]:
                    node.input.append(f"^{name}")
                node.op = handle_op
                dtype = node.attr.pop("T", None)
                for attr in ("use_locking", "validate_shape"):
                    node.attr.pop(attr, None)
                if dtype is not None:
                    node.attr["dtype"].CopyFrom(dtype)
            else:
                after = [f"^{name}"] if name != source[name] else []
                node.input[index] = read(source[name], [*control, *after])
    for node in variables.values():
        node.op = "VarHandleOp"
        shape, dtype = node.attr["shape"].shape, node.attr["dtype"].type
        shared, container = node.attr["shared_name"].s or node.name.encode(), node.attr["container"].s
        node.attr.clear()
        node.attr["shape"].shape.CopyFrom(shape)
        node.attr["dtype"].type = dtype
        node.attr["shared_name"].s, node.attr["container"].s = shared, container
    for name, variable in source.items():
        results[name] = read(variable, [f"^{name}"] if name != variable else [])
    return results


def _separate_fed_tensors(
    graph_def: GraphDef, nodes: dict[str, NodeDef], signatures: dict[str, SignatureDef]
) -> list[tuple[str, str, int]]:
    """Gives a signature that feeds a computed tensor a Placeholder, and a copy of what depends on it.

    A v1 session may feed any tensor, so a signature's input can be what another signature computes.

    Returns:
      For every result: (label, tensor reference, DataType enum).
    """
    fetches = []
    for name, signature in signatures.items():
        fed: dict[str, str] = {}
        for _, info in sorted(signature.inputs.items()):  # a proto's own order changes from process to process
            for component, tensor in tensor_names(info):
                if tensor.removesuffix(":0") not in nodes and split(tensor)[0] not in nodes:
                    raise TfoptError(f"signature {name!r}: input tensor {tensor!r} is not in the graph")
                node = nodes[split(tensor)[0]]
                if node.op in ("Placeholder", "PlaceholderWithDefault", "PlaceholderV2"):
                    continue
                own = _add(graph_def, nodes, f"{name}/{node.name}", "Placeholder", [])
                own.attr["dtype"].type = info.dtype
                own.attr["shape"].shape.CopyFrom(info.tensor_shape)
                fed[tensor.removesuffix(":0")] = own.name
                set_tensor_name(info, component, f"{own.name}:0")
        copies = _copy_downstream(graph_def, nodes, signature, fed, prefix=name) if fed else {}
        for output, info in sorted(signature.outputs.items()):
            for component, tensor in tensor_names(info):
                producer, port = split(tensor)
                if producer not in nodes:
                    raise TfoptError(f"signature {name!r}: output tensor {tensor!r} is not in the graph")
                ref = fed.get(tensor.removesuffix(":0")) or f"{copies.get(producer, producer)}:{max(port, 0)}"
                fetches.append((label(name, output, component), ref, _component_dtype(info, component)))
    return fetches


def _component_dtype(info: TensorInfo, component: str) -> int:
    if info.WhichOneof("encoding") == "composite_tensor":
        return info.composite_tensor.components[int(component)].dtype
    return info.dtype if component in ("", "values") else tf.int64.as_datatype_enum


def _copy_downstream(
    graph_def: GraphDef, nodes: dict[str, NodeDef], signature: SignatureDef, fed: dict[str, str], prefix: str
) -> dict[str, str]:
    """Copies the nodes between fed tensors and a signature's results; returns original name -> copy."""
    users: dict[str, list[str]] = {}
    frontier = []  # nodes that take a fed tensor
    for node in graph_def.node:
        for ref in node.input:
            if ref.removesuffix(":0") in fed:
                frontier.append(node.name)
            else:
                users.setdefault(split(ref)[0], []).append(node.name)
    depends = _closure(frontier, lambda name: users.get(name, ()))
    roots = [split(tensor)[0] for i in signature.outputs.values() for _, tensor in tensor_names(i)]
    needed = _closure(
        roots, lambda name: (split(ref)[0] for ref in nodes[name].input if ref.removesuffix(":0") not in fed)
    )
    originals = [name for name in list(nodes) if name in depends and name in needed]
    copies = {name: _add(graph_def, nodes, f"{prefix}/{name}", nodes[name].op, []).name for name in originals}
    for name, copy in copies.items():
        nodes[copy].input.extend(fed.get(ref.removesuffix(":0")) or _renamed(ref, copies) for ref in nodes[name].input)
        for key, attr in nodes[name].attr.items():
            nodes[copy].attr[key].CopyFrom(attr)
    return copies


def _closure(roots: Iterable[str], following: Callable[[str], Iterable[str]]) -> set[str]:
    seen: set[str] = set()
    stack = list(roots)
    while stack:
        name = stack.pop()
        if name not in seen:
            seen.add(name)
            stack.extend(following(name))
    return seen


def _renamed(ref: str, copies: dict[str, str]) -> str:
    name, port = split(ref)
    return join(copies[name], port) if name in copies else ref


def _run_function_optimizer(graph_def: GraphDef, keep: list[str]) -> GraphDef:
    if not graph_def.library.function:
        return graph_def
    meta = MetaGraphDef()
    meta.graph_def.CopyFrom(graph_def)
    meta.collection_def["train_op"].node_list.value.extend(dict.fromkeys(keep))
    return run_grappler(meta, ["function"], function_optimization=RewriterConfig.AGGRESSIVE)


def run_grappler(meta: MetaGraphDef, optimizers: list[str], **toggles: int) -> GraphDef:
    """Runs TensorFlow's graph optimizers in this process on a MetaGraphDef that names what to keep in `train_op`."""
    config = ConfigProto()
    rewrites = config.graph_options.rewrite_options
    rewrites.optimizers.extend(optimizers)
    rewrites.meta_optimizer_iterations = RewriterConfig.ONE
    rewrites.min_graph_nodes = -1
    rewrites.fail_on_optimizer_errors = True
    rewrites.meta_optimizer_timeout_ms = -1
    for key, value in toggles.items():
        setattr(rewrites, key, value)
    result = tf_optimizer.OptimizeGraph(config, meta)
    for node in result.node:
        node.device = ""
        for attr in _STALE_ATTRS:
            node.attr.pop(attr, None)
    return result
