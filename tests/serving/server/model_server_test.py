"""The local server against the real one, tensorflow_model_server: the same requests, the same answers."""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import grpc
import numpy as np
import pytest
from tensorflow_serving.apis import prediction_service_pb2_grpc

from tests.serving.server.models import predict_request

BINARY = shutil.which("tensorflow_model_server")
pytestmark = [
    pytest.mark.model_server,
    pytest.mark.skipif(BINARY is None, reason="tensorflow_model_server is not on the PATH"),
]


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def real(models):
    """(gRPC, REST) addresses of the real server, with the models of the local one."""
    ports = free_port(), free_port()
    command = [
        BINARY, f"--port={ports[0]}", f"--rest_api_port={ports[1]}", f"--model_config_file={models}/models.config",
        "--allow_version_labels_for_unavailable_models=true",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", ports[1]), 1):
                break
            time.sleep(0.2)
        yield f"127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
    finally:
        process.terminate()
        process.wait(30)


def post(address, path, body):
    asked = urllib.request.Request(f"http://{address}{path}", body.encode())
    try:
        with urllib.request.urlopen(asked, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.mark.parametrize(
    "path, body",
    [
        ("half:predict", '{"instances": [1.0, 2.0, 0.1, 1e10, 1e-7]}'),
        ("half/versions/1:predict", '{"inputs": [1.0, 2.0]}'),
        ("half/labels/stable:predict", '{"instances": [0]}'),
        ("half:classify", '{"signature_name": "classify", "examples": [{"x": 1.0}, {"x": -2.0}]}'),
        ("half:regress", '{"signature_name": "regress", "context": {"x": 8.0}, "examples": [{}, {"x": 1.0}]}'),
        ("two:predict", '{"instances": [{"a": [1, 0, 1.5], "i": 3, "text": {"b64": "amE="}}]}'),
        ("two:predict", '{"inputs": {"a": [[1, 0, 1.5]], "i": [3], "text": ["nein"]}}'),
        ("half:predict", '{"instances": ["a"]}'),
        ("half:predict", '{"instances": [[1], 2]}'),
        ("half:predict", '{"signature_name": "no", "instances": [1]}'),
        ("none:predict", '{"instances": [1]}'),
        ("half:shout", "{}"),
        ("half:classify", '{"examples": [{"x": 1.0}]}'),
    ],
)
def test_rest(real, server, path, body):
    assert post(server.rest, f"/v1/models/{path}", body) == post(real[1], f"/v1/models/{path}", body)


@pytest.mark.parametrize(
    "request_",
    [
        predict_request(),
        predict_request(version=1),
        predict_request(label="stable"),
        predict_request(name="none"),
        predict_request(version=9),
        predict_request(signature="no"),
        predict_request(None),
        predict_request(y=np.float32([1])),
    ],
)
def test_grpc(real, server, request_):
    found = []
    for address in (real[0], server.grpc):
        with grpc.insecure_channel(address) as channel:
            try:
                found.append(prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request_, 30))
            except grpc.RpcError as error:
                found.append((error.code(), error.details()))
    assert found[0] == found[1]
