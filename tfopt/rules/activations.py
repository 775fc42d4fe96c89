"""Constants that are part of an activation, and stay: runtimes fuse the activation only while it looks like this.

    GELU        0.5 * x * erfc(-x * sqrt(1/2)),  0.5 * x * (1 + erf(x * sqrt(1/2))),
                0.5 * x * (1 + tanh(sqrt(2/pi) * (x + 0.044715 * x^3)))
    hard swish  x * relu6(x + 3) * (1/6)

TensorFlow Lite has no Erf or Erfc: it runs the exact GELU only when its converter recognises it. Moving one of these
constants into a neighbouring layer would save a node here and lose the kernel there.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, make_node
from tfopt.rewrite import Const, Match, Op, Refused, Rule

GELU = "part of a GELU, which runtimes fuse"
HARD_SWISH = "part of a hard swish, which runtimes fuse"
_SUMS, _PRODUCTS = ("Add", "AddV2"), ("Mul", "RealDiv", "Div")


def protected(graph: Graph) -> dict[str, str]:
    """Node -> why its constants stay."""
    found: dict[str, str] = {}
    for node in graph.nodes.values():
        if node.op == "Erfc":
            found.update(_gelu_by_erfc(graph, node))
        elif node.op in ("Erf", "Tanh"):
            found.update(_gelu(graph, node))
        elif node.op == "Relu6":
            found.update(_hard_swish(graph, node))
    return found


def _number(graph: Graph, node: NodeDef) -> float | None:
    """The one number that a node adds or multiplies by; None where there is none."""
    for ref in graph.data_inputs(node):
        value = graph.constant(ref)
        if value is not None and value.size == 1 and value.dtype.kind == "f":
            return float(np.ravel(value)[0])
    return None


def _constant_nodes(graph: Graph, names: Iterable[str], ops: tuple[str, ...]) -> list[NodeDef]:
    nodes = (graph.nodes[name] for name in names)
    return [node for node in nodes if node.op in ops and _number(graph, node) is not None]


def _producers(graph: Graph, node: NodeDef) -> list[str]:
    return [graph.producer(ref).name for ref in graph.data_inputs(node)]


def _gelu_by_erfc(graph: Graph, curve: NodeDef) -> dict[str, str]:
    inner = graph.producer(curve.input[0])
    parts, seen = {}, [inner]
    for _ in range(2):  # the negation may stand before or after the factor, or have been folded into it
        if seen[-1].op == "Neg" or _constant_nodes(graph, [seen[-1].name], _PRODUCTS):
            parts[seen[-1].name] = GELU
            varying = [ref for ref in graph.data_inputs(seen[-1]) if graph.constant(ref) is None]
            seen.append(graph.producer(varying[0]))
    for name in graph.users(curve.name):
        near = [name, *_producers(graph, graph.nodes[name]), *graph.users(name)]
        parts.update((n.name, GELU) for n in _constant_nodes(graph, near, ("Mul",)) if _number(graph, n) == 0.5)
    return parts if len(parts) > 1 else {}


def _gelu(graph: Graph, curve: NodeDef) -> dict[str, str]:
    plus_one = [n for n in _constant_nodes(graph, graph.users(curve.name), _SUMS) if _number(graph, n) == 1.0]
    if len(plus_one) != 1:
        return {}
    parts = [plus_one[0].name]
    inner = _constant_nodes(graph, _producers(graph, curve), _PRODUCTS)
    if not inner:
        return {}
    parts.append(inner[0].name)
    if curve.op == "Tanh":
        # x + 0.044715 * x^3 stands before the inner factor.
        sums = [graph.nodes[name] for name in _producers(graph, inner[0]) if graph.nodes[name].op in _SUMS]
        cubes = [n for s in sums for n in _constant_nodes(graph, _producers(graph, s), ("Mul",))]
        cubes = [n for n in cubes if abs((_number(graph, n) or 0) - 0.044715) < 1e-4]
        if not cubes:
            return {}
        parts.append(cubes[0].name)
    for name in graph.users(plus_one[0].name):
        halves = _constant_nodes(graph, [name, *_producers(graph, graph.nodes[name]), *graph.users(name)], ("Mul",))
        parts += [n.name for n in halves if _number(graph, n) == 0.5]
    return dict.fromkeys(parts, GELU)


def _hard_swish(graph: Graph, relu6: NodeDef) -> dict[str, str]:
    plus = _constant_nodes(graph, _producers(graph, relu6), _SUMS)
    if len(plus) != 1 or _number(graph, plus[0]) != 3.0:
        return {}
    x = [ref for ref in graph.data_inputs(plus[0]) if graph.constant(ref) is None]
    parts = {plus[0].name}
    meets_x = False
    front = [relu6.name]
    for _ in range(2):  # the division by 6 may stand before or after the product with x, or on x itself
        users = [graph.nodes[user] for name in front for user in graph.users(name)]
        front = [user.name for user in users if user.op in _PRODUCTS]
        for user in users:
            if user.op not in _PRODUCTS:
                continue
            others = [user.name, *_producers(graph, user)]
            parts.update(n.name for n in _constant_nodes(graph, others, _PRODUCTS) if _is_sixth(_number(graph, n)))
            sources = set(graph.data_inputs(user))
            for name in _producers(graph, user):
                sources.update(graph.data_inputs(graph.nodes[name]) if name in parts else ())
            meets_x = meets_x or x[0] in sources
    return dict.fromkeys(parts, HARD_SWISH) if meets_x else {}


def _is_sixth(number: float | None) -> bool:
    return number is not None and min(abs(number - 1 / 6), abs(number - 6)) < 1e-4


def _gated(match: Match) -> NodeDef:
    """(x / 6) * relu6(y + 3) -> x * (relu6(y + 3) / 6), where x is y"""
    number = match.value("sixth")
    if match.refs["x"] != match.refs["y"] or number.size != 1 or not _is_sixth(float(number.flat[0])):
        raise Refused("it is no hard swish")
    dtype, gate = tf.as_dtype(match.root.attr["T"].type), match.nodes["gate"].name
    name = match.graph.unique_name(f"{gate}/sixth")
    sixth = match.graph.add(make_node(name, "Mul", [gate, match.refs["sixth"]], T=dtype))
    return make_node(match.root.name, "Mul", [match.refs["x"], sixth], T=dtype)


# TensorFlow's optimizer moves the constant to x, where the converter of TensorFlow Lite does not see a hard swish.
RULES = (
    Rule(
        "hard swish as converters know it",
        Op(
            "Mul",
            (
                Op("Mul", ("x", Const("sixth")), name="scaled", commutes=True),
                Op("Relu6", (Op(_SUMS, ("y", Const("three")), name="sum", commutes=True),), name="gate"),
            ),
            commutes=True,
        ),
        _gated,
    ),
)
