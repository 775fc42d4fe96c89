"""Branches that a constant decides: a functional If or Case becomes a call of the branch taken, which is inlined.

Of a v1 branch, Switch .. Merge, the side that is never taken goes, and the Switch and the Merge hand on the other.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig

from tfopt.graph import Graph, const_node, join, make_node, split
from tfopt.model import Model
from tfopt.passes import optimize_in_process
from tfopt.rewrite import Log

_BRANCHES = {
    "If": "StatefulPartitionedCall",
    "StatelessIf": "PartitionedCall",
    "Case": "StatefulPartitionedCall",
    "StatelessCase": "PartitionedCall",
}


def take_constant_branches(model: Model, log: Log) -> int:
    """Takes every branch whose choice is constant, in the main body, nested and v1 ones included.

    Args:
      model: edited in place.
      log: gets the number of branches.

    Returns:
      How many were taken.
    """
    total = _take_switches(model.graph)
    while taken := _call_chosen(model):
        _inline(model)
        total += taken
    if total:
        log.applied["branch that a constant decides"] += total
    return total


_BACK_EDGES = ("NextIteration", "RefNextIteration")


def _take_switches(graph: Graph) -> int:
    """Takes out each Switch with a constant predicate, with its dead side; returns how many."""
    decided: dict[str, int] = {}  # Switch -> the port that lives
    alive: dict[str, str] = {}  # Merge -> the one input that lives
    dead: set[str] = set()

    def is_dead(ref: str) -> bool:
        name, port = split(ref)
        return name in dead or (port >= 0 and name in decided and port != decided[name])

    for node in graph.topological():
        inputs = graph.data_inputs(node)
        if node.op == "Merge":
            entries = [ref for ref in inputs if graph.producer(ref).op not in _BACK_EDGES]
            living = [ref for ref in entries if not is_dead(ref)]
            if not living:
                dead.add(node.name)
            elif len(living) == 1 and len(entries) == len(inputs) > 1:
                alive[node.name] = living[0]
            elif len(living) < len(entries):
                return 0  # a switch of several ways
        elif any(map(is_dead, node.input)):
            dead.add(node.name)
        elif node.op == "Switch":
            predicate = graph.constant(inputs[1])
            if predicate is not None and predicate.size == 1:
                decided[node.name] = int(bool(predicate.item()))
    if not decided or any(map(is_dead, [*graph.outputs.values(), *graph.keep])):
        return 0
    for name, ref in alive.items():
        node = graph.nodes[name]
        if any(port == 1 for _, _, port in graph.uses(name)):
            index = np.array(list(node.input).index(ref), np.int32)
            graph.redirect(join(name, 1), graph.add(const_node(graph.unique_name(f"{name}/index"), index)))
        _hand_on(graph, name, ref)
    for name, port in decided.items():
        graph.redirect(join(name, port), name)
        _hand_on(graph, name, graph.nodes[name].input[0])
    graph.sweep()
    return len(decided)


def _hand_on(graph: Graph, name: str, ref: str) -> None:
    node = graph.nodes[name]
    control = [f"^{waited}" for waited in graph.control_inputs(node)]
    graph.replace(make_node(name, "Identity", [ref, *control], T=tf.as_dtype(node.attr["T"].type)))


def _call_chosen(model: Model) -> int:
    """Replaces each node whose choice is constant by a call; returns how many."""
    graph, count = model.graph, 0
    for name, node in list(graph.nodes.items()):
        choice = graph.constant(node.input[0]) if node.op in _BRANCHES else None
        if choice is None or choice.size != 1:
            continue
        if node.op.endswith("If"):
            function = node.attr["then_branch" if choice.item() else "else_branch"].func
        else:
            branches = node.attr["branches"].list.func
            index = int(choice.item())
            function = branches[index if 0 <= index < len(branches) else -1]  # as the op defines it
        call = make_node(name, _BRANCHES[node.op], node.input[1:])
        call.attr["f"].func.CopyFrom(function)
        call.attr["Tin"].CopyFrom(node.attr["Tin"])
        call.attr["Tout"].CopyFrom(node.attr["Tout"])
        graph.replace(call)
        count += 1
    return count


def _inline(model: Model) -> None:
    """Inlines the calls that taking a branch left, in place."""
    graph = model.graph
    # Inlining renames what a call gave; a result that comes straight from a call is held by an Identity meanwhile.
    for label, ref in graph.outputs.items():
        producer = graph.producer(ref)
        if producer.op in _BRANCHES.values():
            dtype = tf.as_dtype(producer.attr["Tout"].list.type[split(ref)[1]])
            graph.outputs[label] = graph.add_op("tfopt_held", "Identity", [ref, f"^{producer.name}"], T=dtype)
    optimize_in_process(model, ["function"], function_optimization=RewriterConfig.AGGRESSIVE)
