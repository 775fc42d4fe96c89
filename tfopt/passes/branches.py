"""Branches that a constant decides: a functional If or Case becomes a call of the branch taken, which is inlined."""

from __future__ import annotations

import tensorflow as tf
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig

from tfopt.graph import make_node, split
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
    """Takes every branch whose choice is constant, in the main body, nested ones included.

    Args:
      model: edited in place.
      log: gets the number of branches.

    Returns:
      How many were taken.
    """
    total = 0
    while taken := _call_chosen(model):
        _inline(model)
        total += taken
    if total:
        log.applied["branch that a constant decides"] += total
    return total


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
