"""merge_duplicates: computes once what several nodes compute: same op, inputs and attributes, or equal constants."""

from __future__ import annotations

import hashlib

import numpy as np
from tensorflow.core.framework.function_pb2 import FunctionDef
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, called_functions, op_def, split
from tfopt.model import Model
from tfopt.passes import INVARIANTS, Pass, for_each_body, rename_calls
from tfopt.rewrite import Log, Refused, remove_node

_COMMUTE = ("Add", "AddV2", "Mul", "Maximum", "Minimum", "LogicalAnd", "LogicalOr", "Equal", "NotEqual")
_NEVER = ("Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond", "NoOp", "Placeholder")


def run(model: Model, log: Log) -> None:
    """Merges duplicates in the main body and in every function, in place."""
    _share_inputs(model, log)
    _merge_functions(model, log)
    for_each_body(model, lambda graph: _merge(graph, log))


def _share_inputs(model: Model, log: Log) -> None:
    """Lets signatures feed one Placeholder where they have an input of one name, dtype and shape.

    A call feeds the inputs of one signature, so the others' do not matter; and only then is what two signatures compute
    in the same way, as those of a Keras export do, the same node.
    """
    graph = model.graph
    shared: dict[tuple, str] = {}
    for signature in model.signatures.values():
        taken: set[str] = set()
        for name, info in sorted(signature.inputs.items()):
            if info.WhichOneof("encoding") != "name" or not info.name.endswith(":0"):
                continue
            node = graph.producer(info.name)
            key = (name, node.op, tuple(node.input), *(v.SerializeToString() for _, v in sorted(node.attr.items())))
            kept = shared.setdefault(key, node.name)
            if kept != node.name and kept not in taken and not graph.control_inputs(node):
                graph.redirect(node.name, kept)
                graph.redirect_control(node.name, [kept])
                info.name = f"{kept}:0"
                log.applied["input shared by signatures"] += 1
            taken.add(kept)
    fed = {split(info.name)[0] for s in model.signatures.values() for info in s.inputs.values()}
    composite = any(i.WhichOneof("encoding") != "name" for s in model.signatures.values() for i in s.inputs.values())
    if not composite:
        for name in [name for name in graph.arguments if name not in fed and not graph.users(name)]:
            graph.arguments.remove(name)
            graph.remove(name)


def _merge_functions(model: Model, log: Log) -> None:
    """Points calls of functions that differ in name alone to the first of them; callees are merged before callers."""
    while True:
        first: dict[bytes, str] = {}
        same: dict[str, str] = {}
        for name in model.called():
            body = FunctionDef()
            body.CopyFrom(model.functions[name])
            body.signature.name = ""
            kept = first.setdefault(body.SerializeToString(deterministic=True), name)
            if kept != name:
                same[name] = kept
        if not same:
            return
        log.applied["duplicate function"] += len(same)
        rename_calls(model.graph.nodes.values(), same)
        for name in model.called():
            if any(callee in same for node in model.functions[name].node_def for callee in called_functions(node)):
                model.functions[name] = FunctionDef.FromString(model.functions[name].SerializeToString())
                rename_calls(model.functions[name].node_def, same)
        model.functions = {name: model.functions[name] for name in model.called()}


def _merge(graph: Graph, log: Log) -> int:
    first: dict[tuple, str] = {}
    count = 0
    for node in graph.topological():
        if node.name in graph.arguments or node.name in graph.keep:
            continue
        key = _key(graph, node)
        if key is None:
            continue
        kept = first.setdefault(key, node.name)
        if kept == node.name:
            continue
        outputs = {port for _, _, port in graph.uses(node.name) if port > 0}
        outputs |= {split(ref)[1] for ref in graph.outputs.values() if split(ref)[0] == node.name} - {0}
        try:
            remove_node(graph, node.name, kept)
        except Refused as refusal:
            log.refused["duplicate", node.name] = str(refusal)
            continue
        for port in outputs:
            graph.redirect(f"{node.name}:{port}", f"{kept}:{port}")
        log.applied["duplicate weight" if node.name in graph.weights else f"duplicate {node.op}"] += 1
        graph.remove(node.name)
        count += 1
    return count


def _key(graph: Graph, node: NodeDef) -> tuple | None:
    """What two nodes must share to be one; None for a node that must stay itself."""
    name, op = node.name, node.op
    if name in graph.weights:
        return ("weight", *_fingerprint(graph.weights[name]))
    definition = op_def(op)
    if op in _NEVER or definition is None or definition.is_stateful or definition.allows_uninitialized_input:
        return None
    inputs = list(node.input)
    if op in _COMMUTE:
        inputs = sorted(inputs[:2]) + inputs[2:]
    attrs = node.attr
    return (
        op,
        tuple(inputs),
        tuple((key, attrs[key].SerializeToString(deterministic=True)) for key in sorted(attrs) if key[0] != "_"),
    )


def _fingerprint(array: np.ndarray) -> tuple:
    digest = hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()
    return array.dtype.name, array.shape, digest


PASS = Pass("merge_duplicates", run, keeps=INVARIANTS)
