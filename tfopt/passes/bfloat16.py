"""bfloat16: moves the products of a float32 model, and what lies between them, to bfloat16.

bfloat16 is float32 with 8 bits of precision instead of 24 and the same range: bf16(x) = x * (1 + e), |e| <= 2^-8. CPUs
with AVX512-BF16 or AMX multiply it at two to sixteen times the rate of float32, and accumulate in float32. The casts
are in the graph, so a server gains without any flag; inputs and outputs stay float32.

Which ops move, in this order (after TensorFlow's own auto mixed precision, which does nothing where oneDNN is off):
1. products move;
2. what rounds its result (`_ROUNDING`) moves where it lies between two products, unless a reduction or an exponential
   (`_SENSITIVE`) comes before it: those stay float32, and so does what they feed, up to the next product;
3. the bias, and an activation after it, move with their product: the runtime computes the three at once;
4. what only moves or selects values (`_EXACT`) moves where all that it reads, or all that reads it, is bfloat16 or
   constant: the numbers are the same on either side of the cast.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, join, op_def, split
from tfopt.model import Model
from tfopt.passes import Pass, for_each_body
from tfopt.rewrite import Log
from tfopt.rules.channels import kept

_PRODUCTS = frozenset(
    (
        *("Conv2D", "Conv3D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2"),
        *("MatMul", "BatchMatMul", "BatchMatMulV2", "Einsum"),
    )
)
_ROUNDING = frozenset(
    (
        *("Add", "AddN", "AddV2", "BiasAdd", "Sub", "Mul", "RealDiv", "Square", "FusedBatchNormV3"),
        *("Elu", "Erf", "LeakyRelu", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh", "AvgPool", "AvgPool3D"),
    )
)
_SENSITIVE = frozenset(
    (
        *("Cumprod", "Cumsum", "EuclideanNorm", "L2Loss", "Mean", "Prod", "SquaredDifference", "Sum"),
        *("Exp", "Expm1", "Log", "Log1p", "LogSoftmax", "Pow", "Reciprocal", "Rsqrt", "Softmax", "Sqrt"),
    )
)
_EXACT = frozenset(
    (
        *("Abs", "Maximum", "Minimum", "Max", "Min", "MaxPool", "MaxPool3D", "Neg", "Relu", "Relu6", "Select"),
        *("SelectV2", "BatchToSpaceND", "BroadcastTo", "ConcatV2", "DepthToSpace", "ExpandDims", "GatherNd"),
        *("GatherV2", "Identity", "MirrorPad", "Pack", "Pad", "PadV2", "Reshape", "ResizeNearestNeighbor"),
        *("ReverseV2", "Slice", "SpaceToBatchND", "SpaceToDepth", "Split", "SplitV", "Squeeze", "StridedSlice"),
        *("Tile", "Transpose", "Unpack"),
    )
)
_EPILOGUE = frozenset(("BiasAdd", "Add", "AddV2", "LeakyRelu", "Elu"))

_FLOAT, _BFLOAT16 = tf.float32.as_datatype_enum, tf.bfloat16.as_datatype_enum
_GATES = ((("Enter", "RefEnter"), ("Exit", "RefExit")), (("Switch", "RefSwitch"), ("Merge", "RefMerge")))


def run(model: Model, log: Log, keep_float32: str = "") -> None:
    """Moves a model to bfloat16, in place.

    Args:
      model: the model.
      log: gets how many ops and weights moved, and which products did not.
      keep_float32: regular expression; a node that it matches from the start, by its op or by its name, stays float32.
        "Softmax" is there already; "MatMul" keeps all of them; ".*/head/" a part of the model.

    Raises:
      TfoptError: `keep_float32` is no regular expression, or matches nothing.
    """
    graph = model.graph
    keep = kept(graph, "bfloat16", keep_float32)
    _refuse_in_functions(model, log)
    moved = _choose(graph, keep, log)
    if not moved:
        return
    log.applied["op moved to bfloat16"] += len(moved)
    _cast(graph, moved, log)
    graph.sweep()
    log.notes.append(
        "for CPUs with AVX512-BF16 or AMX; without them the same model is slower than float32 where oneDNN is on"
    )


def _refuse_in_functions(model: Model, log: Log) -> None:
    """Names the products in branches and loop bodies: their weights come as float32 arguments, cast at every step."""

    def refuse(body: Graph) -> int:
        if body is not model.graph:
            for node in body.nodes.values():
                if node.op in _PRODUCTS and node.attr["T"].type == _FLOAT:
                    log.refused["bfloat16", node.name] = (
                        f"{node.op} in a branch or loop body stays float32: its weights would be cast at every call"
                    )
        return 0

    for_each_body(model, refuse)


def _choose(graph: Graph, keep: set[str], log: Log) -> set[str]:
    """Names of the nodes to move."""
    inside = _in_control_flow(graph)
    float32 = {name for name, node in graph.nodes.items() if _is_float(node) and name not in graph.keep}
    free = float32 - keep - inside
    products = set()
    for name, node in graph.nodes.items():
        if node.op not in _PRODUCTS:
            continue
        if name in free:
            products.add(name)
        elif name in keep:
            log.refused["bfloat16", name] = f"{node.op} stays float32 as keep_float32 wants it"
        elif name in inside:
            log.refused["bfloat16", name] = (
                f"{node.op} in a loop or branch of TF 1 stays float32: its weights would be cast at every call"
            )
        else:
            dtype = tf.as_dtype(node.attr["T"].type).name if node.attr["T"].type else "of several dtypes"
            log.refused["bfloat16", name] = f"{node.op} is {dtype}, not float32"
    carriers = {name for name in free if graph.nodes[name].op in _ROUNDING | _EXACT}

    def producers(name: str) -> list[str]:
        return [split(graph.nodes[name].input[i])[0] for i in _typed_inputs(graph.nodes[name])]

    def consumers(name: str) -> list[str]:
        return [user for user, index, port in graph.uses(name) if port >= 0 and _reads(graph.nodes[user], index)]

    def closure(start: set[str], following: object, within: set[str]) -> set[str]:
        seen: set[str] = set()
        stack = list(start)
        while stack:
            for name in following(stack.pop()):  # type: ignore[operator]
                if name in within and name not in seen:
                    seen.add(name)
                    stack.append(name)
        return seen

    sensitive = {name for name in float32 - products if graph.nodes[name].op in _SENSITIVE or name in keep}
    carriers -= closure(sensitive, consumers, carriers)
    moved = products | (closure(products, consumers, carriers) & closure(products, producers, float32 - products))
    for product in products:
        moved |= _epilogue(graph, product, free, consumers)
    candidates = [name for name in free - moved if graph.nodes[name].op in _EXACT]
    results = {split(ref)[0] for ref in graph.outputs.values()}
    changed = True
    while changed:
        changed = False
        for name in candidates:
            if name in moved or not _constants_fit(graph, name):
                continue
            varying = [p for p in producers(name) if graph.constant(p) is None]
            after = varying and all(p in moved for p in varying)
            readers = consumers(name)
            if after or (
                readers
                and name not in results
                and all(user in moved for user in readers)
                and len(readers) == sum(port >= 0 for _, _, port in graph.uses(name))
            ):
                moved.add(name)
                changed = True
    return moved


def _epilogue(graph: Graph, product: str, free: set[str], consumers: object) -> set[str]:
    """The bias and the activation that alone read a product; the constant of an addition is its bias."""
    found: set[str] = set()
    name = product
    for _ in range(2):
        readers = consumers(name)  # type: ignore[operator]
        if len(readers) != 1 or graph.output_labels(name) or readers[0] not in free:
            break
        node = graph.nodes[readers[0]]
        operands = [ref for ref in graph.data_inputs(node) if split(ref)[0] != name]
        if node.op not in _EPILOGUE or not all(graph.constant(ref) is not None for ref in operands):
            break
        name = node.name
        found.add(name)
    return found


def _in_control_flow(graph: Graph) -> set[str]:
    """Names of the nodes inside TF 1 loops and branches, where weights come through gates."""
    inside: set[str] = set()
    for entries, exits in _GATES:
        seen: set[str] = set()
        stack = [name for name, node in graph.nodes.items() if node.op in entries]
        while stack:
            name = stack.pop()
            if name not in seen:
                seen.add(name)
                if graph.nodes[name].op not in exits:
                    stack.extend(graph.users(name))
        inside |= seen
    return inside


def _type_attr(node: NodeDef) -> str:
    return "Tparams" if node.op in ("GatherV2", "GatherNd") else "T"


def _is_float(node: NodeDef) -> bool:
    return node.attr[_type_attr(node)].type == _FLOAT if _type_attr(node) in node.attr else False


def _typed_inputs(node: NodeDef) -> list[int]:
    """Indices of the inputs whose dtype is the node's own; operands such as shapes and indices are not."""
    definition = op_def(node.op)
    if definition is None:
        return []
    found: list[int] = []
    start = 0
    for arg in definition.input_arg:
        count = node.attr[arg.number_attr].i if arg.number_attr else 1
        if arg.type_list_attr:
            count = len(node.attr[arg.type_list_attr].list.type)
        if arg.type_attr == _type_attr(node):
            found.extend(range(start, start + count))
        start += count
    return found


