"""Requests that a server logged, as rows."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tfopt import batches, data
from tfopt.data import TensorSpec
from tfopt.errors import TfoptError

SPECS = {"x": TensorSpec("x", np.dtype(np.float32), (None, 2))}
SERIALIZED = {"examples": TensorSpec("examples", "string", (None,))}


def predict(signature="", **inputs):
    import tensorflow as tf
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    log = PredictionLog()
    request = log.predict_log.request
    request.model_spec.name = "m"
    request.model_spec.signature_name = signature
    for name, array in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    return log


def classify(rows, context=None):
    import tensorflow as tf
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    def feature(value):
        return tf.train.Feature(float_list=tf.train.FloatList(value=[value]))

    log = PredictionLog()
    message = log.classify_log.request.input
    lists = message.example_list if context is None else message.example_list_with_context
    for value in rows:
        lists.examples.add().features.feature["x"].CopyFrom(feature(value))
    if context is not None:
        lists.context.features.feature["c"].CopyFrom(feature(context))
        lists.context.features.feature["x"].CopyFrom(feature(-1.0))
    return log


def session_run():
    from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

    log = PredictionLog()
    log.session_run_log.request.model_spec.name = "m"
    return log


@pytest.fixture
def written(tmp_path):
    import tensorflow as tf

    def write(*messages):
        with tf.io.TFRecordWriter(str(tmp_path / "log")) as writer:
            for message in messages:
                writer.write(message.SerializeToString())
        return str(tmp_path / "log")

    return write


def rows(*values):
    return np.array([[v, 1] for v in values], np.float32)


@pytest.mark.parametrize("signature", [None, "serving_default"])
def test_rows_of_many_requests_and_what_is_left_out(written, signature):
    source = written(
        predict(x=rows(0, 1, 2)),
        predict("other", y=rows(9)),
        predict("serving_default", x=rows(3)),
        session_run(),
        predict("other", y=rows(9, 9)),
        predict(x=rows(4, 5, 6)).predict_log.request,  # a bare PredictRequest
    )
    found = data.load(source, SPECS, signature=signature)
    assert found.inputs["x"][:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6] and found.labels is None
    other = "with the inputs 'y'" if signature is None else "for signature 'other'"
    assert found.warnings == (
        f"{source}: 1 requests of kind session_run_log were left out",
        f"{source}: 2 requests {other} were left out",
    )
    stream = batches.cut(source, SPECS, size=4, signature=signature)
    batched = list(stream)
    assert [len(batch) for batch in batched] == [4, 3] and stream.needs_scan
    assert all(batch.warnings == found.warnings for batch in batched)
    np.testing.assert_array_equal(np.concatenate([b.inputs["x"] for b in batched]), found.inputs["x"])
    (part,) = stream.parts([stream.scan(source)])
    assert [b.inputs["x"].tolist() for b in stream.read(part)] == [b.inputs["x"].tolist() for b in batched]
    assert len(data.load(source, SPECS, limit=5)) == 5


def test_examples_of_classify_requests(written):
    import tensorflow as tf

    source = written(classify([0.0, 1.0]), classify([2.0], context=7.0))
    records = data.load(source, SERIALIZED).inputs["examples"]
    features = {"x": tf.io.FixedLenFeature([], tf.float32), "c": tf.io.FixedLenFeature([], tf.float32, -5.0)}
    parsed = tf.io.parse_example(records.tolist(), features)
    assert parsed["x"].numpy().tolist() == [0, 1, 2]  # the example's own, not the context's
    assert parsed["c"].numpy().tolist() == [-5, -5, 7]


def test_strings_and_inputs_without_rows(written):
    specs = {"s": TensorSpec("s", "string", (None,)), "rate": TensorSpec("rate", np.dtype(np.float32), ())}
    source = written(predict(s=[b"a\0", b"b"], rate=np.float32(0.5)), predict(s=[b"c"], rate=np.float32(0.5)))
    found = data.load(source, specs)
    assert found.inputs["s"].tolist() == [b"a\0", b"b", b"c"] and found.inputs["rate"] == 0.5
    source = written(predict(s=[b"a"], rate=np.float32(0.5)), predict(s=[b"c"], rate=np.float32(1)))
    with pytest.raises(TfoptError, match="'rate' has no row axis, and the requests give it different values"):
        data.load(source, specs)


@pytest.mark.parametrize(
    ("messages", "signature", "message"),
    [
        (
            lambda: [predict("a", x=rows(1), y=rows(1))],
            "a",
            "for signature 'a' names the inputs 'x', 'y'; it takes 'x'",
        ),
        (
            lambda: [predict(y=rows(1))],
            None,
            "no rows for these inputs; .*1 requests with the inputs 'y' were left out",
        ),
        (lambda: [predict(x=np.ones((2, 3), np.float32))], None, r"wants rows of shape \(2\), received \(3\)"),
        (lambda: [predict(x=np.float32(1))], None, "different numbers of rows"),
        (lambda: [predict(x=rows(1)), classify([1.0]).classify_log.request], None, "neither a PredictionLog nor"),
        (lambda: [classify([1.0])], None, "1 requests Classify, whose tf.Examples the signature does not take"),
        (lambda: [predict(x=rows(1)), predict(x=np.ones((1, 3), "f"))], None, "rows of one shape, received .2,., .3,."),
    ],
)
def test_what_cannot_be_read_is_one_line(written, messages, signature, message):
    source = written(*messages())
    for read in (data.load, lambda *a, **k: list(batches.cut(*a, size=4, **k))):
        with pytest.raises(TfoptError, match=message) as caught:
            read(source, SPECS, signature=signature)
        assert "\n" not in str(caught.value)


def test_examples_need_no_protos_of_serving(tmp_path, monkeypatch, written):
    import tensorflow as tf

    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis.predict_pb2", None)  # its import fails
    example = tf.train.Example()
    example.features.feature["x"].float_list.value.extend([1, 2])
    assert data.load(written(example), SPECS).inputs["x"].tolist() == [[1, 2]]
    with pytest.raises(
        TfoptError, match=r"logged requests: needs tensorflow-serving-api: pip install 'tfopt\[serving\]'"
    ):
        data.load(written(predict(x=rows(1))), SPECS)
