"""Where an affine ends: linear ops with constant weights, and other affine nodes.

    scale   conv: W' = W * k_out / k_in            s * x + t with s != 1: s' = s * k_out / k_in, t' = t * k_out
    shift   conv: bias = t_out - W(t_in)           s * x + t with t != 0: t' = t + t_out - s * t_in

An affine node that has no constant of the kind in question lets it through instead, so that none is added.
"""

from __future__ import annotations

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import split
from tfopt.rewrite import Refused
from tfopt.rules.affine import AFFINE_OPS, Unit, is_one, is_zero, shifted, trains
from tfopt.rules.coefficients import canonical, divide, same, times, vector_of
from tfopt.rules.commute import BIAS_PASSES, UNARY
from tfopt.rules.joins import JOINS, SUM, matrix_product, multiply
from tfopt.rules.linear import GATHERS, LINEAR_OPS, PRODUCTS, Linear, linear
from tfopt.rules.loops import LOOPS
from tfopt.rules.plan import SCALE, Handler, Plan, ratio
from tfopt.rules.view import View


def _linear(plan: Plan, node: NodeDef) -> None:
    form = linear(plan.view, node)
    if form is None:
        if node.op in PRODUCTS:
            matrix_product(plan, node)
            return
        raise Refused("its weights are not constant")
    k_in = None if form.x is None else plan.operand(node, form.x)
    k_out = plan.result(node)
    if plan.kind == SCALE:
        if k_in is not None:
            form.widen_in(k_in)
        if k_out is not None:
            form.widen_out(k_out)
        plan.linears[node.name] = None
    elif form.x is None:
        plan.linears[node.name] = None
    else:
        _shift_linear(plan, node, form, k_in, k_out)


def _shift_linear(plan: Plan, node: NodeDef, form: Linear, t_in: np.ndarray | None, t_out: np.ndarray | None) -> None:
    bias = np.zeros(()) if t_out is None else t_out
    if t_in is not None:
        weights = plan.view.value(node.input[form.w])
        assert weights is not None
        added = form.of_shift(weights, t_in)
        if t_out is None and bias_after(plan.view, node) is not None:
            plan.give_result(node, added)
            return
        bias = canonical(bias - added)
        if t_out is not None and np.all(np.abs(bias) <= 1e-9 * (np.abs(t_out) + np.abs(added))):
            bias = np.zeros(())
    plan.biases.pop(node.name, None)
    if is_zero(bias):
        return
    for user, _, _ in plan.graph.uses(node.name):
        unit = plan.view.unit(plan.graph.nodes[user])
        if unit is not None and unit.shifts and not unit.scales and user != plan.goal:
            raise Refused(f"it has a bias already, {user!r}")
    if form.channel is not None:
        vector_of(bias, form.channel, bias.size)
    else:
        form.widen_out(bias)
    plan.biases[node.name] = bias


def bias_after(view: View, node: NodeDef) -> str | None:
    """The affine node that takes a shift of a linear op's result, where nothing else sees that result."""
    name = node.name
    results = {split(ref)[0] for ref in view.graph.outputs.values()}
    for _ in range(8):
        users = [user for user in view.graph.users(name) if view.graph.nodes[user].op not in ("Shape", "Size", "Rank")]
        if len(users) != 1 or name in results:
            return None
        user = view.graph.nodes[users[0]]
        unit = view.unit(user)
        if unit is not None and unit.shifts:
            return user.name
        if unit is None and user.op not in BIAS_PASSES:
            return None
        name = user.name
    return None


def is_bias(view: View, unit: Unit) -> bool:
    """Whether a unit is the one bias of a linear op: a shift alone, right after it or after what only reshapes."""
    if unit.scales or not unit.shifts:
        return False
    ref = unit.x
    for _ in range(8):
        node = view.graph.producer(ref)
        if node.op in LINEAR_OPS:
            return node.op not in GATHERS and linear(view, node) is not None
        if node.op not in BIAS_PASSES:
            return False
        ref = node.input[0]
    return False


def _affine(plan: Plan, node: NodeDef) -> None:
    unit = plan.view.unit(node)
    if unit is None:
        if node.op == "Mul" or node.op in ("RealDiv", "Div"):
            multiply(plan, node)
        elif node.op in ("Add", "AddV2", "Sub"):
            SUM(plan, node)
        elif trains(node):
            raise Refused("it normalises by its own batch")
        else:
            raise Refused("its constants are not known")
        return
    index = next(i for i, ref in enumerate(node.input) if ref == unit.x)
    k_in, k_out = plan.operand(node, index), plan.result(node)
    plan.units[node.name] = None
    if node.name == plan.goal:
        _check_goal(plan, unit, k_in, k_out)
    elif plan.kind == SCALE:
        if not unit.scales:
            _pass(plan, node, index, k_in, k_out, np.ones(()))
    elif not unit.shifts:
        _pass(plan, node, index, k_in, k_out, unit.scale)


def _pass(
    plan: Plan, node: NodeDef, index: int, k_in: np.ndarray | None, k_out: np.ndarray | None, factor: np.ndarray
) -> None:
    """The result's coefficient is the operand's times a factor."""
    if k_in is not None:
        plan.give_result(node, canonical(times(k_in, factor)))
    elif k_out is not None:
        plan.give_operand(node, index, canonical(divide(k_out, factor)))


def _check_goal(plan: Plan, unit: Unit, k_in: np.ndarray | None, k_out: np.ndarray | None) -> None:
    """The node that shall vanish must still do so when the plan has come back to it by another way."""
    one = np.ones(())
    if plan.kind == SCALE:
        vanishes = same(ratio(k_in, k_out), unit.scale) or same(ratio(k_out, k_in), divide(one, unit.scale))
    else:
        zero = np.zeros(())
        t_in, t_out = zero if k_in is None else k_in, zero if k_out is None else k_out
        left = shifted(unit, t_in, t_out)
        vanishes = bool(np.all(np.abs(left) <= 1e-9 * (np.abs(unit.shift) + np.abs(t_out))))
    if not vanishes:
        raise Refused("two ways that it would have to go disagree")


def without_noise(k: np.ndarray, reference: np.ndarray, identity: float) -> np.ndarray:
    """Snaps what is the identity up to rounding to the identity itself."""
    with np.errstate(invalid="ignore"):
        near = np.abs(k - identity) <= 1e-12 * np.maximum(1.0, np.abs(reference))
    return canonical(np.where(near, identity, k))


def affine_of(plan: Plan, node: NodeDef, unit: Unit) -> tuple[np.ndarray, np.ndarray]:
    """(scale, shift) of a unit under a finished plan."""
    index = next(i for i, ref in enumerate(node.input) if ref == unit.x)
    k_in, k_out = plan.operand(node, index), plan.result(node)
    if plan.kind == SCALE:
        one = np.ones(())
        shift = unit.shift if k_out is None else canonical(times(unit.shift, k_out))
        if node.name == plan.goal:
            return one, shift
        scale = canonical(times(unit.scale, ratio(k_out, k_in)))
        return (one if is_one(scale) else without_noise(scale, one, 1.0)), shift
    if node.name == plan.goal:
        return unit.scale, np.zeros(())
    zero = np.zeros(())
    shift = shifted(unit, zero if k_in is None else k_in, zero if k_out is None else k_out)
    return unit.scale, without_noise(shift, unit.shift, 0.0)


HANDLERS: dict[str, Handler] = {
    **UNARY,
    **JOINS,
    **LOOPS,
    **dict.fromkeys(LINEAR_OPS, _linear),
    **dict.fromkeys(AFFINE_OPS, _affine),
}
