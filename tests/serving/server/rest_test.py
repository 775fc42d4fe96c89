import http.client
import json
import shutil
import socket
import statistics
import subprocess
import time

import pytest

from tests.serving.server.models import predict_request


def curl(server, path, body=None, *more):
    if shutil.which("curl") is None:
        pytest.skip("curl is not on the PATH")
    data = [] if body is None else ["-d", body]
    command = ["curl", "-s", "-w", "\n%{http_code}", *more, *data, f"http://{server.rest}{path}"]
    text = subprocess.run(command, capture_output=True, check=True, text=True, timeout=30).stdout
    content, _, code = text.rpartition("\n")
    return int(code), content


@pytest.mark.parametrize(
    "path, body, expected",
    [
        ("/v1/models/half:predict", '{"instances": [1.0, 2.0, 5.0]}', {"predictions": [3.5, 4.0, 5.5]}),
        ("/v1/models/half/versions/1:predict", '{"inputs": {"x": [1, 2]}}', {"outputs": [2.5, 3.0]}),
        ("/v1/models/half/labels/stable:predict", '{"instances": [0]}', {"predictions": [2.0]}),
        (
            "/v1/models/half:classify",
            '{"signature_name": "classify", "examples": [{"x": 1.0}, {"x": -2.0}]}',
            {"results": [[["high", 3.5]], [["low", 2.0]]]},
        ),
        (
            "/v1/models/half:regress",
            '{"signature_name": "regress", "context": {"x": 8.0}, "examples": [{}, {"x": 1.0}]}',
            {"results": [7.0, 3.5]},
        ),
        (
            "/v1/models/two:predict",
            '{"instances": [{"a": [1, 0, 1.5], "i": 3, "text": {"b64": "amE="}}]}',
            {"predictions": [{"product": [6.0, 8.5], "word": 4, "echo": "ja!", "odd": True,
                              "raw_bytes": {"b64": "amE="}}]},
        ),
    ],
)  # fmt: skip
def test_curl(server, path, body, expected):
    code, content = curl(server, path, body)
    assert (code, json.loads(content)) == (200, expected)


@pytest.mark.parametrize(
    "path, body, code, message",
    [
        ("/v1/models/none:predict", '{"instances": [1]}', 404, "Servable not found for request: Latest(none)"),
        ("/v1/models/half/versions/7:predict", '{"instances": [1]}', 404, "Servable not found for request: Spec"),
        ("/v1/models/half:predict", '{"instances": ["a"]}', 400, "is not of expected type: float"),
        ("/v1/models/half:predict", "{", 400, "JSON Parse error"),
        ("/v1/models/half:predict", '{"signature_name": "no", "instances": [1]}', 400, 'name: "no" not found in sign'),
        ("/v1/models/half:shout", "{}", 400, "Malformed request: POST /v1/models/half:shout"),
        ("/v1/models/half:classify", '{"examples": [{"x": 1.0}]}', 400, "Expected classification signature method"),
        ("/v1/models/none", None, 404, "Could not find any versions of model none"),
        ("/v1/models/half/labels/no:predict", '{"instances": [1]}', 400, "Unrecognized servable version label: no"),
        ("/v1/models", None, 400, "Missing model name in request."),
    ],
)
def test_errors_of_rest(server, path, body, code, message):
    found, content = curl(server, path, body)
    assert found == code and list(json.loads(content)) == ["error"] and message in json.loads(content)["error"]


def test_status_metadata_and_metrics_of_rest(server):
    code, content = curl(server, "/v1/models/half/versions/2")
    assert code == 200 and json.loads(content) == {
        "model_version_status": [
            {"version": "2", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
        ]
    }
    found = json.loads(curl(server, "/v1/models/half/metadata")[1])
    assert found["model_spec"] == {"name": "half", "signature_name": "", "version": "2"}
    signature = found["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert signature["inputs"]["x"]["dtype"] == "DT_FLOAT" and signature["method_name"].endswith("predict")
    code, content = curl(server, "/metrics")
    assert code == 200 and ':tensorflow:serving:request_count{model_name="half",status="OK"}' in content
    assert curl(server, "/monitoring/prometheus/metrics")[0] == 404


def test_a_client_that_hangs_up_in_the_middle_of_its_request_is_no_error(server):
    host, _, port = server.rest.rpartition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v1/models/half:predict HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{")
    assert curl(server, "/v1/models/half:predict", '{"instances": [0]}')[0] == 200
    assert "Traceback" not in server.log.read_text()


def test_an_answer_does_not_wait_for_an_acknowledgement(server, stub):
    """Without TCP_NODELAY each answer takes 40 ms more, 70 times what gRPC takes for the same."""
    host, _, port = server.rest.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=30)

    def by_rest():
        connection.request("POST", "/v1/models/half:predict", '{"instances": [1.0]}')
        assert connection.getresponse().read()

    def by_grpc():
        stub.Predict(predict_request([1.0]), 30)

    times: dict = {by_rest: [], by_grpc: []}
    for _ in range(30):
        for ask, found in times.items():
            begin = time.perf_counter()
            ask()
            found.append(time.perf_counter() - begin)
    assert statistics.median(times[by_rest]) < 20 * statistics.median(times[by_grpc])
