"""Dropout and noise whose rate was fixed at zero for serving.

With u drawn from [0, 1):  u >= 0 is always true;  floor(1 + u) = 1;  0 * z = 0 for a finite draw z. What multiplies,
selects or adds these is folded afterwards like any other constant.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import make_node
from tfopt.rewrite import Const, Match, Op, Refused, Rule

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
)
