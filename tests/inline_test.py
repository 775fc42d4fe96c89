from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import TensorInfo

from tests.origins import answers, assert_same, memory_answers, rows, save_tf1, v1
from tfopt import inline, model
from tfopt.errors import TfoptError


@pytest.mark.parametrize(
    ("name", "parts"),
    [("shared_weights", [""]), ("tf1_sparse", ["values", "indices", "dense_shape"]), ("tf1_ragged", ["0", "1"])],
)
def test_the_components_of_a_tensor_are_named_and_renamed(name, parts, built):
    signature = next(iter(model.load(built(name)).signatures.values()))
    info = TensorInfo()
    info.CopyFrom(next(iter(signature.inputs.values())))
    assert [component for component, _ in inline.tensor_names(info)] == parts
    for component in parts:
        inline.set_tensor_name(info, component, f"new/{component}:0")
    assert dict(inline.tensor_names(info)) == {component: f"new/{component}:0" for component in parts}


@pytest.mark.parametrize("name", ["shared_weights", "keras3_export", "control_flow", "counter"])
def test_no_call_is_left_and_control_flow_is(name, built):
    graph = model.load(built(name)).graph
    ops = {node.op for node in graph.nodes.values()}
    assert not ops & {"PartitionedCall", "StatefulPartitionedCall"}
    assert bool(ops & {"If", "While", "StatelessIf", "StatelessWhile"}) == (name in ("control_flow", "counter"))
    stale = {"_class", "_output_shapes", "_noinline", "api_implements"}
    assert not any(stale & set(node.attr) or node.device for node in graph.nodes.values())


def test_defaults_that_the_exporter_left_out_are_written_out(built):
    graph = model.load(built("tf1_ref_variables")).graph
    (matmul,) = [node for node in graph.nodes.values() if node.op == "MatMul"]
    assert "transpose_a" in matmul.attr and matmul.attr["transpose_a"].b is False


def _assignments(path, use_resource):
    """Reads before and after assignments whose outputs are used, as TF 1 reference variables allow."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [3], "x")
        total = v1.get_variable("total", initializer=rows(3, seed=1), use_resource=use_resource)
        table = v1.get_variable("table", initializer=rows(4, 3, seed=2), use_resource=use_resource)
        before = total + 0.0  # an Identity of a reference would see the assignment
        with tf.control_dependencies([before]):
            after = v1.assign_add(total, x)
        with tf.control_dependencies([after]):
            changed = v1.scatter_add(table, [1, 2], tf.stack([x, x]))
        session.run(v1.global_variables_initializer())
        outputs = {"before": before, "after": tf.identity(after), "table": tf.identity(changed)}
        save_tf1(path, session, {"serving_default": ({"x": x}, outputs)})


@pytest.mark.parametrize("use_resource", [False, True])
def test_assignments_to_variables_of_tf1_keep_their_order(use_resource, tmp_path):
    _assignments(tmp_path / "m", use_resource)
    inputs = {"serving_default": {"x": np.array([1, 2, 3], np.float32)}}
    expected = answers(tmp_path / "m", inputs, 3)
    assert (expected["serving_default"][1]["before"] != expected["serving_default"][0]["before"]).all()
    loaded = model.load(tmp_path / "m")
    assert len(loaded.state) == 2
    assert_same(expected, memory_answers(loaded, inputs, 3))


def test_an_op_on_a_reference_variable_that_cannot_be_upgraded_is_named(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [2, 3], "x")
        table = v1.get_variable("table", initializer=rows(4, 3, seed=2), use_resource=False)
        y = tf.identity(v1.scatter_mul(table, [1, 2], x))
        session.run(v1.global_variables_initializer())
        save_tf1(tmp_path / "m", session, {"serving_default": ({"x": x}, {"y": y})})
    with pytest.raises(TfoptError, match="ScatterMul"):
        model.load(tmp_path / "m")


def test_a_tensor_that_is_not_there_is_named(built, tmp_path):
    import shutil

    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    for kind in ("inputs", "outputs"):
        path = tmp_path / kind
        shutil.copytree(built("shared_weights"), path)
        saved = SavedModel.FromString((path / "saved_model.pb").read_bytes())
        infos = getattr(saved.meta_graphs[0].signature_def["score"], kind)
        next(iter(infos.values())).name = "gone:0"
        (path / "saved_model.pb").write_bytes(saved.SerializeToString())
        with pytest.raises(TfoptError, match=f"signature 'score': {kind[:-1]} tensor 'gone:0' is not in the graph"):
            model.load(path)
