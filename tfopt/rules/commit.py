"""Carrying out finished plans: the new constants first, all of them checked, and only then the edits.

W' = W * k_out / k_in is one new constant per weight; the old one dies if nobody else uses it. Where others do (another
signature that computes the same), their plans must be carried out together with this one, so that all go on sharing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from tfopt.graph import Graph, join, split
from tfopt.rewrite import Refused
from tfopt.rules.absorb import affine_of, is_bias
from tfopt.rules.affine import BATCH_NORMS, Unit, is_one
from tfopt.rules.coefficients import stored, times
from tfopt.rules.constants import attr
from tfopt.rules.emit import Edge, Edit, add_bias, check_removable, emit, remove, write
from tfopt.rules.linear import linear, new_weights
from tfopt.rules.plan import SCALE, Plan
from tfopt.rules.view import View

# A shift this much larger than 1 would drown what it is added to, if it were added after a linear op.
MAX_FORWARD_SHIFT = 256.0


class Shared(Refused):
    """Others use the weights too.

    Attributes:
      sources: the nodes of the weights.
    """

    def __init__(self, reason: str, sources: Sequence[str]):
        super().__init__(reason)
        self.sources = list(sources)


def commit(plans: Sequence[Plan], *, allowance: int = 0, same_count: bool = False) -> int:
    """Carries out plans that have run, all or none.

    Args:
      plans: of one view; what they change must not overlap.
      allowance: by how many bytes the constants may grow.
      same_count: whether it is enough that no affine node is added; otherwise each plan must take one away.

    Returns:
      By how many bytes the constants grow.

    Raises:
      Refused: nothing has been edited; the reason is that a constant would lose accuracy, that as many nodes would be
        left as there were, or (`Shared`) that the constants would grow beyond the allowance.
    """
    view = plans[0].view
    _check_disjoint(plans)
    _check_users(plans, allowance)
    written: dict[Edge, np.ndarray] = {}
    edits: list[Edit] = []
    for plan in plans:
        _check_forward_shift(plan)
        written.update(_new_constants(plan))
        edits.extend(_unit_edits(plan, same_count))
    shared, growth = _shared(view, written, allowance)
    weights = [write(view, source, array, edges) for source, arrays in shared.items() for array, edges in arrays]
    for edit in weights + edits:
        edit()
    return growth


def agrees(plan: Plan, other: Plan) -> bool:
    """Whether two plans can be carried out together and need the same values of the constants that they share."""
    try:
        _check_disjoint([plan, other])
        own, others = _new_constants(plan), _new_constants(other)
    except Refused:
        return False
    nodes = plan.graph.nodes
    for (name, index), array in others.items():
        for (at, position), known in own.items():
            if nodes[name].input[index] == nodes[at].input[position] and not np.array_equal(array, known):
                return False
    return True


def _check_disjoint(plans: Sequence[Plan]) -> None:
    seen: set[object] = set()
    for plan in plans:
        touched = {*plan.factors, *plan.units, *plan.linears, *plan.biases, *plan.constants}
        if not touched.isdisjoint(seen):
            raise Refused("it overlaps with what the other users of the weights need")
        seen |= touched


def _check_users(plans: Sequence[Plan], allowance: int) -> None:
    """Refuses early, before anything is computed, where weights have users that no plan changes.

    Raises:
      Shared: at least those would have to be kept beside the new ones.
    """
    graph = plans[0].graph
    edges = {edge for plan in plans for edge in _edges(plan)}
    growth = 0
    sources: dict[str, str] = {}
    for name, index in edges:
        source = split(graph.nodes[name].input[index])[0]
        others = [user for user, i, _ in graph.uses(source) if (user, i) not in edges]
        value = plans[0].view.value(graph.nodes[name].input[index])
        if others and source not in sources and value is not None:
            sources[source] = others[0]
            growth += value.nbytes
    if growth > allowance:
        raise Shared(_grows(graph, next(iter(sources.values())), growth), list(sources))


def _edges(plan: Plan) -> list[Edge]:
    """The constant operands that a plan replaces."""
    forms = [(name, linear(plan.view, plan.graph.nodes[name])) for name in plan.linears]
    return [*plan.constants, *((name, form.w) for name, form in forms if form is not None)]


def _grows(graph: Graph, user: str, growth: int) -> str:
    op = graph.nodes[user].op
    return f"{op} {user!r} uses the weights too: a copy would grow the model by {growth} bytes"


def _new_constants(plan: Plan) -> dict[Edge, np.ndarray]:
    """The new values of constant operands and weights, in their dtype."""
    if plan.written is not None:
        return plan.written
    view, graph = plan.view, plan.graph
    plan.written = written = {}
    for (name, index), k in plan.constants.items():
        old = view.value(graph.nodes[name].input[index])
        assert old is not None
        exact = times(old.astype(np.float64), k) if plan.kind == SCALE else old.astype(np.float64) + k
        written[name, index] = stored(exact, old)
    for name in plan.linears:
        node = graph.nodes[name]
        form = linear(view, node)
        assert form is not None
        old = view.value(node.input[form.w])
        assert old is not None
        k_in, k_out = None if form.x is None else plan.operand(node, form.x), plan.result(node)
        if plan.kind == SCALE:
            exact = new_weights(form, old, k_in, k_out)
        else:
            exact = old.astype(np.float64) + (0.0 if k_out is None else form.widen_out(k_out))
        written[name, form.w] = stored(exact, old)
    return written


def _unit_edits(plan: Plan, same_count: bool) -> list[Edit]:
    """The edits of affine nodes and biases.

    Raises:
      Refused: they would leave more nodes, or as many affine ones.
    """
    view, graph = plan.view, plan.graph
    edits: list[Edit] = []
    before = after = nodes_before = left = 0
    nodes_after = 2 * len(plan.biases)
    for name in plan.units:
        node = graph.nodes[name]
        unit = view.unit(node)
        assert unit is not None
        scale, shift = affine_of(plan, node, unit)
        new = Unit(name, unit.x, scale, shift)
        before, nodes_before = before + _weight(view, unit), nodes_before + _nodes(view, unit, True)
        after, nodes_after = after + _weight(view, new), nodes_after + _nodes(view, new, False)
        left += (1 if is_one(-new.scale) else _weight(view, new)) - min(_weight(view, unit), 1)
        dtype = tf.as_dtype(attr(node, "T").type).as_numpy_dtype
        rounded = [stored(k, _rounded(k, dtype)) for k in (scale, shift)]
        if new.scales or new.shifts:
            edits.append(emit(view, new, *rounded))
        else:
            check_removable(view, name)
            edits.append(remove(view, new))
    if nodes_after > nodes_before or left > 0:
        raise Refused("it would take more nodes than it saves")
    if after >= before and not (same_count and after == before):
        raise Refused("as many affine nodes would be left")
    for name, bias in plan.biases.items():
        dtype = tf.as_dtype(attr(graph.nodes[name], "T").type).as_numpy_dtype
        edits.append(add_bias(view, name, stored(bias, _rounded(bias, dtype))))
    return edits


def _rounded(k: np.ndarray, dtype: type) -> np.ndarray:
    """What the accuracy of a coefficient is judged beside: its own values, in the dtype of the graph."""
    with np.errstate(all="ignore"):
        return k.astype(dtype)


def _shared(
    view: View, written: dict[Edge, np.ndarray], allowance: int
) -> tuple[dict[str, list[tuple[np.ndarray, list[Edge]]]], int]:
    """The distinct new values of each constant with the edges that take them, and the growth in bytes.

    Raises:
      Shared: a constant would have more values than before, because others use the old one or need other values.
    """
    graph = view.graph
    shared: dict[str, list[tuple[np.ndarray, list[Edge]]]] = {}
    for (name, index), array in written.items():
        arrays = shared.setdefault(split(graph.nodes[name].input[index])[0], [])
        for known, edges in arrays:
            if np.array_equal(known, array):
                edges.append((name, index))
                break
        else:
            arrays.append((array, [(name, index)]))
    growth = 0
    sources, users = [], []
    for source, arrays in shared.items():
        others = [user for user, index, _ in graph.uses(source) if (user, index) not in written]
        more = sum(array.nbytes for array, _ in (arrays if others else arrays[1:]))
        if more:
            growth += more
            sources.append(source)
            users.append(others[0] if others else arrays[1][1][0][0])
    if growth > allowance:
        raise Shared(_grows(graph, users[0], growth), sources)
    return shared, growth


def _check_forward_shift(plan: Plan) -> None:
    """Refuses a forward shift so large that x and the shift would cancel only after rounding."""
    if plan.kind == SCALE or join(plan.goal) not in plan.factors:
        return
    unit = plan.view.unit(plan.graph.nodes[plan.goal])
    largest = 0.0 if unit is None else float(np.abs(unit.shift).max())
    if largest > MAX_FORWARD_SHIFT:
        raise Refused(f"the shift (up to {largest:.3g}) would drown what it is added to")


def _weight(view: View, unit: Unit) -> int:
    """How many leftovers a unit counts for."""
    if unit.scales and unit.shifts:
        return 2
    if unit.scales:
        return 1
    return int(unit.shifts and not is_bias(view, unit))


def _nodes(view: View, unit: Unit, before: bool) -> int:
    """How many nodes a unit takes, constants included."""
    if before:
        op = view.graph.nodes[unit.node].op
        return 5 if op in BATCH_NORMS else 1 if op == "Neg" else 2
    if unit.scales and unit.shifts:
        return 2 if is_one(-unit.scale) else 4
    return 2 * int(unit.scales or unit.shifts)
