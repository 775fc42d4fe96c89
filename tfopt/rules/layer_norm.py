"""Layer norm as it is exported, re-associated so that its scale and shift stand last and can move on.

    x * inv + (beta - mean * inv)  with inv = r * gamma   ->   ((x - mean) * r) * gamma + beta

Four full-size ops become two where gamma and beta then fold into what follows. TF2 Keras writes beta - mean * inv,
Keras 3 writes (-mean) * inv + beta, of which TensorFlow's optimizer may add the two products first. tf_keras may also
normalise by a FusedBatchNorm in training mode over reshaped data, with ones and zeros in place of gamma and beta: that
one is a layer norm too, and not a batch norm in training mode.
"""

from __future__ import annotations

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, make_node, split
from tfopt.rewrite import Const, Match, Op, Refused, Rule, check_exclusive
from tfopt.rules.constants import attr

_SCALED = Op("Mul", ("x", "inv"), name="scaled", commutes=True)
_CENTRE = Op("Mul", ("mean", "inv"), name="centre", commutes=True)
_NEGATIVE = Op("Mul", (Op("Neg", ("mean",), name="negative"), "inv"), name="centre", commutes=True)
_SUMS = ("Add", "AddV2")


def _reassociate(match: Match) -> NodeDef:
    graph, root = match.graph, match.root
    if attr(root, "T").type not in (tf.float32.as_datatype_enum, tf.float64.as_datatype_enum):
        raise Refused("half precision: the order of the operations matters")
    dtype = tf.as_dtype(attr(root, "T").type)
    inv = graph.producer(match.refs["inv"])
    gamma, factor = None, match.refs["inv"]
    if inv.op == "Mul" and split(match.refs["inv"])[1] == 0:
        for index, ref in enumerate(graph.data_inputs(inv)):
            if graph.constant(ref) is not None:
                check_exclusive(graph, inv.name, {node.name for node in match.nodes.values()})
                gamma, factor = ref, inv.input[1 - index]
    source = graph.producer(factor)
    while source.op in ("Identity", "Cast"):
        source = graph.producer(source.input[0])
    if source.op not in ("Rsqrt", "RealDiv", "Reciprocal"):
        raise Refused(f"{source.op} {source.name!r} is not the factor of a layer norm")
    hint = root.name
    centred = graph.add_op(f"{hint}/centred", "Sub", [match.refs["x"], match.refs["mean"]], T=dtype)
    last = ["Mul", centred, factor]
    if gamma is not None:
        last = ["Mul", graph.add_op(f"{hint}/normal", "Mul", [centred, factor], T=dtype), gamma]
    if "beta" in match.refs:
        last = ["AddV2", graph.add_op(f"{hint}/scaled", last[0], last[1:], T=dtype), match.refs["beta"]]
    return make_node(root.name, last[0], last[1:], T=dtype)


RULES = (
    Rule(
        "layer norm (TF2 Keras)",
        Op(_SUMS, (_SCALED, Op("Sub", (Const("beta"), _CENTRE), name="rest")), commutes=True),
        _reassociate,
    ),
    Rule(
        "layer norm (Keras 3)",
        Op(_SUMS, (_SCALED, Op(_SUMS, (_NEGATIVE, Const("beta")), name="rest", commutes=True)), commutes=True),
        _reassociate,
    ),
    Rule("layer norm without shift", Op((*_SUMS, "AddN"), (_SCALED, _NEGATIVE), commutes=True), _reassociate),
    Rule("layer norm without shift", Op("Sub", (_SCALED, _CENTRE)), _reassociate),
)


def is_fused_layer_norm(graph: Graph, node: NodeDef) -> bool:
    """Whether a fused batch norm in training mode is the layer norm of tf_keras: unit scale and no shift."""
    scale, offset = graph.data_inputs(node)[1:3]
    return graph.producer(node.input[0]).op == "Reshape" and _is_all(graph, scale, 1) and _is_all(graph, offset, 0)


def _is_all(graph: Graph, ref: str, number: float) -> bool:
    """Whether a reference holds one number everywhere: a constant, or a Fill of a size known only at run time."""
    node = graph.producer(ref)
    if node.op == "Fill":
        ref = node.input[1]
    value = graph.constant(ref)
    return value is not None and bool(np.all(value == number))
