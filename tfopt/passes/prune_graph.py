"""prune_graph: removes what serving does not need.

Ops that hand their input on, checks and prints, dropout and noise at rate zero, branches that a constant decides,
control edges from what has no effect, nodes that reach no result, functions that nothing calls.
"""

from __future__ import annotations

import tensorflow as tf
from tensorflow.core.protobuf.rewriter_config_pb2 import RewriterConfig

from tfopt.graph import Graph, make_node, split
from tfopt.model import Model
from tfopt.passes import Pass, for_each_body, optimize_in_process
from tfopt.rewrite import Log, apply, has_effect
from tfopt.rules import identities, noise

_RULES = (*identities.RULES, *noise.RULES)
_SWITCHES = ("Switch", "RefSwitch", "Merge", "RefMerge", "Enter", "Exit", "NextIteration", "LoopCond")
_BRANCHES = {"If": "StatefulPartitionedCall", "StatelessIf": "PartitionedCall"}


def run(model: Model, log: Log) -> None:
    """Prunes the main body and every function, in place."""
    if _take_constant_branches(model, log):
        _inline(model)

    def prune(graph: Graph) -> int:
        changed = _drop_control_edges(graph, log)
        changed += apply(_RULES, graph, log)
        changed += _split_identity_n(graph, log)
        changed += _drop_control_edges(graph, log)
        removed = graph.sweep()
        if removed:
            log.applied["unreachable node"] += removed
        return changed + removed

    for_each_body(model, prune)
    if model.init and not model.graph.nodes[model.init].input:
        model.graph.keep.remove(model.init)
        model.init = None
        model.graph.sweep()


def _split_identity_n(graph: Graph, log: Log) -> int:
    """IdentityN hands each input on by itself."""
    count = 0
    for name, node in list(graph.nodes.items()):
        if node.op != "IdentityN" or name in graph.keep or graph.control_inputs(node):
            continue
        if any(port == -1 for _, _, port in graph.uses(name)):
            log.refused["IdentityN", name] = "has control edges"
            continue
        for port, ref in enumerate(list(node.input)):
            graph.redirect(f"{name}:{port}" if port else name, ref)
        graph.remove(name)
        log.applied["IdentityN"] += 1
        count += 1
    return count


def _drop_control_edges(graph: Graph, log: Log) -> int:
    """Drops control edges from nodes that neither do anything visible nor depend on anything that does."""
    effects: set[str] = set()
    for node in graph.topological():
        if has_effect(node) or node.op in _SWITCHES or (any(split(ref)[0] in effects for ref in node.input)):
            effects.add(node.name)
    count = 0
    for name, node in graph.nodes.items():
        kept = [ref for ref in node.input if not ref.startswith("^") or ref[1:] in effects]
        if len(kept) != len(node.input):
            count += len(node.input) - len(kept)
            graph.set_inputs(name, kept)
    if count:
        log.applied["control edge without effect"] += count
    return count


def _take_constant_branches(model: Model, log: Log) -> int:
    """Replaces a functional If whose predicate is constant by a call of the branch that it takes."""
    graph, count = model.graph, 0
    for name, node in list(graph.nodes.items()):
        if node.op not in _BRANCHES:
            continue
        predicate = _constant_predicate(graph, node.input[0])
        if predicate is None:
            continue
        call = make_node(name, _BRANCHES[node.op], node.input[1:])
        call.attr["f"].func.CopyFrom(node.attr["then_branch" if predicate else "else_branch"].func)
        call.attr["Tin"].CopyFrom(node.attr["Tin"])
        call.attr["Tout"].CopyFrom(node.attr["Tout"])
        graph.replace(call)
        log.applied["branch that a constant decides"] += 1
        count += 1
    return count


def _constant_predicate(graph: Graph, ref: str) -> bool | None:
    """The truth of a predicate, seen through Identity, defaults that nobody feeds, and LogicalNot."""
    negate = False
    while True:
        value = graph.constant(ref)
        if value is not None:
            return bool(value.reshape(-1)[0]) != negate if value.size == 1 else None
        node = graph.producer(ref)
        if node.op == "LogicalNot":
            negate = not negate
        elif node.name in graph.arguments or node.op not in ("Identity", "PlaceholderWithDefault", "StopGradient"):
            return None
        ref = node.input[0]


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


PASS = Pass("prune_graph", run)
