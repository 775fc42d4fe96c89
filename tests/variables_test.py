from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import assert_same, control_flow_v1, memory_answers, original_answers, rows, save_tf1, v1
from tfopt import model, variables
from tfopt.errors import TfoptError
from tfopt.graph import Graph, make_node


def _handle(*users) -> Graph:
    return Graph(
        [
            make_node("x", "Placeholder", dtype=tf.float32, shape=()),
            make_node("p", "Placeholder", dtype=tf.bool, shape=()),
            make_node("v", "VarHandleOp", dtype=tf.float32, shape=(3,), shared_name="v"),
            *users,
        ],
        {},
    )


_READ = make_node("read", "ReadVariableOp", ["v"], dtype=tf.float32)
_ASSIGN = make_node("assign", "AssignAddVariableOp", ["v", "x"], dtype=tf.float32)
_GATE = make_node("switch", "Switch", ["v", "p"], T=tf.resource)
_GATED = make_node("gated", "ReadVariableOp", ["switch:1"], dtype=tf.float32)
_GATED_ASSIGN = make_node("gated", "AssignVariableOp", ["switch", "x"], dtype=tf.float32)
_UNKNOWN = make_node("pack", "Pack", ["v", "v"], T=tf.resource, N=2)


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        ([], True),
        ([_READ], True),
        ([_READ, _ASSIGN], False),
        ([_GATE, _GATED], True),
        ([_GATE, _GATED_ASSIGN], False),
        ([_UNKNOWN], False),
    ],
)
def test_what_only_reads(users, expected):
    assert variables.read_only(_handle(*users), "v", {}) == expected


def test_a_handle_that_is_a_result_is_not_a_weight():
    graph = _handle(_READ)
    graph.outputs["handle"] = "v"
    assert not variables.read_only(graph, "v", {})
    assert variables.read_only(_handle(_ASSIGN), "v", {}, live={"read"})


def test_reads_become_plain_ops():
    graph = _handle(
        _READ,
        _GATE,
        _GATED,
        make_node("gather", "ResourceGather", ["v", "x"], dtype=tf.float32, Tindices=tf.int32, batch_dims=0),
        make_node("nd", "ResourceGatherNd", ["v", "x"], dtype=tf.float32, Tindices=tf.int32),
        make_node("shape", "VariableShape", ["v"], out_type=tf.int64),
        make_node("ready", "VarIsInitializedOp", ["v"]),
    )
    graph.replace(make_node("v", "Placeholder", dtype=tf.float32, shape=(3,)))
    variables.demote(graph, {"v": tf.float32}, {})
    ops = {name: node.op for name, node in graph.nodes.items()}
    assert ops["read"] == ops["gated"] == "Identity" and ops["gather"] == "GatherV2" and ops["nd"] == "GatherNd"
    assert ops["shape"] == "Shape" and graph.nodes["shape"].attr["out_type"].type == tf.int64.as_datatype_enum
    assert graph.constant("ready") and graph.nodes["switch"].attr["T"].type == tf.float32.as_datatype_enum


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_gathers_with_batch_dims_stay_right(batch_dims, tmp_path):
    class Gather(tf.Module):
        def __init__(self):
            super().__init__()
            self.table = tf.Variable(rows(2, 5, 3))

        @tf.function(input_signature=[tf.TensorSpec((2, None), tf.int32, name="i")])
        def serve(self, i):
            return {
                "y": tf.raw_ops.ResourceGather(
                    resource=self.table.handle, indices=i % (5 if batch_dims else 2), dtype=tf.float32,
                    batch_dims=batch_dims,
                )
            }  # fmt: skip

    module = Gather()
    tf.saved_model.save(module, str(tmp_path / "m"), {"serving_default": module.serve})
    i = np.array([[0, 4, 2], [3, 3, 1]], np.int32)
    (outputs,) = memory_answers(model.load(tmp_path / "m"), {"serving_default": {"i": i}})["serving_default"]
    table = rows(2, 5, 3)
    expected = np.stack([table[b][i[b]] for b in range(2)]) if batch_dims else table[i % 2]
    np.testing.assert_array_equal(outputs["y"], expected)


def test_weights_that_a_v1_branch_reads_are_weights(tmp_path):
    with control_flow_v1(), tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 3], "x")
        w = v1.get_variable("w", initializer=rows(3, seed=6), use_resource=True)
        y = v1.cond(tf.reduce_sum(x) > 0, lambda: x + w, lambda: x - w)
        session.run(v1.global_variables_initializer())
        save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x}, {"y": y})})
    loaded = model.load(tmp_path / "m")
    assert not loaded.state and len(loaded.weights) == 1
    for sign in (1, -1):
        x = np.full((2, 3), sign, np.float32)
        (outputs,) = memory_answers(loaded, {"serving_default": {"x": x}})["serving_default"]
        np.testing.assert_array_equal(outputs["y"], x + sign * rows(3, seed=6))


def test_partitioned_variables_are_read_slice_by_slice(built):
    loaded = model.load(built("tf1_partitioned_variables"))
    whole = np.concatenate([loaded.weights[f"w/part_{i}"] for i in range(3)])
    x = np.eye(40, dtype=np.float32)
    (outputs,) = memory_answers(loaded, {"serving_default": {"x": x}})["serving_default"]
    np.testing.assert_array_equal(outputs["y"], whole)


def test_keras3_saved_by_tf_finds_its_values_by_the_object_graph(built):
    path = built("keras3_saved_by_tf")
    loaded = model.load(path)
    inputs = {"serving_default": {"inputs": rows(3, 8)}}
    assert_same(original_answers("keras3_saved_by_tf", path), memory_answers(loaded, inputs))


def test_a_value_that_the_checkpoint_lacks_is_named(built):
    prefix = str(built("shared_weights") / "variables" / "variables")
    with pytest.raises(TfoptError, match="nobody"):
        variables.read_checkpoint(prefix, [variables.CheckpointKey("nobody", "", tf.float32)])
    assert variables.read_checkpoint(prefix, []) == []
    with pytest.raises(TfoptError, match="checkpoint is missing"):
        variables.read_checkpoint(f"{prefix}-none", [variables.CheckpointKey("x", "", tf.float32)])


def test_function_names_do_not_grow():
    library = dict.fromkeys(["f", "f__tfopt_1"])
    assert variables.new_function_name("f", library) == "f__tfopt_2"
    assert variables.new_function_name("f__tfopt_1", library) == "f__tfopt_2"
