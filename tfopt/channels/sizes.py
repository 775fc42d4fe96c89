"""Sizes that stand in the graph: targets of reshapes, bounds of slices, sizes of results.

They are constants, packed of constants and of what is computed at run time, or joined of such pieces. What is computed
follows the tensors by itself; what is constant is written anew, for one node at a time, as others may read it too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.channels.spread import Kept, Spread
from tfopt.graph import Graph, join, make_node, split


def writable(graph: Graph, ref: str, position: int) -> bool:
    """Whether entry `position` of a vector of sizes can be written, or follows the tensors by itself."""
    if graph.constant(ref) is not None:
        return True
    node = graph.producer(ref)
    if node.op == "Pack":
        return True
    if node.op == "ConcatV2":
        piece, inner = _piece(graph, node, position)
        return piece is not None and writable(graph, graph.data_inputs(node)[piece], inner)
    return node.op == "Shape"


def resize(s: Spread, node: NodeDef, index: int, axes: Mapping[int, np.ndarray]) -> None:
    """Asks for entries of an operand to be written when channels go: entry -> the axis whose size it is."""
    name = node.name

    def cut(kept: Kept) -> None:
        sizes = {position: int(kept(axis).sum()) for position, axis in axes.items() if not kept(axis).all()}
        if sizes:
            rewrite(s.graph, name, index, sizes)

    s.cuts.append(cut)


def rewrite(graph: Graph, name: str, index: int, sizes: Mapping[int, int]) -> None:
    """Writes entries of an operand of a node; those that are -1 stay so."""
    graph.set_input(name, index, _written(graph, graph.nodes[name].input[index], sizes))


def _written(graph: Graph, ref: str, sizes: Mapping[int, int]) -> str:
    value = graph.constant(ref)
    hint = f"{split(ref)[0]}/cut"
    if value is not None:
        value = np.array(value)
        for position, size in sizes.items():
            if value.reshape(-1)[position] != -1:
                value.reshape(-1)[position] = size
        return graph.add_constant(hint, value)
    node = graph.producer(ref)
    if node.op not in ("Pack", "ConcatV2"):
        return ref
    copy = make_node(graph.unique_name(hint), node.op, node.input)
    for key, attr in node.attr.items():
        copy.attr[key].CopyFrom(attr)
    graph.add(copy)
    for position, size in sizes.items():
        at, inner = (position, 0) if node.op == "Pack" else _piece(graph, node, position)
        assert at is not None
        graph.set_input(copy.name, at, _written(graph, copy.input[at], {inner: size}))
    return join(copy.name)


def _piece(graph: Graph, node: NodeDef, position: int) -> tuple[int | None, int]:
    """The operand of a concatenation that holds an entry, and which one of it that is."""
    for index, ref in enumerate(graph.data_inputs(node)[:-1]):
        value, producer = graph.constant(ref), graph.producer(ref)
        if value is None and producer.op == "Pack":
            size = producer.attr["N"].i
        elif value is None:
            return None, 0
        else:
            size = value.size
        if position < size:
            return index, position
        position -= size
    return None, 0
