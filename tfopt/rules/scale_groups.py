"""Channels that can be scaled together: what a scale of one layer's result asks of the layers around.

    W2 f(W1 x + b) = (W2 / k) f(k W1 x + k b)     for every f that lets the scale k > 0 of a channel through

Which f do is what the affine rules say (`tfopt.rules.commute`, `tfopt.rules.joins`): not only ReLU, but pools,
reshapes, sums of branches (whose layers then share one k) and the products of attention. A group is found by sending a
scale that differs in every channel through a plan: where a value turns up, that channel is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import join, split
from tfopt.rewrite import Log, Refused
from tfopt.rules.absorb import HANDLERS
from tfopt.rules.coefficients import along, canonical
from tfopt.rules.commute import UNARY
from tfopt.rules.linear import LINEAR_OPS, linear
from tfopt.rules.plan import SCALE, Handler, Plan, search
from tfopt.rules.view import View

# ReLU6 lets a scale through as long as its 6 is not reached, which is for the caller to see to.
THROUGH_RELU6: dict[str, Handler] = {**HANDLERS, "Relu6": UNARY["Relu"]}


@dataclasses.dataclass(frozen=True)
class Edge:
    """The channels of a group in the weights, or in a tensor, of the graph.

    Attributes:
      name: the layer, or the reference of the tensor.
      index: which channel an element belongs to, -1 for none, by broadcasting.
      grows: whether it is multiplied by k; weights that read the channels are divided.
    """

    name: str
    index: np.ndarray
    grows: bool = True

    def largest(self, array: np.ndarray, size: int) -> np.ndarray:
        """The largest element of each channel, 0 at least; `array` has the rank of the index."""
        axes = tuple(a for a in range(array.ndim) if self.index.shape[a] == 1)
        found = np.zeros(size + 1)
        np.maximum.at(found, self.index.ravel(), array.max(axis=axes, initial=0).ravel())
        return found[:size]


@dataclasses.dataclass(frozen=True)
class Group:
    """Channels that can be scaled.

    Attributes:
      layer: the linear op that makes them; `axis` of its result of `rank` holds them.
      size: how many.
      weights: of the layers that change.
      read: the tensors that layers divided by k read.
      clipped: the operands of ReLU6 on the way.
    """

    layer: str
    axis: int
    rank: int
    size: int
    weights: list[Edge]
    read: list[Edge]
    clipped: list[Edge]

    def plan(self, view: View, k: np.ndarray) -> Plan:
        """The plan that scales the channels, ready to be committed.

        Raises:
          Refused: the graph has changed since the group was found.
        """
        return _plan(view, self.layer, along(k, self.axis, self.rank), THROUGH_RELU6)


def find(view: View, log: Log, rule: str, handlers: Mapping[str, Handler] = HANDLERS) -> list[Group]:
    """All groups of a graph, in the order of the computation.

    Args:
      view: the graph.
      log: takes the layers whose results cannot be scaled, and why, as refusals of `rule`.
      rule: for the log.
      handlers: HANDLERS or THROUGH_RELU6.
    """
    groups = []
    reached: set[str] = set()
    for node in view.graph.topological():
        if node.op not in LINEAR_OPS or join(node.name) in reached or linear(view, node) is None:
            continue
        try:
            group, tensors = _group(view, node, handlers)
        except Refused as refusal:
            log.refused[rule, node.name] = str(refusal)
            continue
        groups.append(group)
        reached |= tensors
    return groups


def source_of(view: View, layer: str) -> str:
    """The node of the weights of a linear op."""
    node = view.graph.nodes[layer]
    form = linear(view, node)
    assert form is not None
    return split(node.input[form.w])[0]


def _plan(view: View, layer: str, k: np.ndarray, handlers: Mapping[str, Handler]) -> Plan:
    def start(plan: Plan) -> None:
        plan.units.pop(layer, None)  # no affine node is to vanish
        plan.decide(join(layer), k)

    return search(view, SCALE, layer, handlers, start)


def _group(view: View, node: NodeDef, handlers: Mapping[str, Handler]) -> tuple[Group, set[str]]:
    form, shape = linear(view, node), view.shape(node.name)
    assert form is not None
    if not shape:
        raise Refused("the rank of its result is not known")
    axis = len(shape) - 1 if form.channel is None else form.channel
    size = shape[axis]
    if size is None or size < 2:
        raise Refused("it has one channel, or an unknown number of them")
    codes = np.random.default_rng(0).permutation(np.linspace(1.5, 2.5, size))
    plan = _plan(view, node.name, along(codes, axis, len(shape)), handlers)
    for name in plan.units:
        unit = view.unit(view.graph.nodes[name])
        if unit is not None and unit.scales:
            raise Refused(f"{view.graph.nodes[name].op} {name!r} scales them, and is no layer")
    weights: list[Edge] = []
    read: list[Edge] = []
    for name in plan.linears:
        for user in view.graph.users(source_of(view, name)):
            if user not in plan.linears:
                raise Refused(f"{view.graph.nodes[user].op} {user!r} uses the weights of {name!r} too")
        sides, tensors = _edges(plan, view.graph.nodes[name], codes)
        weights += sides
        read += tensors
    if {edge.grows for edge in weights} != {True, False}:
        raise Refused("no layer follows that could make up for it")
    clipped = [
        Edge(ref, _channels(k, codes)[0])
        for ref, k in plan.factors.items()
        if any(view.graph.nodes[user].op == "Relu6" for user in view.graph.users(split(ref)[0]))
    ]
    return Group(node.name, axis, len(shape), size, weights, read, clipped), set(plan.factors)


def _edges(plan: Plan, node: NodeDef, codes: np.ndarray) -> tuple[list[Edge], list[Edge]]:
    """The sides of a layer's weights that are scaled, and the tensor that it reads if that is scaled."""
    form = linear(plan.view, node)
    assert form is not None
    k_in = None if form.x is None else plan.operand(node, form.x)
    k_out = plan.result(node)
    weights, read = [], []
    if k_out is not None:
        index, inverse = _channels(form.widen_out(k_out), codes)
        weights.append(Edge(node.name, index, not inverse))
    if k_in is not None and form.x is not None:
        index, inverse = _channels(form.widen_in(k_in), codes)
        weights.append(Edge(node.name, index, inverse))
        if not inverse:
            read.append(Edge(join(*split(node.input[form.x])), _channels(k_in, codes)[0]))
    return weights, read


def _channels(k: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, bool]:
    """The channel behind each code, -1 for 1; and whether it is the inverse of the codes that turned up.

    Raises:
      Refused: something else turned up.
    """
    k, order = canonical(k), np.argsort(codes)
    inverse = bool((k < 1).any())
    k = 1 / k if inverse else k
    place = np.clip(np.searchsorted(codes[order], k * (1 - 1e-9)), 0, len(codes) - 1)
    index = np.where(np.abs(k - 1) < 1e-9, -1, order[place])
    if not np.all((index < 0) | (np.abs(codes[index] - k) <= 1e-8)):
        raise Refused("the scale does not arrive unchanged")
    return index, inverse
