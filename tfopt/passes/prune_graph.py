"""prune_graph: removes what serving does not need.

Ops that hand their input on, checks and prints, dropout and noise at rate zero, control
edges from what has no effect, nodes that reach no result, functions that nothing calls.
"""

from __future__ import annotations

from tensorflow.core.framework.function_pb2 import FunctionDef

from tfopt.graph import Graph, called_functions, op_def, split
from tfopt.model import Model
from tfopt.passes import INVARIANTS, Pass, for_each_body
from tfopt.rewrite import Log, apply, has_effect
from tfopt.rules import identities, noise

_STATELESS = {
    "If": "StatelessIf",
    "While": "StatelessWhile",
    "Case": "StatelessCase",
    "StatefulPartitionedCall": "PartitionedCall",
}

_ROUNDS = 8
_RULES = (*identities.RULES, *noise.RULES)
_SWITCHES = ("Switch", "RefSwitch", "Merge", "RefMerge", "Enter", "Exit", "NextIteration", "LoopCond")


def run(model: Model, log: Log) -> None:
    """Prunes the main body and every function, in place."""

    library: dict[str, FunctionDef] = {}

    def prune(graph: Graph) -> int:
        changed = _mark_stateless(graph, library, log)
        changed += _drop_control_edges(graph, log)
        changed += apply(_RULES, graph, log)
        changed += _split_identity_n(graph, log)
        changed += noise.take_out_fills(graph, log)
        changed += _drop_control_edges(graph, log)
        removed = graph.sweep()
        if removed:
            log.applied["unreachable node"] += removed
        return changed + removed

    for _ in range(_ROUNDS):  # a body that lost its last effect lets its callers lose theirs
        library.update((function.signature.name, function) for function in model.library())
        if not for_each_body(model, prune) or not model.functions:
            break
    if model.init and not model.graph.nodes[model.init].input:
        model.graph.keep.remove(model.init)
        model.init = None
        model.graph.sweep()


def _mark_stateless(graph: Graph, library: dict[str, FunctionDef], log: Log) -> int:
    """Control flow whose functions hold no stateful op is itself stateless, and says so."""
    count = 0
    for node in graph.nodes.values():
        if node.op in _STATELESS and not any(_is_stateful(name, library) for name in called_functions(node)):
            node.op = _STATELESS[node.op]
            count += 1
    if count:
        log.applied["control flow without state"] += count
    return count


def _is_stateful(function: str, library: dict[str, FunctionDef]) -> bool:
    for node in library[function].node_def:
        definition = op_def(node.op)
        if node.op in library or definition is None:
            return True
        if definition.is_stateful and node.op not in _STATELESS:
            return True
        if any(_is_stateful(name, library) for name in called_functions(node)):
            return True
    return False


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
    if graph.is_body:  # what a function runs for its effect alone
        kept_nodes = [name for name in graph.keep if name in effects]
        count += len(graph.keep) - len(kept_nodes)
        graph.keep = kept_nodes
    if count:
        log.applied["control edge without effect"] += count
    return count


PASS = Pass("prune_graph", run, keeps=INVARIANTS)
