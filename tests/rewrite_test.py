from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import ORIGINS, assert_same, memory_answers, original_answers
from tfopt import model, rewrite
from tfopt.graph import Graph, const_node, make_node
from tfopt.passes import for_each_body
from tfopt.rewrite import Const, Log, Match, Op, Refused, Rule, apply, check_exclusive, find, remove_node


def squared() -> Graph:
    """y = -(x * w), with w large enough to be a weight."""
    graph = Graph([make_node("x", "Placeholder", dtype=tf.float32, shape=(None, 2000))], {"y": "neg"}, arguments=["x"])
    graph.add_constant("w", np.full(2000, 2.0, np.float32))
    graph.add(make_node("mul", "Mul", ["x", "w"], T=tf.float32))
    graph.add(make_node("neg", "Neg", ["mul"], T=tf.float32))
    return graph


def _negate_weight(match: Match) -> str:
    graph = match.graph
    weight = graph.add_constant("negated", -match.value("w"))
    return graph.add_op("product", "Mul", [match.refs["x"], weight], T=tf.float32)


NEGATE = Rule("negate weight", Op("Neg", (Op("Mul", ("x", Const("w")), name="mul", commutes=True),)), _negate_weight)


def test_a_rule_replaces_its_root_and_keeps_what_refers_to_it():
    graph, log = squared(), Log()
    graph.add(make_node("after", "Relu", ["neg"], T=tf.float32))
    graph.outputs["z"] = "after"
    assert apply([NEGATE], graph, log) == 1
    assert log.applied == {"negate weight": 1} and log.refused == {}
    assert graph.outputs["y"] == "product" and list(graph.nodes["after"].input) == ["product"]
    assert "neg" not in graph.nodes and "mul" not in graph.nodes
    np.testing.assert_array_equal(graph.weights["negated"], np.full(2000, -2.0))


def test_a_shared_weight_is_never_edited():
    graph, log = squared(), Log()
    graph.add(make_node("other", "Mul", ["x", "w"], T=tf.float32))
    graph.outputs["other"] = "other"
    original = graph.weights["w"]
    assert apply([NEGATE], graph, log) == 1
    assert graph.weights["w"] is original and (original == 2.0).all()
    assert graph.nodes["other"].input[1] == "w"


def _other_consumer(graph: Graph) -> None:
    graph.outputs["z"] = graph.add_op("other", "Relu", ["mul"], T=tf.float32)


def _control_out(graph: Graph) -> None:
    graph.set_inputs("neg", ["mul", "^mul"])


def _control_in(graph: Graph) -> None:
    graph.set_inputs("mul", ["x", "w", "^x"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_other_consumer, "Mul 'mul' also feeds Relu 'other'"),
        (lambda graph: graph.outputs.update(m="mul"), "Mul 'mul' is a result of the graph"),
        (lambda graph: graph.keep.append("mul"), "Mul 'mul' must be kept"),
        (_control_out, "Mul 'mul' has control edges"),
        (_control_in, "Mul 'mul' has control edges"),
    ],
)
def test_an_interior_node_that_is_visible_outside_is_refused_with_the_reason(change, reason):
    graph, log = squared(), Log()
    change(graph)
    before = graph.to_graph_def().SerializeToString(deterministic=True)
    assert apply([NEGATE], graph, log) == 0
    assert log.refused == {("negate weight", "neg"): reason}
    assert graph.to_graph_def().SerializeToString(deterministic=True) == before


def _top_k() -> Graph:
    return Graph(
        [
            make_node("x", "Placeholder", dtype=tf.float32, shape=(9,)),
            const_node("k", np.array(2, np.int32)),
            make_node("top", "TopKV2", ["x", "k"], T=tf.float32, Tk=tf.int32, index_type=tf.int32, sorted=True),
            make_node("neg", "Neg", ["top"], T=tf.float32),
        ],
        {"y": "neg"},
        arguments=["x"],
    )


def test_another_port_in_use_is_refused():
    graph, log = _top_k(), Log()
    rule = Rule("top", Op("TopKV2", ("x", Const("k"))), lambda match: match.refs["x"])
    graph.outputs["i"] = "top:1"
    assert apply([rule], graph, log) == 0
    assert log.refused["top", "top"] == "another output of TopKV2 'top' is in use"
    with pytest.raises(Refused, match="is a result of the graph"):
        check_exclusive(graph, "top", ["neg"])
    graph.outputs["i"] = "neg"
    graph.add(make_node("cast", "Cast", ["top:1"], SrcT=tf.int32, DstT=tf.float32))
    with pytest.raises(Refused, match="output 1 of TopKV2 'top' is in use"):
        check_exclusive(graph, "top", ["neg", "cast"])


def test_a_pattern_binds_one_name_to_one_reference():
    graph = squared()
    assert find(graph, NEGATE, graph.nodes["neg"]).refs == {"x": "x", "w": "w"}
    same = Op("Mul", ("a", "a"))
    assert find(graph, Rule("", same, lambda match: ""), graph.nodes["mul"]) is None
    graph.set_inputs("mul", ["x", "x"])
    assert find(graph, Rule("", same, lambda match: ""), graph.nodes["mul"]).refs == {"a": "x"}


def test_only_the_first_output_matches_an_interior_node():
    graph = _top_k()
    graph.set_input("neg", 0, "top:1")
    assert find(graph, Rule("", Op("Neg", (Op("TopKV2"),)), lambda match: ""), graph.nodes["neg"]) is None


