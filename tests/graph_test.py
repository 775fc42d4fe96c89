from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfopt.graph import (
    WEIGHT_ELEMENTS,
    Graph,
    called_functions,
    const_node,
    function_body,
    function_def,
    infer_shapes,
    join,
    make_node,
    split,
)


def chain() -> Graph:
    """x -> relu -> neg (the result), and a constant added to relu; the sum waits for neg by a control edge."""
    return Graph(
        [
            make_node("x", "Placeholder", dtype=tf.float32, shape=(None, 2)),
            make_node("relu", "Relu", ["x"], T=tf.float32),
            make_node("neg", "Neg", ["relu:0"], T=tf.float32),
            const_node("c", np.array([1.0, 2.0], np.float32)),
            make_node("sum", "AddV2", ["relu", "c", "^neg"], T=tf.float32),
            make_node("dead", "Neg", ["c"], T=tf.float32),
        ],
        {"y": "neg:0", "s": "sum"},
        arguments=["x"],
    )


@pytest.mark.parametrize(
    ("ref", "parts"), [("a", ("a", 0)), ("a:2", ("a", 2)), ("^a/b", ("a/b", -1)), ("a:0", ("a", 0))]
)
def test_references_are_split_and_joined(ref, parts):
    assert split(ref) == parts
    assert split(join(*parts)) == parts


def test_consumers_are_known_at_every_moment():
    graph = chain()
    assert graph.users("relu") == ["neg", "sum"]
    assert graph.uses("neg") == [("sum", 2, -1)]
    graph.set_input("sum", 0, "x")
    assert graph.users("relu") == ["neg"] and graph.users("x") == ["relu", "sum"]
    graph.set_inputs("sum", ["c", "c"])
    assert sorted(graph.users("c")) == ["dead", "sum"] and graph.users("neg") == []
    with pytest.raises(ValueError, match="still feeds"):
        graph.remove("c")
    graph.remove("dead")
    assert graph.users("c") == ["sum"]


def test_topological_puts_producers_first():
    order = [node.name for node in chain().topological()]
    for name, node in chain().nodes.items():
        assert all(order.index(split(ref)[0]) < order.index(name) for ref in node.input)


def test_a_cycle_is_named():
    graph = chain()
    graph.set_input("relu", 0, "neg")
    with pytest.raises(ValueError, match="cycle through node"):
        graph.topological()


def test_sweep_keeps_results_arguments_and_what_is_kept():
    graph = chain()
    assert graph.sweep() == 1 and "dead" not in graph.nodes
    del graph.outputs["s"]
    graph.keep.append("c")
    assert graph.sweep() == 1 and set(graph.nodes) == {"x", "relu", "neg", "c"}
    graph.outputs.clear()
    graph.sweep()
    assert set(graph.nodes) == {"x", "c"}


def test_redirect_moves_consumers_and_results_and_leaves_control_edges():
    graph = chain()
    graph.redirect("neg", "relu")
    assert graph.outputs["y"] == "relu"
    assert list(graph.nodes["sum"].input) == ["relu", "c", "^neg"]
    graph.redirect_control("neg", ["x", "relu"])
    assert list(graph.nodes["sum"].input) == ["relu", "c", "^x"]  # relu is a data input already


def test_redirect_tells_ports_apart():
    graph = Graph(
        [
            make_node("x", "Placeholder", dtype=tf.float32, shape=(4,)),
            make_node("split", "Unpack", ["x"], T=tf.float32, num=4, axis=0),
            make_node("a", "Neg", ["split"], T=tf.float32),
            make_node("b", "Neg", ["split:2"], T=tf.float32),
        ],
        {"a": "a", "b": "b", "direct": "split:2"},
    )
    graph.redirect("split:2", "split:1")
    assert list(graph.nodes["a"].input) == ["split"]
    assert list(graph.nodes["b"].input) == ["split:1"]
    assert graph.outputs["direct"] == "split:1"


@pytest.mark.parametrize(
    ("size", "is_body", "weight"),
    [(WEIGHT_ELEMENTS, False, True), (WEIGHT_ELEMENTS - 1, False, False), (WEIGHT_ELEMENTS, True, False)],
)
def test_large_constants_are_weights_but_in_function_bodies(size, is_body, weight):
    graph = Graph([], {}, is_body=is_body)
    name = graph.add_constant("c", np.arange(size, dtype=np.float32))
    assert (name in graph.weights) == weight
    assert graph.nodes[name].op == ("Placeholder" if weight else "Const")
    np.testing.assert_array_equal(graph.constant(name), np.arange(size))


