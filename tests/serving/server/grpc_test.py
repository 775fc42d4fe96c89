import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from tests.serving.server.models import example, predict_request


def test_predict_as_the_documents_of_tensorflow_serving_write_it(stub):
    response = stub.Predict(predict_request(), 10)
    assert list(response.outputs["y"].float_val) == [3.5, 4.0, 5.5]
    assert tf.make_ndarray(response.outputs["y"]).tolist() == [3.5, 4.0, 5.5]
    spec = response.model_spec
    assert (spec.name, spec.version.value, spec.signature_name) == ("half", 2, "serving_default")
    for chosen in ({"version": 1}, {"label": "stable"}):
        response = stub.Predict(predict_request(**chosen), 10)
        assert list(response.outputs["y"].float_val) == [2.5, 3.0, 4.5] and response.model_spec.version.value == 1


def test_several_inputs_and_an_output_filter(stub):
    text = np.array([b"ja", b"nein", b"\xff"], object)
    asked = predict_request(None, "two", a=np.ones((3, 3), np.float32), i=np.arange(3), text=text)
    found = stub.Predict(asked, 10).outputs
    assert sorted(found) == ["echo", "odd", "product", "raw_bytes", "word"]
    assert tf.make_ndarray(found["product"]).tolist() == [[6, 9]] * 3
    assert tf.make_ndarray(found["word"]).tolist() == [1, 3, 1]
    assert list(found["echo"].string_val) == [b"ja!", b"nein!", b"\xff!"]
    asked.output_filter.extend(["odd", "word"])
    found = stub.Predict(asked, 10).outputs
    assert sorted(found) == ["odd", "word"] and tf.make_ndarray(found["odd"]).tolist() == [False, True, False]


def filtered(*names):
    made = predict_request()
    made.output_filter.extend(names)
    return made


@pytest.mark.parametrize(
    "asked, code, words",
    [
        (predict_request(name="none"), "NOT_FOUND", "Servable not found for request: Latest(none)"),
        (predict_request(version=9), "NOT_FOUND", "Servable not found for request: Specific(half, 9)"),
        (predict_request(name=""), "INVALID_ARGUMENT", "ModelSpec has no name specified."),
        (predict_request(label="no"), "INVALID_ARGUMENT", "Unrecognized servable version label: no"),
        (predict_request(signature="no"), "FAILED_PRECONDITION", 'Serving signature key "no" not found.'),
        (
            predict_request(y=1.0),
            "INVALID_ARGUMENT",
            "input size does not match signature: 2!=1 len({x,y}) != len({x}). Sent extra: {y}. Missing but required: "
            "{}.",
        ),
        (
            predict_request(None),
            "INVALID_ARGUMENT",
            "0!=1 len({}) != len({x}). Sent extra: {}. Missing but",
        ),
        (predict_request(None, x=np.int32([1])), "INVALID_ARGUMENT", "int32"),
        (
            predict_request(None, "two", a=np.float32([[1]]), i=np.array([1]), text=["a"]),
            "INVALID_ARGUMENT",
            "Matrix size-incompatible",
        ),
        (filtered("z"), "INVALID_ARGUMENT", "output tensor alias not found in signature: z Outputs expected to be in"),
        (filtered("y", "y"), "INVALID_ARGUMENT", "duplicate output tensor alias: y"),
    ],
)
def test_error_codes_and_messages(stub, asked, code, words):
    with pytest.raises(grpc.RpcError) as error:
        stub.Predict(asked, 10)
    assert error.value.code().name == code and words in error.value.details()


def test_classify_regress_and_both_at_once(stub):
    asked = classification_pb2.ClassificationRequest()
    asked.model_spec.name, asked.model_spec.signature_name = "half", "classify"
    asked.input.example_list.examples.extend([example(x=1.0), example(x=-2.0)])
    answer = stub.Classify(asked, 10)
    found = [[(c.label, c.score) for c in row.classes] for row in answer.result.classifications]
    assert found == [[("high", 3.5)], [("low", 2.0)]] and answer.model_spec.version.value == 2
    regress = regression_pb2.RegressionRequest(input=asked.input)
    regress.model_spec.name, regress.model_spec.signature_name = "half", "regress"
    regress.input.example_list_with_context.context.CopyFrom(example(x=4.0))
    regress.input.example_list_with_context.examples.extend([tf.train.Example(), example(x=6.0)])
    assert [r.value for r in stub.Regress(regress, 10).result.regressions] == [5.0, 6.0]
    both = inference_pb2.MultiInferenceRequest(input=asked.input)
    for method in ("classify", "regress"):
        task = both.tasks.add(method_name=f"tensorflow/serving/{method}")
        task.model_spec.name, task.model_spec.signature_name = "half", method
    first, second = stub.MultiInference(both, 10).results
    assert first.classification_result == answer.result
    assert [r.value for r in second.regression_result.regressions] == [3.5, 2.0]
    asked.model_spec.signature_name = "serving_default"
    with pytest.raises(grpc.RpcError, match="Expected classification signature method_name to be") as error:
        stub.Classify(asked, 10)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    asked.ClearField("input")
    asked.model_spec.signature_name = "classify"
    with pytest.raises(grpc.RpcError, match="Input is empty"):
        stub.Classify(asked, 10)


def test_metadata_and_status(stub, channel):
    asked = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    asked.model_spec.name = "half"
    response = stub.GetModelMetadata(asked, 10)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures) and response.model_spec.version.value == 2
    assert signatures.signature_def["regress"].method_name == "tensorflow/serving/regress"
    service = model_service_pb2_grpc.ModelServiceStub(channel)
    status = get_model_status_pb2.GetModelStatusRequest()
    status.model_spec.name = "half"
    found = service.GetModelStatus(status, 10).model_version_status
    assert [(v.version, v.state, v.status.error_code) for v in found] == [(2, 30, 0), (1, 30, 0)]
    wrong = model_management_pb2.ReloadConfigRequest()
    with pytest.raises(grpc.RpcError, match="Only ModelConfigList is currently supported"):
        service.HandleReloadConfigRequest(wrong, 10)


def test_a_message_larger_than_grpc_takes_by_default(server):
    big = np.arange(3_000_000, dtype=np.float32)
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.grpc, options=options) as channel:
        answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(predict_request(big), 60)
    np.testing.assert_array_equal(tf.make_ndarray(answer.outputs["y"]), big / 2 + 3)
