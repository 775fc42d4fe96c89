"""Requests from rows and files, over both protocols, without a server."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis.classification_pb2 import ClassificationRequest
from tensorflow_serving.apis.predict_pb2 import PredictRequest, PredictResponse
from tensorflow_serving.apis.prediction_log_pb2 import PredictionLog

from tfopt.data import STRING, Dataset, TensorSpec
from tfopt.errors import TfoptError
from tfopt.runtime import Signature
from tfopt.serving.loadtest import requests
from tfopt.serving.loadtest.plan import Target

GRPC = Target("localhost:1", model_name="m", model_version=3)
REST = Target("localhost:1", "rest", "m")


def spec(name, dtype, *shape):
    return TensorSpec(name, dtype if dtype == STRING else np.dtype(dtype), shape)


def signature(*specs):
    return Signature({each.name: each for each in specs}, {"y": spec("y", "float32", None)})


def rows(**inputs):
    return Dataset(inputs, None, "test")


def test_grpc_requests_hold_the_rows():
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    made = requests.from_rows(GRPC, signature(spec("x", "float32", None, 2)), rows(x=x), 2)
    assert len(made) == 2 and [request.rows for request in made] == [2, 2]
    parsed = PredictRequest.FromString(made[1].body)
    assert parsed.model_spec.name == "m" and parsed.model_spec.version.value == 3
    assert parsed.model_spec.signature_name == "serving_default"
    np.testing.assert_array_equal(tf.make_ndarray(parsed.inputs["x"]), x[2:4])


def test_fewer_rows_than_a_request_takes():
    (request,) = requests.from_rows(GRPC, signature(spec("x", "int64", None)), rows(x=np.arange(3)), 8)
    assert request.rows == 3


def test_rest_rows():
    names = np.array([b"a", b"\xff"], object)
    x = np.array([0.1, 0.25], np.float32)
    (request,) = requests.from_rows(
        REST, signature(spec("s", STRING, None), spec("x", "float32", None)), rows(s=names, x=x), 2
    )
    body = json.loads(request.body)
    assert body["instances"][1] == {"s": {"b64": base64.b64encode(b"\xff").decode()}, "x": 0.25}
    assert body["instances"][0]["x"] == 0.1  # the shortest number that is this float32
    assert request.method == "predict" and body["signature_name"] == "serving_default"


def test_rest_of_one_input_has_bare_rows():
    (request,) = requests.from_rows(REST, signature(spec("x", "int64", None, 2)), rows(x=np.array([[1, 2]])))
    assert json.loads(request.body)["instances"] == [[1, 2]]


def test_rest_is_columnar_where_an_input_has_no_rows():
    made = signature(spec("user", "float32", 1, 2), spec("item", "int64", None))
    data = Dataset({"user": np.ones((1, 2), np.float32), "item": np.arange(4)}, None, "test", frozenset({"user"}))
    (request,) = requests.from_rows(REST, made, data, 4)
    assert json.loads(request.body)["inputs"] == {"user": [[1.0, 1.0]], "item": [0, 1, 2, 3]}


def write(path, *records):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in records:
            writer.write(record.SerializeToString())
    return str(path)


def predict_request():
    request = PredictRequest()
    request.model_spec.name = "other"
    request.model_spec.version.value = 7
    request.model_spec.signature_name = "score"
    request.inputs["x"].CopyFrom(tf.make_tensor_proto(np.ones((4, 2), np.float32)))
    return request


def log(kind, request):
    made = PredictionLog()
    getattr(made, kind).request.CopyFrom(request)
    return made


def test_ready_requests_go_to_the_target(tmp_path):
    for file in (
        write(tmp_path / "logs", log("predict_log", predict_request())),
        write(tmp_path / "requests", predict_request()),
    ):
        assert requests.holds_requests(file)
        (request,) = requests.from_file(GRPC, file)
        parsed = PredictRequest.FromString(request.body)
        assert (parsed.model_spec.name, parsed.model_spec.version.value) == ("m", 3)
        assert parsed.model_spec.signature_name == "score" and request.rows == 4
        (request,) = requests.from_file(REST, file)
        assert json.loads(request.body) == {"signature_name": "score", "inputs": {"x": [[1.0, 1.0]] * 4}}


def test_classify_logs(tmp_path):
    classify = ClassificationRequest()
    classify.input.example_list.examples.add().features.feature["x"].int64_list.value.append(1)
    file = write(tmp_path / "logs", log("classify_log", classify))
    (request,) = requests.from_file(GRPC, file)
    assert request.method == "Classify" and request.rows == 1
    with pytest.raises(TfoptError, match="record 0 is a Classify request; over REST only Predict"):
        requests.from_file(REST, file)


def test_examples_are_rows_and_no_requests(tmp_path):
    example = tf.train.Example()
    example.features.feature["x"].float_list.value[:] = [1, 2]
    file = write(tmp_path / "examples", example, example)
    assert not requests.holds_requests(file)
    made, _ = requests.load(GRPC, signature(spec("examples", STRING, None)), file)
    tensor = PredictRequest.FromString(made[0].body).inputs["examples"]
    assert tensor.string_val[0] == example.SerializeToString() and len(made) == 2


def test_random_rows():
    made, (warning,) = requests.load(GRPC, signature(spec("x", "float32", None, 2)), None, 4)
    assert len(made) == 64 and "random inputs" in warning
    with pytest.raises(TfoptError, match="--data: the signature takes strings"):
        requests.load(GRPC, signature(spec("x", STRING, None)), None)


@pytest.mark.parametrize(
    "values, wrong",
    [([1.0, 2.0], None), ([1.0, np.nan], "output 'y' is not finite"), (None, "outputs ['z'], wanted ['y']")],
)
def test_grpc_answers_are_checked(values, wrong):
    check = requests.checker(signature(), GRPC)
    answer = PredictResponse()
    answer.outputs["y" if values else "z"].CopyFrom(tf.make_tensor_proto(np.float32(values or [0])))
    assert check(0, answer.SerializeToString()) == wrong


@pytest.mark.parametrize(
    "body, wrong",
    [(b'{"predictions": [1]}', None), (b"{", "not JSON"), (b'{"outputs": [NaN]}', "not finite"), (b"[]", "neither")],
)
def test_rest_answers_are_checked(body, wrong):
    found = requests.checker(signature(), REST)(0, body)
    assert (found is None) == (wrong is None) and (wrong is None or found.startswith(wrong))
