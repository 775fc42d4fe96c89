"""Residual blocks: sums y = x + f(x), which go on without f as y = x."""

from __future__ import annotations

import dataclasses

from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.channels.spread import Spread
from tfopt.graph import Graph, join, split
from tfopt.rewrite import has_effect

_SUMS = ("Add", "AddV2", "AddN")


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block.

    Attributes:
      name: the node of its sum.
      entry: reference of x.
      branch: reference of f(x).
      shape: of both, at batch 1.
      products: the linear ops of f.
    """

    name: str
    entry: str
    branch: str
    shape: tuple[int | None, ...]
    products: tuple[str, ...]

    def skip(self, graph: Graph) -> None:
        """Takes f out of a graph, in place; what only f needed is left to a sweep."""
        graph.redirect(self.name, self.entry)


def find(spread: Spread) -> list[Block]:
    """The residual blocks of a graph with linear ops in f, in the order of the computation; they may be nested."""
    graph = spread.graph
    linear = {product.node for product in spread.products}
    blocks = []
    for node in graph.topological():
        refs = [join(*split(ref)) for ref in graph.data_inputs(node)]
        if node.op not in _SUMS or len(refs) != 2:
            continue
        shape = spread.shape(node.name)
        for entry, branch in (refs, refs[::-1]):
            inside = _between(spread, entry, branch)
            products = tuple(name for name in inside if name in linear)
            if shape is not None and products and shape == spread.shape(entry) == spread.shape(branch):
                blocks.append(Block(node.name, entry, branch, shape, products))
                break
    return blocks


def _between(spread: Spread, entry: str, branch: str) -> list[str]:
    """The nodes that compute `branch` from `entry` and constants; none where it needs anything else."""
    graph, found = spread.graph, dict.fromkeys([split(branch)[0]])
    stack = list(found)
    if split(entry)[0] == stack[0]:
        return []
    while stack:
        node = graph.nodes[stack.pop()]
        if _source(graph, node):
            return []
        for ref in graph.data_inputs(node):
            name = split(ref)[0]
            if join(*split(ref)) != entry and name not in found and spread.varies(ref):
                found[name] = None
                stack.append(name)
    return list(found)


def _source(graph: Graph, node: NodeDef) -> bool:
    return not graph.data_inputs(node) or has_effect(node)
