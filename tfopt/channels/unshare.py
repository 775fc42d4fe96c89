"""Constants that are equal by chance: zeros that several layers have as their bias are one constant to other passes."""

from __future__ import annotations

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph


def unshare(graph: Graph) -> int:
    """Gives every reader of a constant whose elements are all equal its own copy; returns how many were made."""
    made = 0
    for node in list(graph.nodes.values()):
        value = graph.constant(node.name) if node.op in ("Const", "Placeholder") else None
        if value is None or value.dtype.kind != "f" or value.ndim == 0 or value.size < 2:
            continue
        uses = [use for use in graph.uses(node.name) if use[2] == 0]
        if len(uses) < 2 or not np.all(value == value.flat[0]):
            continue
        for user, index, _ in uses[1:]:
            graph.set_input(user, index, _copy(graph, node, value))
            made += 1
    return made


def _copy(graph: Graph, node: NodeDef, value: np.ndarray) -> str:
    return graph.add_constant(f"{node.name}/own", value)
