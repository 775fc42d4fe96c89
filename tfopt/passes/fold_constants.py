"""fold_constants: computes now what does not depend on the inputs.

Two folders share the work. This file evaluates what hangs on weights, which TensorFlow's optimizer cannot see because
they are Placeholders to it, and takes the result only where the model does not grow. TensorFlow's own optimizer then
folds shapes, cancels transposes and reshapes, and does the rest of the arithmetic.
"""

from __future__ import annotations

import math

import tensorflow as tf

from tfopt.fake_quant import OPS
from tfopt.graph import Graph, Shape, infer_shapes, op_def, split
from tfopt.model import Model
from tfopt.passes import Pass, optimize_in_process
from tfopt.passes.branches import take_constant_branches
from tfopt.rewrite import Log, apply
from tfopt.rules import activations

_OPTIMIZERS = ["pruning", "constfold", "loop", "arithmetic", "dependency", "constfold", "arithmetic", "dependency"]

_NEVER = ("Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond", "Identity", "NoOp", "PlaceholderWithDefault")
# A fake-quantized weight says how the converter is to store it.
_MARKS = (*OPS, "FakeQuantWithMinMaxArgs")
# Without state in TensorFlow's registry, and yet what they give may be another thing tomorrow.
_FOREIGN = ("ReadFile", "MatchingFiles", "PyFuncStateless")
_BEFORE_ACTIVATIONS = ("BiasAdd", "Add", "AddV2", "Conv2D", "DepthwiseConv2dNative")
_OPAQUE = tuple(d.as_datatype_enum for d in (tf.string, tf.resource, tf.variant))


def run(model: Model, log: Log, max_growth_bytes: int = 4096) -> None:
    """Folds constants, in place.

    Args:
      model: the model.
      log: gets what was folded, and what would have grown.
      max_growth_bytes: how much larger a folded value may be than the constants that it makes superfluous.
    """
    while True:
        too_large = _fold_weights(model, log, max_growth_bytes)
        before = model.node_count()
        optimize_in_process(model, _OPTIMIZERS, keep=too_large)  # it would fold up to 100 KiB
        _activations_before_pools(model.graph)
        apply(activations.RULES, model.graph, Log())  # an undoing, not worth a line in the report
        if model.node_count() < before:
            log.applied["node folded by TensorFlow's optimizer"] += before - model.node_count()
        if not take_constant_branches(model, log):
            break


def _activations_before_pools(graph: Graph) -> None:
    """Undoes a move of TensorFlow's optimizer, which tears activations from the kernels of their convolutions.

    It makes pool(relu(x)) relu(pool(x)): fewer values, but one more kernel, and a tensor before the pool whose range
    takes a bit more of an int8.
    """
    for node in [node for node in graph.nodes.values() if node.op in ("Relu", "Relu6")]:
        pool = graph.producer(node.input[0])
        if pool.op != "MaxPool":
            continue
        source, uses = graph.producer(pool.input[0]), [*graph.uses(pool.name), *graph.uses(pool.input[0])]
        bound = any(graph.output_labels(name) for name in (pool.name, source.name))
        control = any(graph.control_inputs(each) for each in (node, pool)) or any(
            port < 0 for _, _, port in graph.uses(node.name)
        )
        if source.op in _BEFORE_ACTIVATIONS and len(uses) == 2 and not bound and not control:
            graph.redirect(node.name, pool.name)
            graph.set_input(node.name, 0, pool.input[0])
            graph.set_input(pool.name, 0, node.name)


def _fold_weights(model: Model, log: Log, max_growth_bytes: int) -> list[str]:
    """Folds in the main body; returns what must not be folded, because the model would grow."""
    graph = model.graph
    refused: set[str] = set()
    while True:
        constant = _constant_nodes(graph, refused)
        frontier = [n for n in constant if constant[n] and _visible(graph, n, constant)]
        if not frontier:
            return sorted(refused)
        cone = Graph([graph.nodes[n] for n in graph.reachable(frontier)], {n: n for n in frontier})
        shapes = infer_shapes(cone)
        growing = [n for n in frontier if _growth(graph, n, constant, shapes) > max_growth_bytes]
        if not growing:
            break
        for name in growing:
            node = graph.nodes[name]
            log.refused["fold constant", name] = f"folding {node.op} would make the model larger"
        refused.update(growing)
    with tf.Graph().as_default() as imported:
        tf.graph_util.import_graph_def(cone.to_graph_def(), name="")
    feeds = {f"{n}:0": graph.weights[n] for n in cone.nodes if n in graph.weights}
    with tf.compat.v1.Session(graph=imported) as session:
        values = session.run({n: f"{n}:0" for n in frontier}, feeds)
    for name, value in values.items():
        graph.set_constant(name, value)
        log.applied["constant expression"] += 1
    graph.sweep()
    return sorted(refused)


def _constant_nodes(graph: Graph, refused: set[str]) -> dict[str, bool]:
    """Nodes whose value is fixed -> whether they compute it (False: a Const or a weight)."""
    constant: dict[str, bool] = {}
    for node in graph.topological():
        if node.name in graph.weights or (node.op == "Const" and not node.input):
            constant[node.name] = False
            continue
        definition = op_def(node.op)
        if (
            node.input
            and node.name not in refused
            and node.op not in _NEVER + _FOREIGN + _MARKS
            and definition is not None
            and not definition.is_stateful
            and len(definition.output_arg) == 1
            and not definition.output_arg[0].number_attr
            and not definition.output_arg[0].type_list_attr
            and all(not ref.startswith("^") and split(ref)[0] in constant for ref in node.input)
        ):
            constant[node.name] = True
    return constant


def _visible(graph: Graph, name: str, constant: dict[str, bool]) -> bool:
    return bool(graph.output_labels(name)) or any(user not in constant for user in graph.users(name))


def _growth(
    graph: Graph, name: str, constant: dict[str, bool], shapes: dict[str, tuple[int | None, ...] | None]
) -> float:
    """Bytes that folding adds: the new value, less the constants that only this expression uses."""
    with_dtype = _static_size(graph, name, shapes)
    if with_dtype is None:
        return float("inf")
    cone = graph.reachable([name])
    freed = 0
    for leaf in cone:
        if constant[leaf]:
            continue
        if all(user in cone for user in graph.users(leaf)):
            value = graph.constant(leaf)
            freed += value.nbytes if value is not None else 0
    return with_dtype - freed


def _static_size(graph: Graph, name: str, shapes: dict[str, Shape]) -> int | None:
    shape = shapes.get(name)
    if shape is None or any(d is None for d in shape):
        return None
    node, definition = graph.nodes[name], op_def(graph.nodes[name].op)
    assert definition is not None
    arg = definition.output_arg[0]
    dtype = node.attr[arg.type_attr].type if arg.type_attr else arg.type
    if dtype in _OPAQUE:
        return None
    return math.prod(d for d in shape if d is not None) * tf.as_dtype(dtype).size


PASS = Pass("fold_constants", run, options={"max_growth_bytes": 4096}, keeps=("sparsity", "clusters"))
