"""client.py and signatures.json: what goes beside a model makes the requests that the model takes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from tests.serving import examples
from tfopt.comparison import compare
from tfopt.optimize import Options, optimize
from tfopt.serving.server.child import running


@pytest.fixture(scope="module")
def optimized(tmp_path_factory):
    """The model of every kind of feature through the recipe; returns (original, output directory)."""
    directory = tmp_path_factory.mktemp("client_stub")
    model = examples.save(directory / "model" / "1")
    data = examples.write(directory / "rows.tfrecord", examples.rows(12))
    result = optimize(
        model,
        directory / "out",
        Options(
            recipe="compact_signature",
            set=("client_lookups.inputs=company",),
            representative_data=str(data),
            deployment="all_kinds",
            measure_latency=False,
        ),
    )
    assert not result.failed
    return directory / "model", directory / "out", result


def run_client(optimized, *arguments, path=None):
    client = optimized[1] / "serving/1/assets.extra/client.py"
    return subprocess.run([sys.executable, str(client), *arguments], capture_output=True, text=True, timeout=120)


def test_the_report_and_the_files(optimized):
    _, out, result = optimized
    steps = {step.name: step.status for step in result.report.steps}
    assert steps["compact_signature"] == steps["client_lookups"] == steps["narrow_inputs"] == "applied"
    (serving,) = (a for a in result.report.artifacts if a.name == "serving")
    assert serving.max_rel_error < 1e-5 and any("served by: tensorflow_model_server" in n for n in serving.notes)
    assert {p.name for p in (out / "serving").iterdir()} == {
        *("1", "models.config", "batching_params.pbtxt", "docker-compose.yaml", "kubernetes.yaml", "serve.sh")
    }
    described = json.loads((out / "serving/1/assets.extra/signatures.json").read_text())["serving_default"]
    assert described["outputs"]["embedded"] == {"dtype": "float32", "shape": [None, 4]}
    assert (out / "serving/1/assets.extra/tf_serving_warmup_requests").stat().st_size > 0


def test_grpc_and_rest_give_what_the_original_gives(optimized, tmp_path):
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    original, out, _ = optimized
    drawn = examples.rows(7, seed=3)
    (tmp_path / "rows.json").write_text(json.dumps(drawn))
    config = "".join(
        f'config {{ name: "{name}" base_path: "{path}" model_platform: "tensorflow" }}\n'
        for name, path in (("old", original), ("new", out / "serving"))
    )
    (tmp_path / "models.config").write_text(f"model_config_list {{ {config} }}")
    with running([f"--model_config_file={tmp_path / 'models.config'}"]) as server:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = "old"
        request.inputs["examples"].CopyFrom(tf.make_tensor_proto(examples.serialize(drawn)))
        with grpc.insecure_channel(server.grpc) as channel:
            answer = prediction_service_pb2_grpc.PredictionServiceStub(channel).Predict(request, timeout=60)
        expected = {name: tf.make_ndarray(tensor) for name, tensor in answer.outputs.items()}
        printed = run_client(optimized, "--model=new", f"--server={server.grpc}", str(tmp_path / "rows.json"))
        assert 'key: "numbers"' in printed.stdout, printed.stderr
        body = run_client(optimized, "--model=new", str(tmp_path / "rows.json")).stdout
        import urllib.request

        post = urllib.request.Request(f"http://{server.rest}/v1/models/new:predict", body.encode())
        received = json.loads(urllib.request.urlopen(post, timeout=60).read())["outputs"]
    np.testing.assert_allclose(received["numbers"], expected["numbers"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(received["embedded"], expected["embedded"], rtol=1e-4, atol=1e-5)
    assert received["text"] == [text.decode() for text in expected["text"]]


def test_the_client_needs_numpy_alone(optimized, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(examples.rows(2)))
    client = optimized[1] / "serving/1/assets.extra/client.py"
    code = (
        "import sys; sys.modules['tensorflow'] = sys.modules['tfopt'] = None; sys.argv = sys.argv[1:];"
        "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(client), "--model=x", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert set(json.loads(done.stdout)) == {"signature_name", "inputs"}, done.stderr


def test_wrong_usage_says_how(optimized):
    done = run_client(optimized, "rows.json")
    assert done.returncode == 1 and "--model=NAME" in done.stderr


def test_it_is_compared_on_rows_of_the_original(optimized, tmp_path):
    data = examples.write(tmp_path / "rows.tfrecord", examples.rows(9, seed=5))
    found = compare(optimized[0] / "1", optimized[1] / "serving/1", data=str(data), latency=False)
    assert {output.a for output in found.outputs} == {"numbers", "embedded", "text"}
    assert all(o.problem is None and (o.equal == 1 or o.max_rel_error < 1e-5) for o in found.outputs)
    assert "B is given rows of A" in found.notes[0]
