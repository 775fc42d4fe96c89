"""An expression of one integer variable v as a table: f(v) = T[clip(v - a, 0, b)].

Of comparisons, selections and constants, f is constant, or v itself, below the least constant in it and above the
greatest. Hence its values between them say all about it, where it is constant beyond.
"""

from __future__ import annotations

from collections.abc import Callable

import tensorflow as tf

from tfopt.lookups.row_values import COMPARE, Bounds, Expr

_CHOOSE: dict[str, Callable] = {
    **COMPARE,
    **{"LogicalAnd": lambda a, b: a and b, "LogicalOr": lambda a, b: a or b, "LogicalNot": lambda a: not a},
    **{"SelectV2": lambda c, a, b: a if c else b, "Maximum": max, "Minimum": min},
}


def constants(e: Expr, variable: Expr) -> set[int] | None:
    """The integers that an expression compares one variable with; None where it does anything else."""
    if e is variable:
        return set()
    if e.op == "const" and (e.dtype == tf.bool or e.dtype.is_integer):
        return set() if e.dtype == tf.bool else {e.value}
    if e.op not in _CHOOSE:
        return None
    found: set[int] = set()
    for arg in e.args:
        inside = constants(arg, variable)
        if inside is None:
            return None
        found |= inside
    return found


def evaluate(e: Expr, variable: Expr, at: int) -> int | bool:
    """The value of an expression, of which `constants` are known, where its variable is `at`."""
    if e is variable:
        return at
    return e.value if e.op == "const" else _CHOOSE[e.op](*(evaluate(arg, variable, at) for arg in e.args))


def tabulate(row: Callable[[int], int | None], cuts: set[int], own: Bounds, limit: int) -> tuple[int, list[int]] | None:
    """A table of an expression of one variable.

    Args:
      row: its value at a value of the variable; None where it has none.
      cuts: see `constants`.
      own: bounds of the variable.
      limit: how many entries the table may have.

    Returns:
      (first, entries): where the variable is v, the value is entries[clip(v - first, 0, len(entries) - 1)]; or None.
    """
    cuts = {cut for cut in cuts if own[0] <= cut <= own[1]}
    windows = [own]
    if cuts:
        windows.insert(0, (max(own[0], min(cuts) - 1), min(own[1], max(cuts) + 1)))
    for first, last in windows:
        if not last - first < limit:
            continue
        start, stop = int(first), int(last)
        known = [entry for at in range(start, stop + 1) if (entry := row(at)) is not None]
        if len(known) < stop - start + 1:
            continue
        ends = (own[0] == start or row(start - 1) == known[0]) and (own[1] == stop or row(stop + 1) == known[-1])
        if ends:
            break
    else:
        return None  # it goes on as the variable itself
    while own[0] < start and len(known) > 1 and known[0] == known[1]:
        start, known = start + 1, known[1:]
    while own[1] > start + len(known) - 1 and len(known) > 1 and known[-1] == known[-2]:
        known.pop()
    return start, known
