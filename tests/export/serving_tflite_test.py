from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from flatbuffers import flexbuffers
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from tests.conftest import serve_v1
from tests.origins import rows, save_module
from tfopt import model
from tfopt.errors import TfoptError
from tfopt.export import saved_model, tflite
from tfopt.export.fixed_batch import fix_batch
from tfopt.export.serving_tflite import add
from tfopt.passes import merge_duplicates, prune_graph
from tfopt.rewrite import Log


class Served:
    """What tflite_session.cc of TensorFlow Serving makes of a file: its signatures, and how it answers."""

    def __init__(self, path):
        content = (path / "model.tflite").read_bytes()
        parsed = schema.ModelT.InitFromPackedBuf(content, 0)
        self.interpreter = Interpreter(model_content=content)
        details = self.interpreter.get_input_details(), self.interpreter.get_output_details()  # of the first subgraph
        self.inputs, self.outputs = ({d["name"]: d for d in side} for side in details)
        assert all(len(side) == len(found) for side, found in zip(details, (self.inputs, self.outputs), strict=True))
        self.signatures = {}
        for entry in parsed.metadata:
            if entry.name == b"signature_defs_metadata":
                stored = flexbuffers.GetRoot(bytearray(parsed.buffers[entry.buffer].data)).AsMap
                for key in stored.Keys:
                    text = bytes(stored[key.AsKey].AsStringBytes).split(b"\0")[0]  # as a C string
                    self.signatures[str(key.AsKey)] = SignatureDef.FromString(text)

    def __call__(self, name, inputs):
        definition = self.signatures[name]
        for key, value in inputs.items():
            detail = self.inputs[definition.inputs[key].name]
            self.interpreter.resize_tensor_input(detail["index"], value.shape)
            self.interpreter.allocate_tensors()
        for key, value in inputs.items():
            self.interpreter.set_tensor(self.inputs[definition.inputs[key].name]["index"], value)
        self.interpreter.invoke()
        return {
            key: self.interpreter.get_tensor(self.outputs[info.name]["index"])
            for key, info in definition.outputs.items()
        }


def _convert(loaded, path, names=("float32",), batch=None, **options):
    """The serving model and its TFLite file; returns the path of the file."""
    saved_model.save(loaded, path / "1")
    saved_model.save(fix_batch(loaded, batch) if batch else loaded, path / "frozen", max_constant_bytes=1 << 30)
    (made,) = tflite.convert(path / "frozen", names, path / "device", **options)
    assert made.error is None, made.error
    return made.path


@pytest.fixture(scope="module")
def convnet(keras3_convnet, tmp_path_factory):
    """(a folder with a serving model in `1`, its TFLite file with an open batch, the loaded model)."""
    path = tmp_path_factory.mktemp("convnet")
    loaded = model.load(keras3_convnet)
    prune_graph.run(loaded, Log())
    merge_duplicates.run(loaded, Log())
    return path, _convert(loaded, path), loaded


def test_a_server_finds_the_names_of_the_signature(convnet):
    path, file, loaded = convnet
    notes = add(path / "1", file, loaded.signatures)
    served = Served(path / "1")
    assert set(served.signatures) == {"serve", "serving_default"}  # one computation under two names
    assert not any("answered only without" in note for note in notes)
    for size in (1, 5):
        x = rows(size, 8, 8, 1)
        np.testing.assert_allclose(
            list(served("serving_default", {"image": x}).values()),
            list(serve_v1(path / "1", {"image": x}).values()),
            atol=1e-5,
        )
    assert list(served.inputs) == ["image"]  # what a server falls back on
    definition = served.signatures["serving_default"]
    assert definition.method_name == "tensorflow/serving/predict" and definition.inputs["image"].dtype == 1
    assert [d.size for d in definition.inputs["image"].tensor_shape.dim] == [-1, 8, 8, 1]


