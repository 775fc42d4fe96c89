"""Reshape: the axes of both sides are lined up by the products of their sizes.

(h, w, c) -> (h w c)      one channel is h w elements of the result
(h d) -> (h, d)           attention: the d channels of a head go together
"""

from __future__ import annotations

import numpy as np
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.channels.ids import live
from tfopt.channels.sizes import resize, writable
from tfopt.channels.spread import Spread, Unknown
from tfopt.graph import Shape


def aligned(before: tuple[int | None, ...], after: tuple[int | None, ...]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes that hold the same elements, from the last to the first.

    Args:
      before: sizes before the reshape; None is unknown.
      after: sizes after it.

    Returns:
      (axes before, axes after), each in ascending order. A run that cannot be told apart is the last.
    """
    runs: list[tuple[list[int], list[int]]] = []
    i, j = len(before) - 1, len(after) - 1
    while i >= 0 and j >= 0:
        a, b = before[i], after[j]
        if a is None or b is None:
            break
        if a == b:
            runs.append(([i], [j]))
            i, j = i - 1, j - 1
        elif a == 1:
            runs.append(([i], []))
            i -= 1
        elif b == 1:
            runs.append(([], [j]))
            j -= 1
        else:
            left, right = [i], [j]
            while a != b:
                side, axes, index = (left, before, i - len(left)) if a < b else (right, after, j - len(right))
                size = axes[index] if index >= 0 else None
                if size is None:
                    return [*runs, (list(range(i + 1)), list(range(j + 1)))]
                side.insert(0, index)
                a, b = (a * size, b) if side is left else (a, b * size)
            runs.append((left, right))
            i, j = left[0] - 1, right[0] - 1
    if i >= 0 or j >= 0:
        runs.append((list(range(i + 1)), list(range(j + 1))))
    return runs


def _reshape(s: Spread, node: NodeDef) -> None:
    x = s.operand(node, 0)
    before: Shape = s.shape(s.inputs(node)[0])
    after: Shape = s.shape(node.name)
    if before is None or after is None:
        raise Unknown("a shape is not known")
    axes: list[np.ndarray] = [s.ids.fixed(size, f"Reshape {node.name!r} mixes them") for size in after]
    for left, right in aligned(before, after):
        sides = [x[axis] for axis in left]
        if len(left) == len(right) == 1 and before[left[0]] == after[right[0]]:
            axes[right[0]] = sides[0]
        elif len(right) == 1 and all(axis.ndim for axis in sides) and sides:
            axes[right[0]] = _merged(s, node, sides)
        elif len(left) == 1 and right and sides[0].ndim:
            for axis, ids in zip(right, _parted(s, node, sides[0], [after[axis] for axis in right]), strict=True):
                axes[axis] = ids
        else:
            s.pin(tuple(sides), f"Reshape {node.name!r} mixes them")
    target = s.inputs(node)[1]
    for axis, ids in enumerate(axes):
        if live(ids) and not writable(s.graph, target, axis):
            s.ids.pin(ids, f"the target of Reshape {node.name!r} is computed")
    resize(s, node, 1, {axis: ids for axis, ids in enumerate(axes) if live(ids)})
    s.result(node, tuple(axes))


def _merged(s: Spread, node: NodeDef, sides: list[np.ndarray]) -> np.ndarray:
    """The ids of an axis that several become; of these the last that is live decides."""
    living = [index for index, ids in enumerate(sides) if live(ids)]
    carrier = living[-1] if living else len(sides) - 1
    for index in living[:-1]:
        s.ids.pin(sides[index], f"Reshape {node.name!r} mixes them with other channels")
    shape = [len(ids) for ids in sides]
    line = [len(ids) if index == carrier else 1 for index, ids in enumerate(sides)]
    return np.broadcast_to(sides[carrier].reshape(line), shape).ravel()


def _parted(s: Spread, node: NodeDef, ids: np.ndarray, sizes: list[int | None]) -> list[np.ndarray]:
    """The ids of the axes that one becomes: those that differ along one of them, or else of whole blocks."""
    table = ids.reshape([size or 1 for size in sizes])
    parts = [s.ids.fixed(size, f"Reshape {node.name!r} mixes them") for size in table.shape]
    carrier = next((axis for axis, size in enumerate(table.shape) if size > 1), 0)
    for axis in range(table.ndim):
        line = table[tuple(slice(None) if a == axis else slice(0, 1) for a in range(table.ndim))]
        if (table == line).all():
            carrier = axis
    rows = np.moveaxis(table, carrier, 0).reshape(table.shape[carrier], -1)
    parts[carrier] = s.ids.join(rows, rows[:, :1])[:, 0]
    return parts


HANDLERS = {"Reshape": _reshape}
