from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import serve_v1
from tfopt.errors import TfoptError
from tfopt.sources import as_saved_model


@pytest.fixture
def frozen(tmp_path):
    """split(relu(x @ kernel)) as a GraphDef: x float32 (None, 4) -> parts:0 and parts:1, each (None, 3)."""
    v1 = tf.compat.v1
    with tf.Graph().as_default() as graph:
        x = v1.placeholder(tf.float32, (None, 4), "x")
        kernel = tf.constant(np.arange(24, dtype=np.float32).reshape(4, 6) / 10 - 1, name="kernel")
        hidden = tf.nn.relu(tf.matmul(x, kernel), name="hidden")
        tf.split(hidden, 2, axis=1, name="parts")
        flag = v1.placeholder(tf.bool, (), "flag")
        tf.where(flag, hidden, -hidden, name="guarded")
        v1.get_variable("state", (2,))
    path = tmp_path / "frozen.pb"
    path.write_bytes(graph.as_graph_def().SerializeToString())
    return path


def test_outputs_by_tensor_name(frozen, tmp_path):
    path = as_saved_model(frozen, inputs=["x"], outputs=["parts", "parts:1", "hidden:0"], workdir=tmp_path)
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    outputs = serve_v1(path, {"x": x})
    assert set(outputs) == {"parts", "parts_1", "hidden"}
    expected = np.maximum(x @ (np.arange(24, dtype=np.float32).reshape(4, 6) / 10 - 1), 0)
    np.testing.assert_allclose(outputs["hidden"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(outputs["parts_1"], outputs["hidden"][:, 3:])


def test_signature_has_the_shapes_of_the_graph(frozen, tmp_path):
    path = as_saved_model(frozen, inputs=["x:0"], outputs=["parts"], workdir=tmp_path)
    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    spec = signature.structured_input_signature[1]["x"]
    assert spec.shape.as_list() == [None, 4] and spec.dtype == tf.float32
    assert signature.structured_outputs["parts"].shape.as_list() == [None, 3]


def test_an_inner_node_can_be_the_input(frozen, tmp_path):
    path = as_saved_model(frozen, inputs=["hidden"], outputs=["parts"], workdir=tmp_path)
    hidden = np.arange(12, dtype=np.float32).reshape(2, 6)
    np.testing.assert_array_equal(serve_v1(path, {"hidden": hidden})["parts"], hidden[:, :3])


@pytest.mark.parametrize(
    "inputs, outputs, text",
    [
        (None, ["parts"], r"give --inputs and --outputs. Placeholders: x, flag. Nodes that nothing reads: .*guarded"),
        (["x"], None, r"give --inputs and --outputs"),
        (["y"], ["parts"], r"no node for --inputs=y"),
        (["x"], ["part"], r"no node for --outputs=part; near it: parts"),
        (["x"], ["parts:2"], r"--outputs=parts:2: node 'parts' \(Split\) has 2 outputs"),
        (["x"], ["parts:z"], r"has 2 outputs"),
        (["x"], ["guarded"], r"need placeholders that --inputs does not name: flag"),
        (["x", "flag"], ["parts"], r"no output depends on --inputs=flag"),
        (["x"], ["parts", "state"], r"not frozen: node 'state' \(VarHandleOp\)"),
        (["parts:1"], ["parts"], r"has sibling outputs"),
    ],
)
def test_wrong_names_are_one_line(frozen, tmp_path, inputs, outputs, text):
    with pytest.raises(TfoptError, match=text) as error:
        as_saved_model(frozen, inputs=inputs, outputs=outputs, workdir=tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "source").exists()


def test_damaged_files(frozen, plain_module, tmp_path):
    whole = frozen.read_bytes()
    contents = {
        "half.pb": whole[: len(whole) // 2],
        "empty.pb": b"",
        "noise.pb": np.random.default_rng(0).bytes(1000),
        "renamed.pb": (plain_module / "saved_model.pb").read_bytes(),
        "unknown_op.pb": whole.replace(b"Relu", b"Rolo"),
    }
    expected = {"renamed.pb": "graph of a SavedModel", "unknown_op.pb": "TensorFlow refuses: .*Rolo"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TfoptError, match=expected.get(name, "damaged")) as error:
            as_saved_model(tmp_path / name, inputs=["x"], outputs=["hidden"], workdir=tmp_path)
        assert "\n" not in str(error.value)