def test_constants_are_seen_through_identity_but_not_through_control_edges_and_ports():
    graph = chain()
    graph.add(make_node("i", "Identity", ["c"], T=tf.float32))
    graph.add(make_node("w", "Identity", ["c", "^x"], T=tf.float32))
    np.testing.assert_array_equal(graph.constant("i"), [1, 2])
    assert graph.constant("w") is None and graph.constant("c:1") is None and graph.constant("x") is None
    graph.set_constant("c", np.array([5.0, 6.0], np.float32))
    np.testing.assert_array_equal(graph.constant("i"), [5, 6])


def test_a_copy_shares_arrays_and_nothing_else():
    graph = chain()
    graph.add_constant("w", np.zeros(2000, np.float32))
    copy = graph.copy()
    assert copy.weights["w"] is graph.weights["w"]
    copy.set_constant("w", np.ones(2000, np.float32))
    copy.redirect("relu", "x")
    assert not graph.weights["w"].any() and list(graph.nodes["neg"].input) == ["relu:0"]


def test_unique_names():
    graph = chain()
    assert [graph.add_op(hint, "NoOp", []) for hint in ("neg", "neg", "new", "new")] == [
        "neg_1",
        "neg_2",
        "new",
        "new_1",
    ]
    with pytest.raises(ValueError, match="exists already"):
        graph.add(make_node("neg", "NoOp"))


def test_shapes_are_inferred_by_port():
    graph = chain()
    graph.add(make_node("parts", "Unpack", ["c"], T=tf.float32, num=2, axis=0))
    shapes = infer_shapes(graph)
    assert shapes["relu"] == (None, 2) and shapes["c"] == (2,) and shapes["parts:1"] == ()


def _functions(f) -> dict:
    return {d.signature.name: d for d in f.get_concrete_function().graph.as_graph_def().library.function}


@tf.function(input_signature=[tf.TensorSpec((None, 4)), tf.TensorSpec((), tf.int32)])
def _branching(x, n):
    def split_up():
        values, indices = tf.math.top_k(x, 2)
        a, _, b = tf.split(x, [1, 1, 2], axis=1)
        return values + b + a + tf.cast(indices, tf.float32)

    return tf.cond(n > 0, split_up, lambda: x[:, :2]), tf.while_loop(lambda i: i < n, lambda i: i + 1, (0,))


def test_function_bodies_go_there_and_back():
    library = _functions(_branching)
    assert len(library) == 4
    for name, original in library.items():
        body = function_body(original, library)
        assert body.is_body and body.arguments == [arg.name for arg in original.signature.input_arg]
        written = function_def(body, original, f"{name}_again", library)
        assert written.signature.name == f"{name}_again"
        assert {n.name: list(n.input) for n in written.node_def} == {n.name: list(n.input) for n in original.node_def}
        assert written.ret == original.ret and written.control_ret == original.control_ret


def test_ports_of_ops_with_several_outputs_are_flat():
    library = _functions(_branching)
    (body,) = [b for b in (function_body(f, library) for f in library.values()) if any(
        n.op == "TopKV2" for n in b.nodes.values())]  # fmt: skip
    (cast,) = [n for n in body.nodes.values() if n.op == "Cast"]
    assert split(cast.input[0])[1] == 1
    refs = {ref for node in body.nodes.values() for ref in node.input if split(ref)[1] > 0}
    assert {split(ref)[1] for ref in refs} == {1, 2}


def test_called_functions_are_found_in_single_and_list_attributes():
    node = make_node("n", "Case", [])
    node.attr["branches"].list.func.add(name="a")
    node.attr["branches"].list.func.add(name="b")
    node.attr["other"].func.name = "c"
    assert sorted(called_functions(node)) == ["a", "b", "c"]


def test_attributes_take_python_values():
    node = make_node("n", "Op", [], a=True, b=3, c=0.5, d="text", e=tf.int64, f=(None, 2), g=[1, 2])
    assert (node.attr["a"].b, node.attr["b"].i, node.attr["c"].f, node.attr["d"].s) == (True, 3, 0.5, b"text")
    assert node.attr["e"].type == tf.int64.as_datatype_enum and list(node.attr["g"].list.i) == [1, 2]
    assert [d.size for d in node.attr["f"].shape.dim] == [-1, 2]
    with pytest.raises(TypeError, match="cannot hold"):
        make_node("n", "Op", [], a=object())
