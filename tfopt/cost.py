"""Parameters and floating-point operations, counted in the graph: no model runs.

FLOPs are 2 x the multiply-accumulates of the linear ops (convolutions, matrix products, einsum), at batch 1; what
else a model does is small beside them. Of several branches the dearest counts; the body of a loop counts once, with a
note, since the number of turns is not in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tfopt.errors import TfoptError, one_line

Shape = Sequence[int | None]


@dataclass(frozen=True)
class Cost:
    """What a signature costs.

    Attributes:
        parameters: elements of the floating-point (or quantized) weights of rank 1 and more.
        flops: 2 x multiply-accumulates; None where the shapes of a linear op are not known.
        notes: what the numbers leave out.
    """

    parameters: int
    flops: int | None
    notes: tuple[str, ...] = ()


@dataclass
class Count:
    """A count under way."""

    macs: int = 0
    unknown: list[str] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)

    def cost(self, parameters: int) -> Cost:
        """Returns the finished count."""
        if self.unknown:
            notes = [f"FLOPs are unknown: no static shape at {', '.join([*dict.fromkeys(self.unknown)][:3])}"]
            return Cost(parameters, None, (*notes, *sorted(self.notes)))
        return Cost(parameters, 2 * self.macs, tuple(sorted(self.notes)))


def product(shape: Shape) -> int:
    """Returns the number of elements; raises TypeError where a size is not known."""
    return math.prod(shape)  # type: ignore[arg-type]


def cost(path: str | Path, signature: str = "serving_default") -> Cost:
    """Counts a SavedModel directory or a .tflite file.

    Raises:
        TfoptError: the file is not readable, or has no such signature.
    """
    if Path(path).is_file():
        from tfopt.cost_tflite import tflite_cost

        return tflite_cost(path, signature)
    graph_def, outputs = _inlined(Path(path), signature)
    try:
        return graph_cost(graph_def, outputs=outputs)
    except (ValueError, TypeError, KeyError) as error:
        raise TfoptError(f"{path}: its graph is damaged: {one_line(error)}") from error


def graph_cost(graph_def: Any, *, outputs: Iterable[str] | None = None, weights: Collection[str] = ()) -> Cost:
    """Counts a GraphDef whose calls are inlined, as far as they can be.

    Args:
        graph_def: constants, variables, or placeholders as weights; an unknown first dimension of any other
            placeholder counts as 1.
        outputs: node or tensor names; only what they need counts. None: all nodes.
        weights: names of the placeholders that are weights.
    """
    import tensorflow as tf

    skeleton, parameters = tf.compat.v1.GraphDef(), 0
    skeleton.versions.CopyFrom(graph_def.versions)
    skeleton.library.CopyFrom(graph_def.library)
    wanted = None if outputs is None else _ancestors(graph_def, outputs)
    for node in graph_def.node:
        if wanted is not None and node.name not in wanted:
            continue
        copy = skeleton.node.add()
        if node.op == "Const":
            value = node.attr["value"].tensor
            size = math.prod(dim.size for dim in value.tensor_shape.dim)
            dtype = tf.as_dtype(value.dtype)
            if dtype.is_floating or dtype.is_complex:
                parameters += size if value.tensor_shape.dim else 0
                if size > 16:  # only its shape matters, and weights may be gigabytes
                    copy.name, copy.op = node.name, "Placeholder"
                    copy.attr["dtype"].type = value.dtype
                    copy.attr["shape"].shape.CopyFrom(value.tensor_shape)
                    continue
        copy.CopyFrom(node)
        for attr in ("_output_shapes", "_class"):  # stale, and names of nodes that are not needed
            copy.attr.pop(attr, None)
        if node.op in ("VarHandleOp", "VariableV2", "Variable"):
            parameters += _elements(tf, node.attr["dtype"].type, node.attr["shape"].shape)
        elif node.op == "Placeholder":
            dims = copy.attr["shape"].shape.dim
            if node.name in weights:
                parameters += _elements(tf, node.attr["dtype"].type, node.attr["shape"].shape)
            elif dims and dims[0].size < 0:
                dims[0].size = 1
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(skeleton, name="")
    count = Count()
    _count_ops(graph, graph.get_operations(), count)
    return count.cost(parameters)


def _count_ops(graph: Any, ops: Iterable[Any], count: Count) -> None:
    for op in ops:
        if op.type in _MACS:
            shapes = [
                [t.shape.as_list() if t.shape.rank is not None else [None] for t in ts]
                for ts in (op.inputs, op.outputs)
            ]
            try:
                count.macs += _MACS[op.type](op.get_attr, shapes[0], shapes[1][0])
            except TypeError:  # a None among the factors
                count.unknown.append(op.name)
            continue
        if op.type in ("Switch", "Enter"):
            count.notes.add("v1 control flow: all branches, and one turn of every loop, are counted")
        bodies = [_body(graph, op, name) for name in _functions(op)]
        if bodies:
            tried = [Count() for _ in bodies]
            for (body, inner), each in zip(bodies, tried, strict=True):
                _count_ops(body, inner, each)
            if op.type in ("While", "StatelessWhile"):
                count.notes.add(f"the body of loop '{op.name}' is counted once")
            dearest = max(tried, key=lambda each: (len(each.unknown), each.macs))
            count.macs += dearest.macs
            count.unknown += dearest.unknown
            count.notes |= dearest.notes


def _functions(op: Any) -> list[str]:
    """Returns the names of the functions that an op calls (of a loop, its condition and body)."""
    found = []
    for attr in op.node_def.attr.values():
        found += [attr.func.name] if attr.HasField("func") else [each.name for each in attr.list.func]
    return found


def _body(graph: Any, op: Any, name: str) -> tuple[Any, list[Any]]:
    from tensorflow.python.framework import function_def_to_graph

    definition = graph._get_function(name).cached_definition
    skip = len(op.inputs) - len(definition.signature.input_arg)  # the predicate of an If
    body = function_def_to_graph.function_def_to_graph(definition, [each.shape for each in op.inputs[skip:]])
    return body, body.get_operations()


def _ancestors(graph_def: Any, outputs: Iterable[str]) -> set[str]:
    inputs = {node.name: node.input for node in graph_def.node}
    stack, seen = [name.split(":")[0] for name in outputs], set()
    while stack:
        name = stack.pop()
        if name not in seen and name in inputs:
            seen.add(name)
            stack += [each.lstrip("^").split(":")[0] for each in inputs[name]]
    return seen


def _elements(tf: Any, dtype: int, shape: Any) -> int:
    sizes = [dim.size for dim in shape.dim]
    return math.prod(sizes) if sizes and min(sizes) >= 0 and tf.as_dtype(dtype).is_floating else 0


def _inlined(path: Path, signature: str) -> tuple[Any, list[str]]:
    """Returns the graph of a SavedModel with its calls inlined, and the outputs of the signature."""
    import tensorflow as tf
    from tensorflow.core.protobuf import config_pb2
    from tensorflow.python.grappler import tf_optimizer
    from tensorflow.python.saved_model import loader_impl

    try:
        saved = loader_impl.parse_saved_model(str(path))
    except OSError as error:
        raise TfoptError(f"{path} is not a SavedModel: {error}") from error
    graphs = [each for each in saved.meta_graphs if "serve" in each.meta_info_def.tags]
    if not graphs or signature not in graphs[0].signature_def:
        have = ", ".join(sorted(graphs[0].signature_def)) if graphs else "no graph with the tag 'serve'"
        raise TfoptError(f"{path} has no signature '{signature}'; it has: {have}")
    meta_graph = tf.compat.v1.MetaGraphDef()
    meta_graph.graph_def.CopyFrom(graphs[0].graph_def)
    outputs = [info.name for info in graphs[0].signature_def[signature].outputs.values()]
    meta_graph.collection_def["train_op"].node_list.value.extend(outputs)
    config = config_pb2.ConfigProto()
    options = config.graph_options.rewrite_options
    options.optimizers.append("function")
    options.function_optimization = options.AGGRESSIVE
    options.meta_optimizer_iterations = options.ONE
    options.min_graph_nodes = -1
    try:
        return tf_optimizer.OptimizeGraph(config, meta_graph), outputs
    except Exception:  # grappler raises what it likes; functions are then counted by their callers' shapes
        return meta_graph.graph_def, outputs


def _conv(attr: Callable[[str], Any], inputs: Sequence[Shape], output: Shape) -> int:
    return product(output) * product(inputs[1][:-1])  # filter: window, inputs of a group, outputs


def _depthwise(attr: Callable[[str], Any], inputs: Sequence[Shape], output: Shape) -> int:
    return product(output) * product(inputs[1][:2])


def _transposed(attr: Callable[[str], Any], inputs: Sequence[Shape], output: Shape) -> int:
    return product(inputs[2]) * product(inputs[1][:-1])  # filter: window, outputs, inputs


def _matmul(attr: Callable[[str], Any], inputs: Sequence[Shape], output: Shape) -> int:
    return product(output) * product([inputs[0][-2 if attr("transpose_a") else -1]])


def _batch_matmul(attr: Callable[[str], Any], inputs: Sequence[Shape], output: Shape) -> int:
    return product(output) * product([inputs[0][-2 if attr("adj_x") else -1]])


def _einsum(attr: Callable[[str], Any], inputs: Sequence[Shape], output: Shape) -> int:
    equation = attr("equation")
    terms = (equation.decode() if isinstance(equation, bytes) else equation).replace(" ", "").split("->")[0].split(",")
    if len(terms) < 2:
        return 0
    sizes: dict[Any, int | None] = {}
    for term, shape in zip(terms, inputs, strict=True):
        before, dots, after = term.partition("...")
        tail = len(shape) - len(after)
        labels: list[Any] = [*before, *(range(tail - len(before) - 1, -1, -1) if dots else ()), *after]
        for label, size in zip(labels, shape, strict=True):
            sizes[label] = max(sizes.get(label) or 1, size) if size is not None else None
    return product(list(sizes.values()))


_MACS: Mapping[str, Callable[[Callable[[str], Any], Sequence[Shape], Shape], int]] = {
    "Conv2D": _conv,
    "Conv3D": _conv,
    "_FusedConv2D": _conv,
    "DepthwiseConv2dNative": _depthwise,
    "_FusedDepthwiseConv2dNative": _depthwise,
    "Conv2DBackpropInput": _transposed,
    "Conv3DBackpropInputV2": _transposed,
    "MatMul": _matmul,
    "_FusedMatMul": _matmul,
    "BatchMatMul": _batch_matmul,
    "BatchMatMulV2": _batch_matmul,
    "BatchMatMulV3": _batch_matmul,
    "Einsum": _einsum,
}
