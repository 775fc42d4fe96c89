"""Products of two operands as einsums: which axes of one are which of the other, and of the result.

MatMul      ik, kj -> ij          BatchMatMul   Abik, Abkj -> Abij          Einsum   as its equation says
"""

from __future__ import annotations

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Shape
from tfopt.rewrite import Refused
from tfopt.rules.coefficients import varying
from tfopt.rules.constants import attr
from tfopt.rules.view import View


def product_labels(view: View, node: NodeDef) -> tuple[str, str, str] | None:
    """A product of two operands as an einsum: the labels of both and of the result, one per axis.

    None where a rank is unknown, or an operand repeats a label. An axis of size 1 that is broadcast has a label of its
    own, which does not appear in the result.
    """
    refs = view.graph.data_inputs(node)
    if len(refs) != 2:
        return None
    shapes = [view.shape(ref) for ref in refs]
    if node.op == "MatMul":
        a = "ki" if attr(node, "transpose_a").b else "ik"
        b = "jk" if attr(node, "transpose_b").b else "kj"
        return a, b, "ij"
    if node.op == "Einsum":
        return _einsum_labels(attr(node, "equation").s.decode(), shapes)
    if shapes[0] is None or shapes[1] is None:
        return None
    a = "ki" if attr(node, "adj_x").b else "ik"
    b = "jk" if attr(node, "adj_y").b else "kj"
    batch = max(len(shapes[0]), len(shapes[1])) - 2
    names, alone = "ABCDEFGH"[:batch], "nopqrstu"
    labels = []
    for shape, other, tail in ((shapes[0], shapes[1], a), (shapes[1], shapes[0], b)):
        axes = ""
        for axis in range(-len(shape), -2):
            broadcast = shape[axis] == 1 and len(other) >= -axis and other[axis] != 1
            axes += (alone if broadcast else names)[batch + axis + 2]
        labels.append(axes + tail)
    return labels[0], labels[1], names + "ij"


def _einsum_labels(equation: str, shapes: list[Shape]) -> tuple[str, str, str] | None:
    left, arrow, out = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    if not arrow or len(operands) != 2:
        return None
    if "..." in equation:
        ranks = []
        for labels, shape in zip(operands, shapes, strict=True):
            if "..." in labels and shape is None:
                return None
            ranks.append(len(shape) - len(labels.replace("...", "")) if "..." in labels and shape is not None else 0)
        free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation][: max(ranks)]
        if sum(rank > 0 for rank in ranks) > 1:
            return None  # the two may broadcast against each other
        operands = [labels.replace("...", "".join(free)) for labels in operands]
        out = out.replace("...", "".join(free))
    if any(len(set(labels)) != len(labels) for labels in (*operands, out)):
        return None
    return operands[0], operands[1], out


def relabelled(k: np.ndarray, source: str, target: str) -> np.ndarray:
    """A coefficient over the axes `source` as an array over the axes `target`.

    Raises:
      Refused: it varies along an axis that the target does not have.
    """
    if k.ndim == 0:
        return k
    if k.ndim != len(source):
        raise Refused("its rank is not that of the operand")
    axes = varying(k)
    if any(source[axis] not in target for axis in axes):
        raise Refused("it varies along an axis that the weights do not have")
    order = sorted(axes, key=lambda axis: target.index(source[axis]))
    sizes = {source[axis]: k.shape[axis] for axis in axes}
    rest = tuple(axis for axis in range(k.ndim) if axis not in axes)
    return np.transpose(k, (*order, *rest)).reshape([sizes.get(label, 1) for label in target])
