"""Ops with several operands or results that an affine passes.

k * (a + b) = k * a + k * b       (a + b) + t = (a + t) + b       k * (a * b) = (k * a) * b
k * concat(a, b) = concat(k_a * a, k_b * b), with the parts of k; split the same way round
k * max(a, b) = max(k * a, k * b) for k >= 0, and max(a, b) + t = max(a + t, b + t)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.rewrite import Refused
from tfopt.rules.coefficients import canonical, divide, dropped, lifted, same, times
from tfopt.rules.commute import ints
from tfopt.rules.constants import attr
from tfopt.rules.labels import product_labels, relabelled
from tfopt.rules.plan import SCALE, SHIFT, Handler, Plan

Move = Callable[[int, np.ndarray], np.ndarray]  # (operand, coefficient) -> coefficient on the other side


def _lift(plan: Plan, node: NodeDef) -> Move:
    return lambda index, k: lifted(k, plan.view.rank(node.name))


def _drop(plan: Plan, node: NodeDef) -> Move:
    return lambda index, k: dropped(k, plan.view.shape(node.input[index]))


def _operands(plan: Plan, node: NodeDef) -> list[int]:
    return list(range(len(plan.graph.data_inputs(node))))


def _ordered(plan: Plan, node: NodeDef, indices: Sequence[int]) -> list[int]:
    """Operands in the order in which they are tried: constants first, they never refuse."""
    return sorted(indices, key=lambda index: not plan.is_constant(node.input[index]))


# -- all alike -------------------------------------------------------------------------------------------------------


def _alike(plan: Plan, node: NodeDef, indices: Sequence[int]) -> None:
    """The result and all operands have one coefficient."""
    up, down = _lift(plan, node), _drop(plan, node)
    if plan.result(node) is None:
        known = [index for index in indices if plan.operand(node, index) is not None]
        if not known:
            return
        k = plan.operand(node, known[0])
        assert k is not None
        plan.give_result(node, up(known[0], k))
    k = plan.result(node)
    assert k is not None
    for index in indices:
        value = plan.view.value(node.input[index])
        if not (plan.kind == SCALE and value is not None and not value.any()):
            plan.give_operand(node, index, down(index, k))


def _extremum(plan: Plan, node: NodeDef) -> None:
    for k in (plan.result(node), plan.operand(node, 0), plan.operand(node, 1)):
        if plan.kind == SCALE and k is not None and (k < 0).any():
            raise Refused(f"the scale is negative in {int((k < 0).sum())} of {k.size} channels")
    _alike(plan, node, (0, 1))


def _select(plan: Plan, node: NodeDef) -> None:
    _alike(plan, node, (1, 2))


# -- sums ------------------------------------------------------------------------------------------------------------


def _sum(plan: Plan, node: NodeDef) -> None:
    """A scale goes to all terms; a shift of the result is the sum of the terms' shifts, so one of them takes it."""
    terms = _operands(plan, node)
    if plan.kind == SCALE:
        _alike(plan, node, terms)
        return
    up, down = _lift(plan, node), _drop(plan, node)
    signs = [-1.0 if node.op == "Sub" and index == 1 else 1.0 for index in terms]
    total = np.zeros(())
    open_terms = []
    for index in terms:
        t = plan.operand(node, index)
        if t is None:
            open_terms.append(index)
        else:
            total = canonical(total + signs[index] * up(index, t))
    t_out = plan.result(node)
    if t_out is None:
        plan.give_result(node, total)
        return
    rest = canonical(t_out - total)
    if _close(t_out, total):
        return
    _one_takes(plan, node, open_terms, lambda index: signs[index] * down(index, rest))


def _one_takes(plan: Plan, node: NodeDef, indices: Sequence[int], share: Callable[[int], np.ndarray]) -> None:
    """One of the open operands takes what the result needs."""
    if not indices:
        raise Refused("two ways that it would have to go disagree")
    ordered = _ordered(plan, node, indices)
    index = ordered[min(plan.choose(node, len(ordered)), len(ordered) - 1)] if len(ordered) > 1 else ordered[0]
    plan.give_operand(node, index, share(index))


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.all(np.abs(a - b) <= 1e-9 * (np.abs(a) + np.abs(b))))