class _Several(tf.Module):
    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(rows(4, 4, seed=1))

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
    def another(self, x):
        """The converter writes it before serving_default."""
        return {"x": tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ self.kernel)), (0, x))[1]}

    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
    def serving_default(self, x):
        y = tf.while_loop(lambda i, h: i < 2, lambda i, h: (i + 1, tf.sin(h @ self.kernel)), (0, x))[1]
        return {"x": y, "total": tf.reduce_sum(y)}


def test_one_of_several_signatures_is_served(tmp_path):
    save_module(tmp_path / "m", _Several(), "another", "serving_default")
    loaded = model.load(tmp_path / "m")
    file = _convert(loaded, tmp_path)
    notes = add(tmp_path / "1", file, loaded.signatures)
    served = Served(tmp_path / "1")
    assert list(served.signatures) == ["serving_default"]
    assert any("serves signature 'serving_default' alone; 'another' is answered only without" in note for note in notes)
    x = rows(3, 4)
    expected = serve_v1(tmp_path / "1", {"x": x})
    received = served("serving_default", {"x": x})
    assert received.keys() == expected.keys() == {"x", "total"}
    for name, value in expected.items():
        np.testing.assert_allclose(received[name], value, atol=1e-5)
    # The other one is still there for whoever reads the file as TFLite.
    runner = served.interpreter.get_signature_runner("another")
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(tmp_path / "1")).signature_def["another"]
        expected = session.run(meta.outputs["x"].name, {meta.inputs["x"].name: x})
    np.testing.assert_allclose(runner(x=x)["x"], expected, atol=1e-5)


def test_a_fixed_batch_and_int8_ends_are_said(keras3_convnet, tmp_path):
    from tfopt.data import Dataset

    loaded = model.load(keras3_convnet)
    data = {name: Dataset({"image": rows(50, 8, 8, 1)}, None, "rows") for name in loaded.signatures}
    file = _convert(loaded, tmp_path, ("int8",), batch=1, representative=data, io_type="int8")
    notes = add(tmp_path / "1", file, loaded.signatures)
    assert any("batch of input 'image' (1) is fixed" in note for note in notes)
    assert any("'image' is int8 in the TFLite file and float32 in the SavedModel" in note for note in notes)
    assert Served(tmp_path / "1").signatures["serving_default"].inputs["image"].dtype == tf.int8.as_datatype_enum


def test_what_tensorflow_serving_tests_itself_with_has_no_signatures(shared, tmp_path):
    file = shared / "models/tf-serving-testdata/saved_model_half_plus_two_tflite/00000123/model.tflite"
    with pytest.raises(TfoptError, match=r"none of the signatures 'serving_default'.* it has no signatures"):
        add(tmp_path, file, {"serving_default": SignatureDef()})
    assert not (tmp_path / "model.tflite").exists()


@pytest.mark.parametrize("op", ["FlexErf", "VAR_HANDLE"])
def test_ops_that_a_server_lacks_are_named(op, convnet, tmp_path):
    from tfopt.export.tflite_names import pack

    _, file, loaded = convnet
    parsed = schema.ModelT.InitFromPackedBuf(file.read_bytes(), 0)
    code = schema.OperatorCodeT()
    code.builtinCode = schema.BuiltinOperator.VAR_HANDLE if op == "VAR_HANDLE" else schema.BuiltinOperator.CUSTOM
    code.deprecatedBuiltinCode = 127 if op == "VAR_HANDLE" else 32
    code.customCode = None if op == "VAR_HANDLE" else op
    parsed.operatorCodes.append(code)
    (tmp_path / "odd.tflite").write_bytes(pack(parsed))
    with pytest.raises(TfoptError, match=op):
        add(tmp_path, tmp_path / "odd.tflite", loaded.signatures)


def test_a_damaged_file_ends_in_one_line(tmp_path):
    (tmp_path / "bad.tflite").write_bytes(b"no model")
    with pytest.raises(TfoptError, match=r"bad\.tflite: cannot be read as a TFLite model"):
        add(tmp_path, tmp_path / "bad.tflite", {"serving_default": SignatureDef()})
