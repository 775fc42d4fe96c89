"""A recurrent layer absorbs an affine of its input: the loop reads one step, and multiplies it by weights from outside.

    W(k * x_t) = W'(x_t)              W' = W / k, the operand of the While that the body passes on unchanged
    W(x_t + t) + b = W(x_t) + b'      b' = b + W(t), an operand likewise

Only operands of the While are written anew; its body stays as it is. TensorListFromTensor makes the list of steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import Graph, join, split
from tfopt.rewrite import Refused
from tfopt.rules.coefficients import along, canonical, divide, vector_of
from tfopt.rules.constants import attr
from tfopt.rules.plan import SCALE, Handler, Plan
from tfopt.rules.view import View

_LOOPS = ("While", "StatelessWhile")


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product in a loop body: operand indices of its weights and of the bias after it, and whether it transposes."""

    weights: int
    bias: int | None
    transposed: bool


def _list(plan: Plan, node: NodeDef) -> None:
    """TensorListFromTensor: the first axis is time, the last one holds the channels."""
    k = plan.operand(node, 0)
    if k is None or plan.result(node) is not None:
        raise Refused(f"a {plan.kind} does not pass back out of a list")
    uses = plan.graph.uses(node.name)
    if len(uses) != 1 or plan.graph.nodes[uses[0][0]].op not in _LOOPS:
        raise Refused("its list is used otherwise than by one loop")
    loop = plan.graph.nodes[uses[0][0]]
    shape = plan.view.shape(node.input[0])
    if shape is None or shape[-1] is None:
        raise Refused("the size of its steps is not known")
    vector = vector_of(k, len(shape) - 1, shape[-1])
    for product in _products(plan.view, loop, uses[0][1]):
        weights = plan.view.value(loop.input[product.weights])
        if weights is None or weights.ndim != 2:
            raise Refused(f"the weights of loop {loop.name!r} are not constant")
        if plan.kind == SCALE:
            axis = 1 if product.transposed else 0
            plan.give_operand(loop, product.weights, along(divide(np.ones(()), vector), axis, 2))
            continue
        if product.bias is None or not plan.is_constant(loop.input[product.bias]):
            raise Refused(f"loop {loop.name!r} adds no bias to its product")
        matrix = weights.T if product.transposed else weights
        plan.give_operand(loop, product.bias, canonical(-(vector @ matrix.astype(np.float64))))


def _products(view: View, loop: NodeDef, index: int) -> list[_Product]:
    """The products of the steps of the list that is operand `index` of a loop.

    Raises:
      Refused: the body uses the steps, or the weights, in another way.
    """
    body = view.body(attr(loop, "body").func.name)
    condition = view.body(attr(loop, "cond").func.name)
    labels = list(body.outputs)
    refused = Refused(f"loop {loop.name!r} uses what it reads otherwise than in a product with fixed weights")

    def fixed(argument: str) -> bool:
        """Whether an argument is passed on unchanged, unseen by the condition and by whoever follows the loop."""
        position = body.arguments.index(argument)
        passed = [label for label, ref in body.outputs.items() if ref == argument]
        seen = any(port == position for _, _, port in view.graph.uses(loop.name))
        result = join(loop.name, position) in view.graph.outputs.values()
        return (
            passed == [labels[position]] and not condition.users(condition.arguments[position]) and not (seen or result)
        )

    def sole(argument: str) -> int | None:
        """The operand index of an argument that is fixed and has one use."""
        single = argument in body.arguments and len(body.uses(argument)) == 1 and fixed(argument)
        return body.arguments.index(argument) if single else None

    if not fixed(body.arguments[index]):
        raise refused
    products = []
    for reader, position, _ in body.uses(body.arguments[index]):
        if body.nodes[reader].op != "TensorListGetItem" or position != 0:
            raise refused
        for user, at, port in body.uses(reader):
            node = body.nodes[user]
            if node.op != "MatMul" or at != 0 or port != 0 or attr(node, "transpose_a").b:
                raise refused
            weights = sole(split(node.input[1])[0])
            if weights is None:
                raise refused
            products.append(_Product(weights, _bias(body, node, sole), attr(node, "transpose_b").b))
        if not body.users(reader) or reader in {split(ref)[0] for ref in body.outputs.values()}:
            raise refused
    return products


def _bias(body: Graph, product: NodeDef, sole: Callable[[str], int | None]) -> int | None:
    """The operand index of the bias that a product gets, directly or after it is added to another."""
    node = product
    for _ in range(3):
        uses = body.uses(node.name)
        if len(uses) != 1 or node.name in body.outputs.values():
            return None
        user, at, _ = uses[0]
        node = body.nodes[user]
        if node.op not in ("Add", "AddV2", "BiasAdd"):
            return None
        bias = sole(split(node.input[1 - at])[0])
        if bias is not None:
            return bias
    return None


LOOPS: dict[str, Handler] = {"TensorListFromTensor": _list}
