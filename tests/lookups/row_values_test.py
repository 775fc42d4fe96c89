from __future__ import annotations

import random

import pytest
import tensorflow as tf

from tfopt.graph import make_node
from tfopt.lookups.row_tables import constants, evaluate, tabulate
from tfopt.lookups.row_values import INFINITY, Pool, assume, bounds

COMPARE = ("Less", "LessEqual", "Greater", "GreaterEqual", "Equal", "NotEqual")


def _integer(pool, x, draw, depth):
    kind = draw.choice(["x", "const", "select", "max"]) if depth else "x"
    if kind == "const":
        return pool.const(draw.randint(-4, 4), tf.int64)
    if kind == "select":
        a, b = (_integer(pool, x, draw, depth - 1) for _ in range(2))
        return pool.select(_boolean(pool, x, draw, depth - 1), a, b)
    if kind == "max":
        a, b = (_integer(pool, x, draw, depth - 1) for _ in range(2))
        return pool.apply(make_node("", draw.choice(["Maximum", "Minimum"]), T=tf.int64), (a, b), tf.int64)
    return x


def _boolean(pool, x, draw, depth):
    kind = draw.choice(["compare", "both", "either", "negate"]) if depth else "compare"
    if kind == "compare":
        pair = (_integer(pool, x, draw, max(depth - 1, 0)), pool.const(draw.randint(-4, 4), tf.int64))
        pair = pair if draw.random() < 0.5 else pair[::-1]
        return pool.apply(make_node("", draw.choice(COMPARE), T=tf.int64), pair, tf.bool)
    if kind == "negate":
        return pool.negate(_boolean(pool, x, draw, depth - 1))
    return getattr(pool, kind)(*(_boolean(pool, x, draw, depth - 1) for _ in range(2)))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("own", [(-INFINITY, INFINITY), (-2, 3), (0, INFINITY)])
def test_bounds_simplified_forms_and_tables_agree_with_the_values(seed, own):
    draw, pool = random.Random(seed), Pool()
    x = pool.leaf("x", tf.int64, own)
    e, condition = _integer(pool, x, draw, 4), _boolean(pool, x, draw, 2)
    possible = [v for v in range(-9, 10) if own[0] <= v <= own[1]]
    simple = pool.simplify(e)
    low, high = bounds(e)
    for v in possible:
        value = evaluate(e, x, v)
        assert low <= value <= high and evaluate(simple, x, v) == value
    for truth in (True, False):
        holds = [v for v in possible if evaluate(condition, x, v) == truth]
        facts = assume(condition, truth)
        under = pool.simplify(e, facts)
        for v in holds:
            assert bounds(e, facts)[0] <= evaluate(e, x, v) == evaluate(under, x, v) <= bounds(e, facts)[1]
    cuts = constants(e, x)
    found = tabulate(lambda v: evaluate(e, x, v), cuts, own, 100)
    if found is not None:
        first, entries = found
        for v in [*possible, *((10**6, -(10**6)) if own[0] == -INFINITY else ())]:
            assert entries[min(max(v - first, 0), len(entries) - 1)] == evaluate(e, x, v)
    else:
        assert own[1] == INFINITY, "a variable with bounds has a table"


def test_sums_that_may_overflow_have_no_bounds():
    pool = Pool()
    x = pool.leaf("x", tf.int32, (0, INFINITY))
    y = pool.leaf("y", tf.int32, (0, 7))

    def add(a, b):
        return pool.apply(make_node("", "AddV2", T=tf.int32), (a, b), tf.int32)

    assert bounds(add(x, y)) == (-INFINITY, INFINITY)
    assert bounds(add(y, y)) == (0, 14)
    assert add(y, pool.const(0, tf.int32)) is y
