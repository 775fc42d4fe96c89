"""The kernels of a model: which of its trainable weights are multiplied by what varies, by which ops, in which layout.

y[o] = sum_i W[i, o] x[i]       a dense layer, a convolution (i: places and input channels), a loop's own product
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from tfopt.fake_quant import OPS
from tfopt.graph import Graph, function_body
from tfopt.model import Model
from tfopt.pruning.sparsity import Layout
from tfopt.rewrite import Refused
from tfopt.rules.channels import CALLS, CONVOLUTIONS, PRODUCTS, summed_axes

CONVOLUTION, DENSE, DEPTHWISE, EMBEDDING = "convolution", "dense", "depthwise", "embedding"
_MOVES = ("Reshape", "Transpose", "Squeeze", "ExpandDims")
_LOOKUPS = ("Gather", "GatherV2", "ResourceGather")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight that is multiplied.

    Attributes:
      name: of the weight.
      kind: CONVOLUTION, DENSE (any matrix product), DEPTHWISE or EMBEDDING (looked up, and perhaps multiplied too).
      nodes: the ops that read it, of the main graph.
      layout: where its inputs are.
      first, last: whether no other linear op comes before one of them, or after.
    """

    name: str
    kind: str
    nodes: tuple[str, ...]
    layout: Layout
    first: bool = False
    last: bool = False


@dataclasses.dataclass(frozen=True)
class _Reader:
    node: str  # of the main graph
    op: str
    layout: Layout


def kernels(model: Model, names: Iterable[str]) -> list[Kernel]:
    """Finds the kernels among weights.

    Args:
      model: where they are weights already, as after `promote`.
      names: the weights.

    Returns:
      Those of two axes or more that a matrix product, a convolution or a lookup reads, in the order of the computation.
    """
    graph = model.graph
    found: dict[str, list[_Reader]] = {}
    for name in names:
        if graph.weights[name].ndim > 1:
            readers = list(_readers(model, graph, name, graph.weights[name].ndim, True))
            if readers:
                found[name] = readers
    linear = {reader.node for readers in found.values() for reader in readers if reader.op not in _LOOKUPS}
    order = {node.name: position for position, node in enumerate(graph.topological())}
    before = {node: (graph.reachable([node]) & linear) - {node} for node in linear}
    followed = set().union(*before.values()) if before else set()
    made = []
    for name, readers in sorted(found.items(), key=lambda item: min(order[reader.node] for reader in item[1])):
        layouts = {reader.layout for reader in readers}
        nodes = tuple(dict.fromkeys(reader.node for reader in readers))
        made.append(
            Kernel(
                name,
                _kind({reader.op for reader in readers}),
                nodes,
                layouts.pop() if len(layouts) == 1 else Layout(None),
                first=any(node in linear and not before[node] for node in nodes),
                last=any(node in linear and node not in followed for node in nodes),
            )
        )
    return made


def _kind(ops: set[str]) -> str:
    if ops & set(_LOOKUPS):
        return EMBEDDING
    if "DepthwiseConv2dNative" in ops:
        return DEPTHWISE
    return CONVOLUTION if ops & set(CONVOLUTIONS) else DENSE


def _readers(model: Model, graph: Graph, name: str, rank: int, direct: bool) -> Iterator[_Reader]:
    """The linear ops that read a weight, or what is the same but for its shape."""
    for user, index, port in graph.uses(name):
        node = graph.nodes[user]
        if port != 0:
            continue
        if (node.op in CONVOLUTIONS and index == 1) or (node.op in PRODUCTS and index < 2):
            try:
                layout = Layout(summed_axes(graph, node, index, rank) if direct else None)
            except Refused:
                layout = Layout(None)
            yield _Reader(user, node.op, layout)
        elif node.op in _LOOKUPS and index == 0:
            yield _Reader(user, node.op, Layout(tuple(range(1, rank)) if direct else None))
        elif node.op == "Identity" or (node.op in OPS and index == 0):
            yield from _readers(model, graph, user, rank, direct)
        elif node.op in _MOVES and index == 0:
            yield from _readers(model, graph, user, rank, False)
        elif node.op in CALLS:
            for body, argument in _bodies(model, graph, user, index):
                for reader in _readers(model, body, argument, rank, direct):
                    yield dataclasses.replace(reader, node=user)


def _bodies(model: Model, graph: Graph, user: str, index: int) -> Iterator[tuple[Graph, str]]:
    """The bodies that a node calls, each with the argument that operand `index` becomes."""
    node = graph.nodes[user]
    index -= 0 if node.op.endswith("While") else 1
    for key in ("body", "then_branch", "else_branch", "branches"):
        if key not in node.attr or index < 0:
            continue
        attr = node.attr[key]
        for function in [attr.func.name] if attr.HasField("func") else [f.name for f in attr.list.func]:
            try:
                body = function_body(model.functions[function], model.functions)
            except (ValueError, KeyError):
                continue  # a polymorphic function
            yield body, body.arguments[index]
