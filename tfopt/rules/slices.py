"""Slices let an affine through: k * x[a:b] = (k' * x)[a:b].

Forward, k is sliced as x is. Backward, what was not taken is free: it keeps the coefficient 1 (or 0 for a shift).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.rewrite import Refused
from tfopt.rules.coefficients import canonical
from tfopt.rules.constants import attr
from tfopt.rules.plan import Plan
from tfopt.rules.view import View


@dataclasses.dataclass(frozen=True)
class _Axis:
    """What a slice does on one axis: `operand` is None for a new axis, `result` for one that is indexed away."""

    operand: int | None
    result: int | None
    taken: slice | int


def _axes(view: View, node: NodeDef) -> list[_Axis]:
    shape = view.shape(node.input[0])
    values = [view.value(ref) for ref in view.graph.data_inputs(node)[1:]]
    if shape is None or any(value is None for value in values):
        raise Refused("what it slices is not known")
    begin, end, *rest = ([int(v) for v in np.ravel(value)] for value in values if value is not None)
    if node.op == "Slice":
        return [
            _Axis(a, a, slice(b, None if n == -1 else b + n)) for a, (b, n) in enumerate(zip(begin, end, strict=True))
        ]
    masked = {
        key: [bool(attr(node, f"{key}_mask").i >> i & 1) for i in range(len(begin))]
        for key in ("begin", "end", "ellipsis", "new_axis", "shrink_axis")
    }
    named = sum(not (e or n) for e, n in zip(masked["ellipsis"], masked["new_axis"], strict=True))
    axes: list[_Axis] = []
    operand = result = 0

    def take_all(count: int) -> None:
        nonlocal operand, result
        axes.extend(_Axis(operand + i, result + i, slice(None)) for i in range(count))
        operand, result = operand + count, result + count

    for i in range(len(begin)):
        if masked["ellipsis"][i]:
            take_all(len(shape) - named)
            named = len(shape)
        elif masked["new_axis"][i]:
            axes.append(_Axis(None, result, slice(None)))
            result += 1
        elif masked["shrink_axis"][i]:
            axes.append(_Axis(operand, None, begin[i]))
            operand += 1
        else:
            ends = (None if masked["begin"][i] else begin[i], None if masked["end"][i] else end[i])
            axes.append(_Axis(operand, result, slice(*ends, rest[0][i])))
            operand, result = operand + 1, result + 1
    take_all(len(shape) - operand)
    return axes


def slice_forward(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
    """The coefficient of a slice, from that of what is sliced."""
    if k.ndim == 0:
        return k
    index: list[slice | int | None] = []
    for axis in _axes(plan.view, node):
        if axis.operand is None:
            index.append(None)
        elif k.shape[axis.operand] > 1:
            index.append(axis.taken)
        else:
            index.append(slice(None) if axis.result is not None else 0)
    return canonical(k[tuple(index)])


def slice_backward(plan: Plan, node: NodeDef, k: np.ndarray) -> np.ndarray:
    """A coefficient of what is sliced that gives this one to the slice."""
    if k.ndim == 0:
        return k
    shape = plan.view.shape(node.input[0])
    assert shape is not None
    sizes, index, own = [1] * len(shape), [slice(None)] * len(shape), [1] * len(shape)
    for axis in _axes(plan.view, node):
        if axis.operand is None or axis.result is None or k.shape[axis.result] == 1:
            continue
        size = shape[axis.operand]
        if axis.taken == slice(None):
            size = k.shape[axis.result]
        if size is None or not isinstance(axis.taken, slice):
            raise Refused("the size of what it slices is not known")
        sizes[axis.operand], index[axis.operand] = size, axis.taken
        own[axis.operand] = k.shape[axis.result]
    whole = np.full(sizes, float(plan.identity))
    whole[tuple(index)] = k.reshape(own)
    return canonical(whole)
