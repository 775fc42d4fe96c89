"""Dropout and noise whose rate was fixed at zero for serving.

With u drawn from [0, 1):  u >= 0 is always true;  floor(1 + u) = 1;  0 * z = 0 for a finite draw z. The random op
becomes a Fill with that constant, of a shape that only the input tells. What computes a constant from a Fill is a Fill
again, and then x * 1 = x + 0 = select(true, x, _) = x for a Fill that has the shape of x.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, make_node
from tfopt.rewrite import Const, Log, Match, Op, Refused, Rule, remove_node

_UNIFORM = ("RandomUniform", "StatelessRandomUniform", "StatelessRandomUniformV2")
_NORMAL = ("RandomStandardNormal", "TruncatedNormal", "StatelessRandomNormal", "StatelessRandomNormalV2")


def _fill(match: Match, value: np.ndarray) -> NodeDef:
    """A Fill of the shape that the random op was given."""
    graph, shape = match.graph, match.nodes["noise"].input[0]
    constant = graph.add_constant(f"{match.root.name}/value", value)
    fill = make_node(match.root.name, "Fill", [shape, constant], T=tf.as_dtype(value.dtype))
    index_type = match.nodes["noise"].attr["T" if "T" in match.nodes["noise"].attr else "Tshape"].type
    fill.attr["index_type"].type = index_type or tf.int32.as_datatype_enum
    return fill


def _require(match: Match, wanted: float) -> None:
    value = match.value("constant")
    if value.size != 1 or float(value.reshape(())) != wanted:
        raise Refused(f"{match.root.name!r} is dropout or noise that is active at serving time")


def _always_kept(match: Match) -> NodeDef:
    _require(match, 0.0)
    return _fill(match, np.array(True))


def _keep_probability_one(match: Match) -> NodeDef:
    _require(match, 1.0)
    return _fill(match, np.array(1, tf.as_dtype(match.root.attr["T"].type).as_numpy_dtype))


def _no_noise(match: Match) -> NodeDef:
    _require(match, 0.0)
    return _fill(match, np.array(0, tf.as_dtype(match.root.attr["T"].type).as_numpy_dtype))


_ADDS = ("Add", "AddV2")
# tf.random.normal and tf.random.truncated_normal multiply and add also where the deviation is 1 and the mean 0.
_SCALED = Op("Mul", (Op(_NORMAL, name="noise"), Const("deviation")), name="scaled", commutes=True)
_SHIFTED = Op(_ADDS, (_SCALED, Const("mean")), name="shifted", commutes=True)

RULES = (
    Rule("dropout at rate 0", Op("GreaterEqual", (Op(_UNIFORM, name="noise"), Const("constant"))), _always_kept),
    Rule(
        "dropout that keeps all",
        Op("Floor", (Op(_ADDS, (Op(_UNIFORM, name="noise"), Const("constant")), name="sum", commutes=True),)),
        _keep_probability_one,
    ),
    Rule(
        "noise of deviation 0",
        Op("Mul", (Op(_NORMAL, name="noise"), Const("constant")), commutes=True),
        _no_noise,
    ),
    Rule("noise of deviation 0", Op("Mul", (_SHIFTED, Const("constant")), commutes=True), _no_noise),
)

_BINARY = {"Mul": np.multiply, "Add": np.add, "AddV2": np.add, "Sub": np.subtract}
_NEUTRAL = {"Mul": 1, "Add": 0, "AddV2": 0, "Sub": 0}


def take_out_fills(graph: Graph, log: Log) -> int:
    """Computes with constants that fill the shape of a tensor, and takes out what they leave as it is, in place.

    Args:
      graph: the body.
      log: gets what was taken out, and what control edges hold.

    Returns:
      The number of changes.
    """
    fills = [node.name for node in graph.nodes.values() if node.op == "Fill"]
    changed = 0
    while fills:
        name = fills.pop()
        value = graph.constant(graph.nodes[name].input[1]) if name in graph.nodes else None
        if value is None:
            continue
        for user, index, port in graph.uses(name):
            if port != 0 or user not in graph.nodes or graph.nodes[user].op == "Fill":
                continue
            result = _filled(graph, graph.nodes[user], index, value)
            same = _unchanged(graph, graph.nodes[user], name, index, value)
            if result is not None:
                constant = graph.add_constant(f"{user}/value", result)
                fill = make_node(user, "Fill", [graph.nodes[name].input[0], constant], T=tf.as_dtype(result.dtype))
                fill.attr["index_type"].CopyFrom(graph.nodes[name].attr["index_type"])
                fill.input.extend(f"^{waited}" for waited in graph.control_inputs(graph.nodes[user]))
                graph.replace(fill)
                fills.append(user)
            elif same is not None:
                try:
                    remove_node(graph, user, same)
                except Refused as refusal:
                    log.refused["inactive dropout or noise", user] = str(refusal)
                    continue
            else:
                continue
            log.applied["inactive dropout or noise"] += 1
            changed += 1
    return changed


def _filled(graph: Graph, node: NodeDef, index: int, value: np.ndarray) -> np.ndarray | None:
    """The scalar that a node fills the same shape with, where its other input is a scalar constant."""
    if node.op == "Cast":
        return value.astype(tf.as_dtype(node.attr["DstT"].type).as_numpy_dtype)
    if node.op not in _BINARY:
        return None
    other = graph.constant(node.input[1 - index])
    if other is None or other.ndim:
        return None
    return _BINARY[node.op](*((value, other) if index == 0 else (other, value))).astype(value.dtype)


def _unchanged(graph: Graph, node: NodeDef, fill: str, index: int, value: np.ndarray) -> str | None:
    """The input that a node gives back, where the Fill is neutral and has that input's shape."""
    shape = graph.producer(graph.nodes[fill].input[0])
    if shape.op != "Shape":
        return None
    if node.op in ("Select", "SelectV2") and index == 0 and node.input[1 if value else 2] == shape.input[0]:
        other = graph.constant(node.input[2 if value else 1])  # must not make the result larger
        return shape.input[0] if node.op == "Select" or (other is not None and not other.ndim) else None
    if node.op in _NEUTRAL and value == _NEUTRAL[node.op] and node.input[1 - index] == shape.input[0]:
        return None if node.op == "Sub" and index == 0 else shape.input[0]
    return None