@pytest.mark.parametrize("order", [("x", "w"), ("w", "x")])
def test_commuting_inputs_match_both_ways(order):
    graph = squared()
    graph.set_inputs("mul", order)
    assert find(graph, NEGATE, graph.nodes["neg"]).refs == {"x": "x", "w": "w"}


def test_rules_that_undo_each_other_end():
    swap = {"Relu": "Neg", "Neg": "Relu"}

    def change(match: Match):
        return make_node(match.root.name, swap[match.root.op], [match.root.input[0]], T=tf.float32)

    graph, log = squared(), Log()
    done = apply([Rule("there", Op("Neg"), change), Rule("back", Op("Relu"), change)], graph, log)
    assert rewrite.MAX_SWEEPS <= done <= 2 * rewrite.MAX_SWEEPS


def test_a_rule_that_renames_its_root_is_a_bug():
    rule = Rule("bad", Op("Neg"), lambda match: make_node("other", "Relu", ["mul"]))
    with pytest.raises(ValueError, match="renamed 'neg' to 'other'"):
        apply([rule], squared(), Log())


def test_a_replacement_in_place_waits_for_what_the_root_waited_for():
    graph = squared()
    graph.set_inputs("neg", ["mul", "^x"])
    relu = Rule("relu", Op("Neg"), lambda match: make_node("neg", "Relu", ["mul"], T=tf.float32))
    assert apply([relu], graph, Log()) == 1
    assert list(graph.nodes["neg"].input) == ["mul", "^x"]


def waiting() -> Graph:
    """assign -> (control) identity of x -> relu; and a second op that waits for the identity."""
    return Graph(
        [
            make_node("x", "Placeholder", dtype=tf.float32, shape=()),
            make_node("v", "VarHandleOp", dtype=tf.float32, shape=()),
            make_node("assign", "AssignVariableOp", ["v", "x"], dtype=tf.float32),
            make_node("i", "Identity", ["x", "^assign"], T=tf.float32),
            make_node("relu", "Relu", ["i"], T=tf.float32),
            make_node("read", "ReadVariableOp", ["v", "^i"], dtype=tf.float32),
        ],
        {"y": "relu", "r": "read"},
        arguments=["x"],
    )


def test_control_edges_of_a_removed_node_move_to_its_consumers():
    graph = waiting()
    remove_node(graph, "i", "x")
    assert list(graph.nodes["relu"].input) == ["x", "^assign"]
    assert set(graph.nodes["read"].input) == {"v", "^x", "^assign"}


def test_a_result_that_waits_is_not_removed():
    graph = waiting()
    graph.outputs["y"] = "i"
    with pytest.raises(Refused, match="is a result that waits for 'assign'"):
        remove_node(graph, "i", "x")
    graph.keep.append("relu")
    with pytest.raises(Refused, match="must be kept"):
        remove_node(graph, "relu", "i")


@pytest.mark.parametrize("side", ["before", "after"])
def test_what_holds_a_v1_branch_together_stays(side):
    graph = Graph(
        [
            make_node("x", "Placeholder", dtype=tf.float32, shape=()),
            make_node("p", "Placeholder", dtype=tf.bool, shape=()),
            make_node("switch", "Switch", ["x", "p"], T=tf.float32),
            make_node("i", "Identity", ["switch:1", *(["^p"] if side == "before" else [])], T=tf.float32),
            make_node("c", "Const", ["^i"] if side == "after" else [], dtype=tf.float32),
            make_node("out", "AddV2", ["i", "c"], T=tf.float32),
        ],
        {"y": "out"},
    )
    with pytest.raises(Refused, match="holds the control edges of a v1 branch"):
        remove_node(graph, "i", "switch:1")


@pytest.mark.parametrize(
    ("op", "effect"),
    [("Relu", False), ("RandomUniform", False), ("Assert", False), ("AssignVariableOp", True), ("ReadVariableOp", True),
     ("If", True), ("StatelessIf", False), ("WriteFile", True), ("SomeFunction", True)],
)  # fmt: skip
def test_what_has_an_effect(op, effect):
    assert rewrite.has_effect(make_node("n", op)) == effect


@pytest.mark.parametrize("name", ["control_flow", "control_flow_switch_merge", "counter"])
def test_function_bodies_are_rewritten_under_new_names_nested_ones_too(name, built):
    loaded = model.load(built(name))
    before = dict(loaded.functions)
    # tanh(x) = x * (tanh(x) / x) would be silly; adding a double negation changes each body and no value.
    negations = []

    def edit(graph: Graph) -> int:
        matmuls = [node.name for node in graph.nodes.values() if node.op == "MatMul"]
        for matmul in matmuls:
            once = graph.add_op(f"{matmul}/once", "Neg", [matmul], T=tf.float32)
            twice = graph.add_op(f"{matmul}/twice", "Neg", [once], T=tf.float32)
            graph.redirect(matmul, twice)
            graph.set_input(once, 0, matmul)
            negations.append(twice)
        return len(matmuls)

    assert for_each_body(loaded, edit) == len(negations) > 0
    loaded.check()
    assert_same(original_answers(name, built(name)), memory_answers(loaded, ORIGINS[name].inputs, ORIGINS[name].calls))
    rewritten = set(loaded.functions) - set(before)
    assert bool(rewritten) == (name != "control_flow_switch_merge")
    for kept in set(loaded.functions) & set(before):
        assert loaded.functions[kept] == before[kept], "a function was changed under its old name"
    assert all("__tfopt_" in new for new in rewritten)
