"""Warmup requests: what they cover, that they run in a v1 session and at a server, and what is refused."""

from __future__ import annotations

import shutil
from concurrent import futures

import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2, prediction_service_pb2_grpc

from tests.origins import ORIGINS
from tfopt.errors import TfoptError
from tfopt.serving import warmup


@pytest.fixture
def copied(built, tmp_path):
    """A function from the name of a model in tests/origins.py, or a path, to a copy that may be written."""

    def copy(model):
        source = built(model) if isinstance(model, str) else model
        shutil.copytree(source, tmp_path / "1", copy_function=shutil.copyfile)
        return tmp_path / "1"

    return copy


def sizes_of(logs):
    """(signature, rows) of Predict requests."""
    found = []
    for log in logs:
        request = log.predict_log.request
        tensors = [tf.make_ndarray(t) for t in request.inputs.values()]
        found.append((request.model_spec.signature_name, len(tensors[0])))
    return found


def test_every_signature_at_every_batch_size(copied):
    model = copied("shared_weights")
    summary = warmup.write(model, [8, 2], model_name="m")
    assert summary.path == model / "assets.extra" / "tf_serving_warmup_requests"
    assert summary.covered == {"double": [2, 8], "score": [2, 8]} and not summary.skipped
    assert summary.records == 4 and summary.bytes == summary.path.stat().st_size
    logs = list(warmup.read(summary.path))
    assert sizes_of(logs) == [("double", 2), ("double", 8), ("score", 2), ("score", 8)]
    assert {log.predict_log.request.model_spec.name for log in logs} == {"m"}
    with warmup.Session(model) as session:
        assert warmup.replay(summary.path, session) == 4
    assert "4 warmup requests" in summary.lines()[0]
    assert warmup.write(model, [1], signatures=["score"]).records == 1  # replaces the file
    assert len(list(warmup.read(summary.path))) == 1


@pytest.mark.parametrize("name", ["strings", "static_tables", "dtypes", "unicode_names", "several_ports"])
def test_inputs_that_the_model_accepts_are_drawn(copied, name):
    model = copied(name)
    summary = warmup.write(model, [3])
    assert summary.covered == {signature: [3] for signature in ORIGINS[name].inputs}
    with warmup.Session(model) as session:
        assert warmup.replay(summary.path, session) == summary.records


def test_state_is_not_touched(copied):
    model = copied("counter")
    summary = warmup.write(model, [1])
    assert list(summary.covered) == ["peek"]
    assert "assigns state" in summary.skipped["count"]


def test_sparse_inputs_cannot_be_sent(copied):
    summary = warmup.write(copied("tf1_sparse"), [1])
    assert all("sparse or ragged" in why for why in summary.skipped.values()) and summary.skipped
    assert (summary.path is None) == (not summary.covered)


def test_real_rows(copied, tmp_path):
    rows = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.savez(tmp_path / "rows.npz", x=rows)
    model = copied("shared_weights")
    summary = warmup.write(model, [2, 5], data=str(tmp_path / "rows.npz"), signatures=["score"])
    assert summary.source == str(tmp_path / "rows.npz")
    small, large = (tf.make_ndarray(log.predict_log.request.inputs["x"]) for log in warmup.read(summary.path))
    np.testing.assert_array_equal(small, rows[:2])
    np.testing.assert_array_equal(large, rows[[0, 1, 2, 0, 1]])


def test_classify_and_regress_requests_of_a_real_estimator(copied, shared):
    model = copied(shared / "models" / "tfx-chicago-taxi" / "estimator_serving")
    source = str(shared / "data" / "chicago-taxi" / "tfexamples" / "Split-eval" / "*")
    summary = warmup.write(model, [1, 4], data=source, signatures=["classification", "regression", "predict"])
    assert summary.records == 6 and not summary.skipped and summary.source == source
    kinds = [warmup.target(log)[0] for log in warmup.read(summary.path)]
    assert sorted(kinds) == ["classify"] * 2 + ["predict"] * 2 + ["regress"] * 2
    with warmup.Session(model) as session:
        log = next(log for log in warmup.read(summary.path) if warmup.target(log)[0] == "classify")
        assert np.isfinite(session(log)["scores"]).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: setattr(r.model_spec, "signature_name", "gone"), "no signature 'gone'; there are 'double', 'score'"),
        (lambda r: r.inputs.pop("x"), "takes ['x'], received []"),
        (lambda r: r.inputs["x"].CopyFrom(tf.make_tensor_proto([[1, 2, 3, 4]])), "is float32, received int32"),
        (lambda r: r.inputs["x"].CopyFrom(tf.make_tensor_proto([[1.0]])), "cannot run"),
    ],
)
def test_a_record_that_fails_is_named(copied, change, words):
    model = copied("shared_weights")
    path = warmup.write(model, [1]).path
    logs = list(warmup.read(path))
    change(logs[1].predict_log.request)
    with tf.io.TFRecordWriter(str(path)) as writer:
        for log in logs:
            writer.write(log.SerializeToString())
    with warmup.Session(model) as session, pytest.raises(TfoptError) as caught:
        warmup.replay(path, session)
    assert f"{path}: record 1: " in str(caught.value) and words in str(caught.value)


def test_bad_requests_end_in_one_line(copied, tmp_path):
    model = copied("shared_weights")
    for sizes, words in (([], "at least 1"), ([0], "at least 1"), (range(1, 502), "more than the 1000")):
        with pytest.raises(TfoptError, match=words):
            warmup.write(model, list(sizes))
    assert not (model / "assets.extra").exists()
    (tmp_path / "damaged").write_bytes(b"no TFRecord at all, this is")
    with pytest.raises(TfoptError, match="record 0 cannot be read"):
        list(warmup.read(tmp_path / "damaged"))
    with pytest.raises(TfoptError, match="found session_run"):
        warmup.target(prediction_log_pb2.PredictionLog(session_run_log={}))


def test_replay_at_a_server(copied):
    grpc = pytest.importorskip("grpc")
    model = copied("shared_weights")
    path = warmup.write(model, [1, 2]).path
    seen = []

    class Answers(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):  # noqa: N802
            seen.append((request.model_spec.name, request.model_spec.signature_name))
            if len(seen) > 4:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, "enough")
            return predict_pb2.PredictResponse()

    server = grpc.server(futures.ThreadPoolExecutor(1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(Answers(), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        assert warmup.replay(path, warmup.server(address, "taxi")) == 4
        assert seen == [("taxi", "double")] * 2 + [("taxi", "score")] * 2
        with pytest.raises(TfoptError, match=r"record 0: .*INVALID_ARGUMENT: enough"):
            warmup.replay(path, warmup.server(address, "taxi"))
    finally:
        server.stop(None)
