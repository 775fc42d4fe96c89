"""Activations written as several ops that TensorFlow Lite runs as one, and the ops that it fuses into a kernel.

    GELU        0.5 * x * erfc(-x * sqrt(1/2)),  0.5 * x * (1 + erf(x * sqrt(1/2))),  and by tanh
    hard swish  x * relu6(x + 3) * (1/6)
    layer norm  (x - mean(x)) / sqrt(var(x) + eps) * gamma + beta

A tensor inside of one is never a tensor of the .tflite file.
"""

from __future__ import annotations

from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, split

_ELEMENTWISE = frozenset(("Mul", "AddV2", "Add", "Sub", "Neg", "RealDiv", "Div", "Pow", "Square", "Erf", "Erfc"))
_DEPTH = 8  # ops on the longest way through one of these


def region(graph: Graph, marker: str) -> tuple[str, set[str]] | None:
    """The smallest composite activation y = f(x) around its characteristic op, which uses x at least twice.

    Args:
      graph: the body.
      marker: an Erf, Erfc, Tanh or Relu6 node.

    Returns:
      The node that gives y, and all other nodes of the composite; None where there is no such composite.
    """
    sources = [marker]  # what it is computed from, the nearest first
    for name in sources:
        if name == marker or (graph.nodes[name].op in _ELEMENTWISE and len(sources) < 2 * _DEPTH):
            producers = dict.fromkeys(split(ref)[0] for ref in _varying(graph, graph.nodes[name]))
            sources += [producer for producer in producers if producer not in sources]
    ends, inside = [marker], {marker}
    while len(ends) < _DEPTH:
        users = graph.users(ends[-1])
        if len(users) != 1 or graph.nodes[users[0]].op not in _ELEMENTWISE or graph.output_labels(ends[-1]):
            return None
        ends.append(users[0])
        if graph.nodes[users[0]].op != "Mul":  # x and its gate meet in a product
            continue
        for x in sources[1:]:
            found = _between(graph, x, users[0])
            if found and inside <= found:
                return users[0], found - {users[0]}
    return None


def _between(graph: Graph, x: str, end: str) -> set[str] | None:
    """The nodes that compute `end` from `x` alone, if nothing else reads them and `x` is used more than once."""
    found, stack, uses = {end}, [end], 0
    while stack:
        node = graph.nodes[stack.pop()]
        for ref in _varying(graph, node):
            name = split(ref)[0]
            if name == x:
                uses += 1
            elif name not in found:
                if graph.nodes[name].op not in _ELEMENTWISE | {"Relu6", "Tanh"} or len(found) > 2 * _DEPTH:
                    return None
                found.add(name)
                stack.append(name)
    closed = all(set(graph.users(name)) <= found and not graph.output_labels(name) for name in found - {end})
    return found if closed and uses > 1 else None


def layer_norms(graph: Graph) -> set[str]:
    """The nodes of all normalisations by a computed variance, whose values span too many magnitudes for 8 bits."""
    found: set[str] = set()
    for node in graph.nodes.values():
        if node.op not in ("Rsqrt", "Sqrt"):
            continue
        inner = _back_to_mean(graph, node.name)
        if inner is None:
            continue
        x, inside = inner
        pending = list(inside)
        while pending:
            for user in graph.users(pending.pop()):
                known = all(split(ref)[0] in inside | {x} for ref in _varying(graph, graph.nodes[user]))
                if user not in inside and known and graph.nodes[user].op in _ELEMENTWISE | {"Neg", "Reciprocal"}:
                    inside.add(user)
                    pending.append(user)
        found |= inside
    return found


def _back_to_mean(graph: Graph, root: str) -> tuple[str, set[str]] | None:
    """The tensor that is normalised, and the nodes from it to the root of its variance."""
    inside, stack, means = {root}, [root], []
    while stack:
        name = stack.pop()
        node = graph.nodes[name]
        if node.op == "Mean":
            means.append(split(node.input[0])[0])
        if len(inside) > 2 * _DEPTH or node.op not in _ELEMENTWISE | {"Mean", "SquaredDifference", "Rsqrt", "Sqrt"}:
            return None
        for ref in _varying(graph, node):
            producer = graph.nodes[split(ref)[0]]
            deeper = producer.op in ("Mean", "SquaredDifference", "Square") or node.op in ("Rsqrt", "Sqrt")
            deeper = deeper or (producer.op == "Sub" and node.op in ("Square", "Mul"))
            if deeper and producer.name not in inside:
                inside.add(producer.name)
                stack.append(producer.name)
    sources = {split(ref)[0] for name in inside for ref in _varying(graph, graph.nodes[name])} - inside
    return (sources.pop(), inside) if len(means) >= 2 and len(sources) == 1 else None


def _varying(graph: Graph, node: NodeDef) -> list[str]:
    return [ref for ref in graph.data_inputs(node) if graph.constant(ref) is None]
