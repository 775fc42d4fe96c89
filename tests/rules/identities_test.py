from __future__ import annotations

import pytest
import tensorflow as tf

from tfopt.graph import Graph, make_node
from tfopt.rewrite import Log, apply
from tfopt.rules.identities import PASS_THROUGH, RULES


def _graph(op: str, inputs=("x",), argument: bool = False) -> Graph:
    return Graph(
        [
            make_node("x", "Placeholder", dtype=tf.float32, shape=()),
            make_node("op", op, inputs, T=tf.float32),
            make_node("y", "Neg", ["op"], T=tf.float32),
        ],
        {"y": "y"},
        arguments=["x", "op"] if argument else ["x"],
    )


@pytest.mark.parametrize("op", PASS_THROUGH)
def test_each_hands_its_first_input_on(op):
    graph, log = _graph(op), Log()
    assert apply(RULES, graph, log) == 1
    assert set(graph.nodes) == {"x", "y"} and list(graph.nodes["y"].input) == ["x"]
    assert next(iter(log.applied)) == f"{op} ({PASS_THROUGH[op]})"


@pytest.mark.parametrize("op", PASS_THROUGH)
def test_an_input_of_a_signature_stays(op):
    graph, log = _graph(op, argument=True), Log()
    assert apply(RULES, graph, log) == 0 and "op" in graph.nodes
    assert list(log.refused.values()) == [f"{op} 'op' is an input of a signature"]


def test_a_result_is_re_pointed_and_a_chain_goes_at_once():
    graph = _graph("Identity")
    graph.add(make_node("again", "StopGradient", ["op"], T=tf.float32))
    graph.outputs["z"] = "again"
    assert apply(RULES, graph, Log()) == 2
    assert graph.outputs == {"y": "y", "z": "x"}


def test_what_is_kept_stays():
    graph, log = _graph("Identity"), Log()
    graph.keep.append("op")
    assert apply(RULES, graph, log) == 0
    assert list(log.refused.values()) == ["Identity 'op' must be kept"]