# -- products --------------------------------------------------------------------------------------------------------


def _product(plan: Plan, node: NodeDef, up: Move, down: Move, divides: bool = False) -> None:
    """k_out = k_a * k_b (or k_a / k_b): where the result is decided first, one operand takes it."""
    if plan.kind == SHIFT:
        raise Refused("a shift does not pass a product")
    first, second = plan.operand(node, 0), plan.operand(node, 1)
    total = np.ones(()) if first is None else up(0, first)
    if second is not None:
        total = canonical((divide if divides else times)(total, up(1, second)))
    k_out = plan.result(node)
    if k_out is None:
        plan.give_result(node, total)
        return
    if same(total, k_out):
        return
    if node.input[0] == node.input[1]:
        raise Refused("both its operands are the same")
    rest = canonical(divide(k_out, total))
    open_operands = [index for index, k in enumerate((first, second)) if k is None]
    one = np.ones(())
    _one_takes(plan, node, open_operands, lambda index: down(index, divide(one, rest) if divides and index else rest))


def multiply(plan: Plan, node: NodeDef) -> None:
    """Mul, RealDiv of two tensors, or of a tensor and a constant that enlarges it."""
    _product(plan, node, _lift(plan, node), _drop(plan, node), node.op != "Mul")


def _squared_difference(plan: Plan, node: NodeDef) -> None:
    """(k * a - k * b)^2 = k^2 * (a - b)^2, and (a + t) - (b + t) = a - b."""
    first, second = plan.operand(node, 0), plan.operand(node, 1)
    k = first if first is not None else second
    if k is None:
        raise Refused(f"a {plan.kind} does not pass back through the square of a difference")
    index = 0 if first is not None else 1
    wide = _lift(plan, node)(index, k)
    if plan.kind == SCALE:
        plan.give_result(node, times(wide, wide))
    elif plan.result(node) is not None:
        raise Refused("a shift does not pass a square")
    plan.give_operand(node, 1 - index, _drop(plan, node)(1 - index, wide))


def matrix_product(plan: Plan, node: NodeDef) -> None:
    """A product of two varying matrices: a scale passes unless it varies along the axis that is summed over."""
    if len(plan.graph.data_inputs(node)) != 2:
        raise Refused("it is not a product of two")
    labels = product_labels(plan.view, node)

    def up(index: int, k: np.ndarray) -> np.ndarray:
        if labels is None and k.ndim:
            raise Refused("the ranks of its operands are not known")
        return canonical(relabelled(k, labels[index], labels[2])) if labels is not None else k

    def down(index: int, k: np.ndarray) -> np.ndarray:
        if labels is None and k.ndim:
            raise Refused("the ranks of its operands are not known")
        return canonical(relabelled(k, labels[2], labels[index])) if labels is not None else k

    _product(plan, node, up, down)


# -- parts -----------------------------------------------------------------------------------------------------------


def _parts(plan: Plan, node: NodeDef, axis: int, whole: np.ndarray, sizes: Sequence[int | None]) -> list[np.ndarray]:
    """The coefficient of a whole, cut along an axis."""
    if whole.ndim == 0 or whole.shape[axis] == 1:
        return [whole] * len(sizes)
    if any(size is None for size in sizes):
        raise Refused("the sizes of its parts are not known")
    return [canonical(part) for part in np.split(whole, np.cumsum(sizes)[:-1].astype(int), axis)]  # type: ignore[arg-type]


def _whole(
    plan: Plan, rank: int | None, axis: int, parts: Sequence[np.ndarray | None], sizes: Sequence[int | None]
) -> np.ndarray:
    """The coefficient of a whole from those of its parts, of which the open ones stay as they are."""
    known = [plan.identity if part is None else part for part in parts]
    if all(same(part, known[0]) for part in known) and (known[0].ndim == 0 or known[0].shape[axis] == 1):
        return known[0]
    if rank is None or any(size is None for size in sizes):
        raise Refused("the sizes of its parts are not known")
    full = [part.reshape((1,) * rank) if part.ndim == 0 else part for part in known]
    others = np.broadcast_shapes(*(tuple(n for a, n in enumerate(part.shape) if a != axis) for part in full))
    wide = [
        np.broadcast_to(part, (*others[:axis], size, *others[axis:])) for part, size in zip(full, sizes, strict=True)
    ]
    return canonical(np.concatenate(wide, axis))


