"""What one row of a column gives, as an expression: hash-consed, with bounds, simplified by what is known to hold.

bounds([c ? a : b]) = hull(bounds(a | c), bounds(b | not c))
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import make_node, set_attr

INFINITY = float("inf")
UNBOUNDED = (-INFINITY, INFINITY)
# A larger expression becomes a variable of its own.
MAX_SIZE = 200

COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    **{"Less": operator.lt, "LessEqual": operator.le, "Greater": operator.gt, "GreaterEqual": operator.ge},
    **{"Equal": operator.eq, "NotEqual": operator.ne},
}
# A comparison that holds, or does not, as (strict, swapped): a < b, a <= b, b < a or b <= a.
_ORDER = {
    **{("Less", True): (True, False), ("Less", False): (False, True)},
    **{("LessEqual", True): (False, False), ("LessEqual", False): (True, True)},
    **{("Greater", True): (True, True), ("Greater", False): (False, False)},
    **{("GreaterEqual", True): (False, True), ("GreaterEqual", False): (True, False)},
}

Bounds = tuple[float, float]


@dataclasses.dataclass(frozen=True, eq=False)
class Expr:
    """One value a row. Two that are equal are the same object, see `Pool`.

    Attributes:
      op: "leaf", "const", or an op that works element by element.
      args: what the op takes.
      dtype: of the value.
      value: of a constant; the reference of a leaf.
      code: the NodeDef of the op without its name and inputs.
      own: bounds that it has whatever its arguments are; infinite for what is no integer.
      rowwise: whether it differs from row to row; False for a scalar.
      size: how many expressions it is made of.
    """

    op: str
    args: tuple[Expr, ...]
    dtype: tf.DType
    value: Any
    code: bytes
    own: Bounds
    rowwise: bool
    size: int


Facts = Mapping[Expr, Bounds]


class Pool:
    """Makes expressions, each once."""

    def __init__(self) -> None:
        self._made: dict[tuple, Expr] = {}
        self.true = self.const(True, tf.bool)
        self.false = self.const(False, tf.bool)

    def leaf(self, ref: str, dtype: tf.DType, own: Bounds = UNBOUNDED, rowwise: bool = True) -> Expr:
        """The value of a tensor of the graph: (N,), or () for a scalar."""
        return self._make("leaf", (), dtype, ref, b"", own, rowwise)

    def const(self, value: Any, dtype: tf.DType) -> Expr:
        """A constant, given as a Python scalar."""
        return self._make("const", (), dtype, value, b"", UNBOUNDED, False)

    def apply(self, node: NodeDef, args: Sequence[Expr], dtype: tf.DType, own: Bounds = UNBOUNDED) -> Expr:
        """What a node computes from these arguments."""
        op = "SelectV2" if node.op == "Select" else node.op
        if op in ("ZerosLike", "OnesLike"):
            return self.const(dtype.as_numpy_dtype(op == "OnesLike").item(), dtype)
        if op in ("AddV2", "Add", "Mul") and dtype.is_integer:
            a, b = sorted(args, key=lambda e: e.op == "const")
            if op == "Mul" and b.op == "const" and b.value == 0:
                return b
            if b.op == "const" and b.value == (op == "Mul"):
                return a
        code = NodeDef(op=op)
        for key, attr in node.attr.items():
            if not key.startswith("_"):
                set_attr(code, key, attr)
        return self._make(op, tuple(args), dtype, None, code.SerializeToString(deterministic=True), own)

    def select(self, condition: Expr, a: Expr, b: Expr) -> Expr:
        """condition ? a : b"""
        return self.apply(make_node("", "SelectV2", T=a.dtype), (condition, a, b), a.dtype)

    def both(self, a: Expr, b: Expr) -> Expr:
        """a and b"""
        if self.true in (a, b):
            return a if b is self.true else b
        return self.apply(make_node("", "LogicalAnd"), (a, b), tf.bool)

    def negate(self, a: Expr) -> Expr:
        """not a"""
        if a.op == "const":
            return self.const(not a.value, tf.bool)
        return a.args[0] if a.op == "LogicalNot" else self.apply(make_node("", "LogicalNot"), (a,), tf.bool)

    def either(self, a: Expr, b: Expr) -> Expr:
        """a or b"""
        if self.false in (a, b):
            return a if b is self.false else b
        return self.apply(make_node("", "LogicalOr"), (a, b), tf.bool)

    def simplify(self, e: Expr, facts: Facts | None = None) -> Expr:
        """The same wherever `facts` hold: conditions that they decide are gone."""
        facts = facts or {}
        if e.dtype == tf.bool or e.dtype.is_integer:
            low, high = bounds(e, facts)
            if low == high:
                return self.const(bool(low) if e.dtype == tf.bool else int(low), e.dtype)
        if e.op == "SelectV2":
            condition = self.simplify(e.args[0], facts)
            if condition.op == "const":
                return self.simplify(e.args[1 if condition.value else 2], facts)
            a = self.simplify(e.args[1], assume(condition, True, facts))
            b = self.simplify(e.args[2], assume(condition, False, facts))
            if condition.op == "LogicalNot":
                condition, a, b = condition.args[0], b, a
            return a if a is b else self.select(condition, a, b)
        if e.op in ("LogicalAnd", "LogicalOr"):
            a = self.simplify(e.args[0], facts)
            b = self.simplify(e.args[1], assume(a, e.op == "LogicalAnd", facts))
            return self.both(a, b) if e.op == "LogicalAnd" else self.either(a, b)
        return self.negate(self.simplify(e.args[0], facts)) if e.op == "LogicalNot" else e

    def _make(
        self, op: str, args: tuple[Expr, ...], dtype: tf.DType, value: Any, code: bytes, own: Bounds, row: bool = False
    ) -> Expr:
        key = (op, tuple(map(id, args)), dtype, code, repr(value))
        if key not in self._made:
            rowwise = row or any(arg.rowwise for arg in args)
            size = 1 + sum(arg.size for arg in args)
            self._made[key] = Expr(op, args, dtype, value, code, own, rowwise, size)
        return self._made[key]


def bounds(e: Expr, facts: Facts | None = None) -> Bounds:
    """The least and the greatest that an integer can be where `facts` hold; a boolean is 0 or 1."""
    facts = facts or {}
    known = [e.own, facts.get(e, UNBOUNDED), _computed(e, facts)]
    if e.dtype == tf.bool:
        known.append((0, 1))
    return max(low for low, _ in known), min(high for _, high in known)


def _computed(e: Expr, facts: Facts) -> Bounds:
    if e.op == "const":
        return (int(e.value),) * 2 if e.dtype == tf.bool or e.dtype.is_integer else UNBOUNDED
    if e.op == "SelectV2":
        condition = bounds(e.args[0], facts)
        parts = [
            bounds(e.args[1 if truth else 2], assume(e.args[0], truth, facts))
            for truth in (True, False)
            if condition[0] <= truth <= condition[1]
        ]
        return (min(p[0] for p in parts), max(p[1] for p in parts)) if parts else UNBOUNDED
    if e.op == "leaf" or not all(arg.dtype == tf.bool or arg.dtype.is_integer for arg in e.args):
        return UNBOUNDED
    given = [bounds(arg, facts) for arg in e.args]
    if e.op in COMPARE:
        return _compared(e.op, *given)
    if e.op == "LogicalNot":
        return 1 - given[0][1], 1 - given[0][0]
    if e.op in ("LogicalAnd", "Minimum"):
        return min(g[0] for g in given), min(g[1] for g in given)
    if e.op in ("LogicalOr", "Maximum"):
        return max(g[0] for g in given), max(g[1] for g in given)
    found = UNBOUNDED
    if e.op in ("AddV2", "Add"):
        found = given[0][0] + given[1][0], given[0][1] + given[1][1]
    elif e.op == "Cast" and e.dtype != tf.bool:
        found = given[0]
    fits = e.dtype.is_integer and e.dtype.min <= found[0] and found[1] <= e.dtype.max
    return found if fits else UNBOUNDED  # what may overflow may be anything


def _compared(op: str, a: Bounds, b: Bounds) -> Bounds:
    if op in ("Equal", "NotEqual"):
        if a[0] == a[1] == b[0] == b[1]:
            return (int(op == "Equal"),) * 2
        return (int(op == "NotEqual"),) * 2 if a[1] < b[0] or a[0] > b[1] else (0, 1)
    holds = COMPARE[op]
    # The least and the greatest of a against those of b, from the side that favours it least.
    ascending = op.startswith("Less")
    if holds(a[1] if ascending else a[0], b[0] if ascending else b[1]):
        return 1, 1
    return (0, 1) if holds(a[0] if ascending else a[1], b[1] if ascending else b[0]) else (0, 0)


def assume(e: Expr, truth: bool, facts: Facts | None = None) -> Facts:
    """The facts, and what follows from a condition that holds, or does not."""
    known = dict(facts or {})
    known[e] = (int(truth),) * 2
    if e.op == "LogicalNot":
        return assume(e.args[0], not truth, known)
    if (e.op, truth) in (("LogicalAnd", True), ("LogicalOr", False)):
        return assume(e.args[1], truth, assume(e.args[0], truth, known))
    if e.op not in COMPARE or not all(arg.dtype.is_integer for arg in e.args):
        return known
    (a, b), (of_a, of_b) = e.args, (bounds(arg, known) for arg in e.args)
    if (e.op, truth) in _ORDER:
        strict, swapped = _ORDER[e.op, truth]
        if swapped:
            a, b, of_a, of_b = b, a, of_b, of_a
        known[a] = of_a[0], min(of_a[1], of_b[1] - strict)
        known[b] = max(of_b[0], of_a[0] + strict), of_b[1]
    elif (e.op == "Equal") == truth:
        known[a] = known[b] = max(of_a[0], of_b[0]), min(of_a[1], of_b[1])
    else:
        for one, own, other in ((a, of_a, of_b), (b, of_b, of_a)):
            if other[0] == other[1]:
                known[one] = own[0] + (own[0] == other[0]), own[1] - (own[1] == other[0])
    return known


def parts(e: Expr) -> Iterator[Expr]:
    """All that an expression is made of, the innermost first."""
    for arg in e.args:
        yield from parts(arg)
    yield e
