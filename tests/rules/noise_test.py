from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfopt.graph import Graph, const_node, make_node
from tfopt.rewrite import Log, apply
from tfopt.rules import noise


def _graph(random: str, *nodes) -> Graph:
    """`x` float32 of any shape, `shape` of it, and random numbers `u` of that shape."""
    stateless = random.startswith("Stateless")
    seed = [const_node("seed", np.array([1, 2], np.int32))] if stateless else []
    types = {"T": tf.int32, "Tseed": tf.int32} if stateless else {"T": tf.int32}
    return Graph(
        [
            make_node("x", "Placeholder", dtype=tf.float32, shape=(None, 4)),
            make_node("shape", "Shape", ["x"], T=tf.float32, out_type=tf.int32),
            *seed,
            make_node("u", random, ["shape", *(["seed"] if stateless else [])], dtype=tf.float32, **types),
            *nodes,
        ],
        {"y": "y"},
        arguments=["x"],
    )


def _number(name: str, value: float):
    return const_node(name, np.array(value, np.float32))


def _select(rate: float):
    return [
        _number("rate", rate),
        _number("zero", 0.0),
        make_node("keep", "GreaterEqual", ["u", "rate"], T=tf.float32),
        make_node("y", "SelectV2", ["keep", "x", "zero"], T=tf.float32),
    ]


def _cast(rate: float):
    return [
        _number("rate", rate),
        make_node("keep", "GreaterEqual", ["u", "rate"], T=tf.float32),
        make_node("cast", "Cast", ["keep"], SrcT=tf.bool, DstT=tf.float32),
        make_node("y", "Mul", ["cast", "x"], T=tf.float32),
    ]


def _floor(rate: float):
    return [
        _number("keep", 1 - rate),
        make_node("sum", "AddV2", ["keep", "u"], T=tf.float32),
        make_node("floor", "Floor", ["sum"], T=tf.float32),
        make_node("y", "Mul", ["x", "floor"], T=tf.float32),
    ]


def _added(rate: float):
    return [
        _number("deviation", rate),
        make_node("noise", "Mul", ["u", "deviation"], T=tf.float32),
        make_node("y", "AddV2", ["x", "noise"], T=tf.float32),
    ]


def _multiplied(rate: float):
    return [
        *(_number(name, value) for name, value in (("one", 1.0), ("mean", 0.0), ("rate", rate))),
        make_node("scaled", "Mul", ["u", "one"], T=tf.float32),
        make_node("shifted", "AddV2", ["scaled", "mean"], T=tf.float32),
        make_node("noise", "Mul", ["shifted", "rate"], T=tf.float32),
        make_node("factor", "AddV2", ["one", "noise"], T=tf.float32),
        make_node("y", "Mul", ["x", "factor"], T=tf.float32),
    ]


FORMS = [(form, random) for form in (_select, _cast, _floor) for random in noise._UNIFORM[:2]]
FORMS += [(form, random) for form in (_added, _multiplied) for random in noise._NORMAL[:3]]


def _run(graph: Graph) -> Log:
    log = Log()
    while apply(noise.RULES, graph, log) + noise.take_out_fills(graph, log):
        pass
    graph.sweep()
    return log


@pytest.mark.parametrize(("form", "random"), FORMS)
def test_at_rate_zero_nothing_is_left(form, random):
    graph = _graph(random, *form(0.0))
    log = _run(graph)
    assert set(graph.nodes) == {"x"} and graph.outputs == {"y": "x"}
    assert not log.refused


@pytest.mark.parametrize(("form", "random"), FORMS)
def test_what_is_active_stays_with_the_reason(form, random):
    graph = _graph(random, *form(0.25))
    before = set(graph.nodes)
    log = _run(graph)
    assert set(graph.nodes) == before and not log.applied
    assert any("is dropout or noise that is active at serving time" in reason for reason in log.refused.values())


@pytest.mark.parametrize(
    ("op", "inputs", "value", "left"),
    [
        ("Mul", ["x", "fill"], 1.0, {"x"}),
        ("Mul", ["x", "fill"], 2.0, {"x", "shape", "value", "fill", "y"}),
        ("Sub", ["x", "fill"], 0.0, {"x"}),
        ("Sub", ["fill", "x"], 0.0, {"x", "shape", "value", "fill", "y"}),  # -x
        ("AddV2", ["z", "fill"], 0.0, {"x", "z", "shape", "value", "fill", "y"}),  # may make z larger
    ],
)
def test_only_a_neutral_fill_of_the_same_shape_goes(op, inputs, value, left):
    graph = Graph(
        [
            make_node("x", "Placeholder", dtype=tf.float32, shape=(None, 4)),
            make_node("z", "Placeholder", dtype=tf.float32, shape=(4,)),
            make_node("shape", "Shape", ["x"], T=tf.float32, out_type=tf.int32),
            _number("value", value),
            make_node("fill", "Fill", ["shape", "value"], T=tf.float32, index_type=tf.int32),
            make_node("y", op, inputs, T=tf.float32),
        ],
        {"y": "y"},
    )
    _run(graph)
    assert set(graph.nodes) == left


def test_a_select_that_spreads_the_input_stays():
    graph = _graph("RandomUniform", *_select(0.0))
    graph.add(make_node("wide", "Placeholder", dtype=tf.float32, shape=(3, 7, 4)))
    graph.set_input("y", 2, "wide")
    _run(graph)
    assert "y" in graph.nodes and "RandomUniform" not in {node.op for node in graph.nodes.values()}