def _size(plan: Plan, ref: str, axis: int) -> int | None:
    shape = plan.view.shape(ref)
    return None if shape is None else shape[axis]


def _join(plan: Plan, node: NodeDef) -> None:
    """Concat: the parts of a coefficient go to the operands."""
    indices = _operands(plan, node)
    at = indices.pop(0) if node.op == "Concat" else indices.pop()
    axis, rank = _axis(plan, ints(plan.view, node.input[at]), plan.view.rank(node.name))
    sizes = [_size(plan, node.input[index], axis) for index in indices]
    whole = plan.result(node)
    if whole is None:
        plan.give_result(node, _whole(plan, rank, axis, [plan.operand(node, i) for i in indices], sizes))
        return
    for index, part in zip(indices, _parts(plan, node, axis, whole, sizes), strict=True):
        plan.give_operand(node, index, part)


def _pack(plan: Plan, node: NodeDef) -> None:
    axis, rank = _axis(plan, [attr(node, "axis").i], plan.view.rank(node.name))
    indices = _operands(plan, node)
    whole = plan.result(node)
    if whole is None:
        parts = [_widened(plan.operand(node, index), axis) for index in indices]
        plan.give_result(node, _whole(plan, rank, axis, parts, [1] * len(indices)))
        return
    for index, part in zip(indices, _parts(plan, node, axis, whole, [1] * len(indices)), strict=True):
        plan.give_operand(node, index, part if part.ndim == 0 else np.squeeze(part, axis))


def _split(plan: Plan, node: NodeDef) -> None:
    """Split: the other way round; results that nobody decided stay as they are."""
    at = {"Split": 1, "SplitV": 0, "Unpack": 0}[node.op]
    refs = plan.graph.data_inputs(node)
    where = {"Split": 0, "SplitV": 2}
    value = ints(plan.view, refs[where[node.op]]) if node.op in where else [attr(node, "axis").i]
    axis, rank = _axis(plan, value, plan.view.rank(refs[at]))
    count = attr(node, "num" if node.op == "Unpack" else "num_split").i
    unpack = node.op == "Unpack"
    names = [node.name if port == 0 else f"{node.name}:{port}" for port in range(count)]
    sizes = [1 if unpack else _size(plan, name, axis) for name in names]
    whole = plan.operand(node, at)
    if whole is None:
        parts = [plan.result(node, port) for port in range(count)]
        plan.give_operand(
            node, at, _whole(plan, rank, axis, [_widened(p, axis) for p in parts] if unpack else parts, sizes)
        )
        whole = plan.operand(node, at)
    for port, part in enumerate(_parts(plan, node, axis, plan.identity if whole is None else whole, sizes)):
        plan.give_result(node, np.squeeze(part, axis) if unpack and part.ndim else part, port)


def _widened(k: np.ndarray | None, axis: int) -> np.ndarray | None:
    return k if k is None or k.ndim == 0 else np.expand_dims(k, axis)


def _axis(plan: Plan, value: list[int] | None, rank: int | None) -> tuple[int, int | None]:
    if value is None or len(value) != 1:
        raise Refused("its axis is not known")
    if value[0] < 0 and rank is None:
        raise Refused("its rank is not known")
    return (value[0] % rank if rank is not None else value[0]), rank


JOINS: dict[str, Handler] = {
    **dict.fromkeys(("Concat", "ConcatV2"), _join),
    "Pack": _pack,
    **dict.fromkeys(("Split", "SplitV", "Unpack"), _split),
    **dict.fromkeys(("Maximum", "Minimum"), _extremum),
    **dict.fromkeys(("Select", "SelectV2"), _select),
    "AddN": _sum,
    "DivNoNan": multiply,
    "SquaredDifference": _squared_difference,
}

# Handlers of tensors for ops that are affine units where one operand is constant.
SUM = _sum