def _reads(node: NodeDef, index: int) -> bool:
    return _type_attr(node) in node.attr and index in _typed_inputs(node)


def _typed_output(node: NodeDef, port: int) -> bool:
    """Whether an output has the node's own dtype; the statistics of a batch norm do not."""
    definition = op_def(node.op)
    assert definition is not None
    if len(definition.output_arg) == 1:
        return definition.output_arg[0].type_attr == _type_attr(node)
    return definition.output_arg[port].type_attr == _type_attr(node)


def _constants_fit(graph: Graph, name: str) -> bool:
    """Whether constants beside varying operands lose nothing in bfloat16; a table that is gathered from may."""
    node = graph.nodes[name]
    if node.op in ("GatherV2", "GatherNd"):
        return True
    values = [graph.constant(node.input[i]) for i in _typed_inputs(node)]
    return all(v is None or np.array_equal(v.astype(ml_dtypes.bfloat16).astype(v.dtype), v) for v in values)


def _cast(graph: Graph, moved: set[str], log: Log) -> None:
    """Sets the types, converts constants, and puts casts where the two types meet."""
    casts: dict[tuple[str, int], str] = {}

    def cast(ref: str, target: int) -> str:
        if (ref, target) not in casts:
            value = graph.constant(ref)
            if value is not None and target == _BFLOAT16:
                casts[ref, target] = graph.add_constant(f"{split(ref)[0]}/bfloat16", value.astype(ml_dtypes.bfloat16))
                log.applied["constant stored as bfloat16"] += 1
            else:
                source = _FLOAT if target == _BFLOAT16 else _BFLOAT16
                hint = f"{split(ref)[0]}/cast"
                casts[ref, target] = graph.add_op(
                    hint, "Cast", [ref], SrcT=tf.as_dtype(source), DstT=tf.as_dtype(target)
                )
        return casts[ref, target]

    def is_moved(ref: str) -> bool:
        name, port = split(ref)
        return name in moved and _typed_output(graph.nodes[name], port)

    for node in list(graph.nodes.values()):
        wants = set(_typed_inputs(node)) if node.name in moved else set()
        for index, ref in enumerate(node.input):
            if ref.startswith("^"):
                continue
            if index in wants and not is_moved(ref):
                graph.set_input(node.name, index, cast(join(*split(ref)), _BFLOAT16))
            elif index not in wants and is_moved(ref):
                graph.set_input(node.name, index, cast(join(*split(ref)), _FLOAT))
    for label, ref in graph.outputs.items():
        if is_moved(ref):
            graph.outputs[label] = cast(ref, _FLOAT)
    for name in moved:
        graph.nodes[name].attr[_type_attr(graph.nodes[name])].type = _BFLOAT16
    log.applied["cast at run time"] += sum(graph.nodes[split(ref)[0]].op == "Cast" for ref in casts.values())


PASS = Pass("bfloat16", run, options={"keep_float32": ""}, lossless=False, keeps=("sparsity", "clusters"))
