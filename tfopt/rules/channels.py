"""Which axes of a constant operand a linear op sums over; what is left are its output channels, each with a scale.

    y[o] = sum_i W[i, o] x[i] = s[o] * sum_i Q[i, o] x[i]      with W = s Q

A lookup sums over nothing, and gives whole rows: a scale belongs to a row.
"""

from __future__ import annotations

import re

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.errors import TfoptError
from tfopt.graph import Graph
from tfopt.rewrite import Refused

CONVOLUTIONS = ("Conv2D", "Conv3D", "DepthwiseConv2dNative", "Conv2DBackpropInput", "Conv3DBackpropInputV2")
PRODUCTS = ("MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3", "Einsum")
LOOKUPS = ("GatherV2",)
CALLS = ("While", "StatelessWhile", "If", "StatelessIf", "Case", "StatelessCase")


def summed_axes(graph: Graph, node: NodeDef, index: int, rank: int) -> tuple[int, ...]:
    """The axes of operand `index` of a node that share one scale for each output channel.

    Args:
      graph: the node's.
      node: the op that reads the constant.
      index: which operand the constant is.
      rank: of the constant.

    Raises:
      Refused: the op is not linear in this operand.
    """
    last, before = rank - 1, rank - 2
    if rank < 2:
        raise Refused("it has one axis, and so no output channels")
    if node.op in CONVOLUTIONS and index == 1:
        if node.op.startswith("Conv") and "Backprop" in node.op:
            return (*range(rank - 2), last)  # [.., out, in]
        return tuple(range(rank - 2)) if node.op == "DepthwiseConv2dNative" else tuple(range(rank - 1))
    if node.op in PRODUCTS[:-1] and index in (0, 1):
        transposed = node.attr[
            ("transpose_a", "transpose_b")[index] if node.op == "MatMul" else ("adj_x", "adj_y")[index]
        ]
        return (last if (index == 1) == transposed.b else before,)
    if node.op == "Einsum" and "..." not in node.attr["equation"].s.decode():
        sources, _, target = node.attr["equation"].s.decode().replace(" ", "").partition("->")
        labels = sources.split(",")[index]
        axes = tuple(axis for axis, label in enumerate(labels) if label not in target)
        if axes:
            return axes
    if node.op in LOOKUPS and index == 0:
        axis = graph.constant(node.input[2])
        if axis is not None and int(axis) == 0 and not node.attr["batch_dims"].i:
            return tuple(range(1, rank))
    if node.op in CALLS:
        return tuple(range(rank - 1))  # a kernel of a recurrent layer: any axis is right, the last is its channels
    raise Refused(f"{node.op} {node.name!r} reads it otherwise than a product, a convolution or a lookup does")


def kept(graph: Graph, technique: str, pattern: str) -> set[str]:
    """Names of the nodes that an owner wants to keep as they are.

    Args:
      graph: the main body.
      technique: name of the pass, for the error.
      pattern: regular expression that matches a node from the start, by its op or its name; empty matches none.

    Raises:
      TfoptError: it is no regular expression, or matches nothing.
    """
    if not pattern:
        return set()
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise TfoptError(f"{technique}: keep_float32={pattern!r} is no regular expression: {error}") from error
    found = {node.name for node in graph.nodes.values() if wanted.match(node.op) or wanted.match(node.name)}
    if not found:
        raise TfoptError(f"{technique}: keep_float32={pattern!r} matches no op and no node")
    return found


def scales(weight: np.ndarray, axes: tuple[int, ...], levels: int) -> np.ndarray:
    """max|W| over `axes` / levels, in the rank of W; 1 where all is zero."""
    largest = np.max(np.abs(weight), axis=axes, keepdims=True)
    return (np.where(largest > 0, largest, levels) / levels).astype(np.float32)
