"""merge_duplicates: computes once what several nodes compute: same op, inputs and attributes, or equal constants."""

from __future__ import annotations

import hashlib

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, op_def, split
from tfopt.model import Model
from tfopt.passes import Pass, for_each_body
from tfopt.rewrite import Log, Refused, remove_node

_COMMUTE = ("Add", "AddV2", "Mul", "Maximum", "Minimum", "LogicalAnd", "LogicalOr", "Equal", "NotEqual")
_NEVER = ("Switch", "Merge", "Enter", "Exit", "NextIteration", "LoopCond", "NoOp", "Placeholder", "TensorListReserve")


def run(model: Model, log: Log) -> None:
    """Merges duplicates in the main body and in every function, in place."""
    for_each_body(model, lambda graph: _merge(graph, log))


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
        graph.remove(node.name)
        log.applied["duplicate weight" if node.name in graph.weights else f"duplicate {node.op}"] += 1
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


PASS = Pass("merge_duplicates", run)
