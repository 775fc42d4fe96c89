import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import prediction_log_pb2

from tests.serving.server.models import example, half_plus, predict_request
from tfopt.serving.server.errors import ServingError
from tfopt.serving.server.servable import LoadOptions
from tfopt.serving.server.warmup import FILE, load


def predict(x=1.0):
    return prediction_log_pb2.PredictionLog(
        predict_log=prediction_log_pb2.PredictLog(request=predict_request(np.float32([x]), name="any"))
    )


def regress():
    log = prediction_log_pb2.PredictionLog()
    log.regress_log.request.model_spec.signature_name = "regress"
    log.regress_log.request.input.example_list.examples.append(example(x=1.0))
    return log


def bad():
    log = predict()
    log.predict_log.request.inputs["y"].CopyFrom(log.predict_log.request.inputs["x"])
    return log


def write(path, logs):
    (path / FILE).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(path / FILE)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())


def test_requests_are_replayed_before_the_version_is_there(tmp_path, caplog):
    caplog.set_level("INFO")
    path = half_plus(tmp_path, 1)
    write(path, [predict(), regress()] * 5)
    servable = load("m", 1, path, LoadOptions())
    assert "m, version 1: 10 warmup requests in" in caplog.text
    assert len(servable._callables) == 2
    servable.close()


@pytest.mark.parametrize(
    "logs, words",
    [
        ([predict(), bad()], "warmup request 2 of .*tf_serving_warmup_requests: input size does not match"),
        ([predict()] * 1001, r"exceeds the maximum \(1000\)"),
        ([prediction_log_pb2.PredictionLog()], "Unsupported log_type for warmup"),
    ],
)
def test_a_request_that_fails_or_too_many_keep_the_version_away(tmp_path, logs, words):
    path = half_plus(tmp_path, 1)
    write(path, logs)
    with pytest.raises(ServingError, match=words):
        load("m", 1, path, LoadOptions())
    load("m", 1, path, LoadOptions(warmup=False)).close()
