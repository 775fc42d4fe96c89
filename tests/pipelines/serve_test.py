"""The server as its users start it: as another process, with real clients, while versions change."""

import concurrent.futures
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    model_management_pb2,
    model_service_pb2_grpc,
    prediction_service_pb2_grpc,
    regression_pb2,
)

from tests.conftest import REPO
from tests.serving.server.models import example, half_plus, predict_request
from tfopt.errors import TfoptError
from tfopt.serving.server.child import running


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    base = tmp_path_factory.mktemp("served") / "half"
    half_plus(base, 1)
    return base


def test_saved_model_cli_reads_what_is_served(half):
    command = [
        sys.executable, "-m", "tensorflow.python.tools.saved_model_cli", "run", "--dir", str(half / "1"),
        "--tag_set", "serve", "--signature_def", "serving_default", "--input_exprs", "x=[1.0,2.0,5.0]",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "[2.5 3.  4.5]" in done.stdout


def swap(base, version, built):
    """Puts a version into its place at once, as a deployment does, and takes the one before away."""
    shutil.copytree(built, base / f"tmp-{version}")
    (base / f"tmp-{version}").rename(base / str(version))
    for old in base.iterdir():
        if old.name.isdigit() and int(old.name) < version - 1:
            shutil.rmtree(old)


def test_nothing_breaks_while_versions_change_and_clients_misbehave(tmp_path):
    """Half of y depends on the version: an answer must be that of the version that it names."""
    base = tmp_path / "half"
    built = [half_plus(tmp_path / "built", number, plus=float(number % 2)) for number in (2, 3)]
    shutil.copytree(built[1], base / "1")
    (tmp_path / "batching").write_text("max_batch_size { value: 8 } batch_timeout_micros { value: 500 }")
    flags = ["--model_name=half", f"--model_base_path={base}", "--file_system_poll_wait_seconds=0.1"]
    flags += ["--enable_batching", f"--batching_parameters_file={tmp_path}/batching"]
    stop = threading.Event()
    counts = {"good": 0, "bad": 0, "gone": 0}
    wrong = []

    def ask(seed, started):
        random = np.random.default_rng(seed)
        with grpc.insecure_channel(started.grpc) as channel:
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            while not stop.is_set():
                kind = random.random()
                try:
                    if kind < 0.1:
                        with pytest.raises(grpc.RpcError):
                            stub.Predict(predict_request(None, x=np.array([["a"]])), 20)
                        counts["bad"] += 1
                    elif kind < 0.2:
                        stub.Predict.future(predict_request()).cancel()
                        counts["gone"] += 1
                    else:
                        answer = stub.Predict(predict_request([2.0]), 20)
                        if list(answer.outputs["y"].float_val) != [1.0 + answer.model_spec.version.value % 2]:
                            wrong.append(answer)
                        counts["good"] += 1
                except grpc.RpcError as error:
                    wrong.append((error.code(), error.details()))

    with running(flags) as started:
        askers = [threading.Thread(target=ask, args=(seed, started)) for seed in range(4)]
        for asker in askers:
            asker.start()
        memory = []
        for version in range(2, 12):
            swap(base, version, built[version % 2])
            wait_for_version(started, version)
            memory.append(started.resident_bytes() / 2**20)
        stop.set()
        for asker in askers:
            asker.join(30)
    assert not wrong, wrong[:3]
    assert min(counts.values()) > 10, counts
    # The first swaps fill TensorFlow's own caches and arenas; a graph with its session is over 1 MiB.
    assert memory[-1] - memory[4] < 20, memory


def wait_for_version(started, version, seconds=60):
    with grpc.insecure_channel(started.grpc) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        end = time.monotonic() + seconds
        while stub.Predict(predict_request([0.0]), 20).model_spec.version.value != version:
            assert time.monotonic() < end, f"version {version} did not come"
            time.sleep(0.02)


def test_reload_by_request_and_shutdown_that_lets_requests_end(half, tmp_path):
    class Slow(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="x")])
        def serve(self, x):
            return {"y": tf.while_loop(lambda i, y: i < 300_000, lambda i, y: (i + 1, y + 1.0), (0, x))[1]}

    module = Slow()
    tf.saved_model.save(module, str(tmp_path / "slow" / "1"), {"serving_default": module.serve})
    with running(["--model_name=half", f"--model_base_path={half}", "--grpc_server=aio"]) as started:
        with grpc.insecure_channel(started.grpc) as channel:
            asked = model_management_pb2.ReloadConfigRequest()
            listed = asked.config.model_config_list.config
            listed.add(name="slow", base_path=str(tmp_path / "slow"), model_platform="tensorflow")
            service = model_service_pb2_grpc.ModelServiceStub(channel)
            assert service.HandleReloadConfigRequest(asked, 60).status.error_code == 0
            stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
            with pytest.raises(grpc.RpcError, match="Latest\\(half\\)"):
                stub.Predict(predict_request(), 10)
            stub.Predict(predict_request([0.0], "slow"), 60)
            waiting = stub.Predict.future(predict_request([0.0], "slow"), 60)
            time.sleep(0.05)
            os.kill(started.pid, signal.SIGTERM)
            assert list(waiting.result(60).outputs["y"].float_val) == [300_000.0]
        end = time.monotonic() + 30
        while "stopped" not in (text := started.log.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        assert "stopped" in text and "Traceback" not in text


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model_name=m"], "--model_base_path: give the folder that holds the version folders"),
        (["--model_base_path={0}/none"], "no versions in {0}/none"),
        (["--model_base_path={0}/broken"], "version 1: "),
        (["--model_base_path={0}/half", "--batching_parameters_file=x"], "without --enable_batching"),
        (["--model_base_path={0}/half", "--enable_batching", "--batching_parameters_file=x"], "x: cannot be read"),
        (["--prefer_tflite_model"], "--prefer_tflite_model: a flag of tensorflow_model_server that this server does"),
        (["--prot=1"], "--prot: unknown"),
        (["--port=x"], "flag --port=x"),
        (["extra"], "'extra': takes flags only"),
        (["--port=8500", "--rest_api_port=8500", "--model_base_path=x"], "--port is the same"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(half, flags, words):
    models = half.parent
    (models / "broken" / "1").mkdir(parents=True, exist_ok=True)
    (models / "broken" / "1" / "saved_model.pb").write_bytes(b"not a model")
    command = [sys.executable, "-m", "pipelines.serve", *[flag.format(models) for flag in flags]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO)
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and words.format(models) in last and "Traceback" not in done.stderr


def test_help_is_light_and_version_is_told():
    command = [sys.executable, "-X", "importtime", "-m", "pipelines.serve", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPO)
    assert "--model_base_path" in done.stdout and "tensorflow.python" not in done.stderr


def test_a_port_that_is_taken(half):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = [f"--model_base_path={half}", f"--port={port}"]
        with pytest.raises(TfoptError, match=f"--port={port}: cannot listen at 127.0.0.1"), running(flags):
            pass


def test_real_models_of_tensorflow_serving_and_a_configuration_that_is_read_again(shared, tmp_path):
    """Its own test data, with the answers that its own tests expect."""
    root, file = shared / "models" / "tf-serving-testdata", tmp_path / "models.config"

    def configure(**folders):
        configs = [
            f'config {{ name: "{name}" base_path: "{root / folder}" model_platform: "tensorflow" }}'
            for name, folder in folders.items()
        ]
        file.with_suffix(".new").write_text(f"model_config_list {{ {' '.join(configs)} }}")
        file.with_suffix(".new").rename(file)

    configure(half="saved_model_half_plus_two_2_versions")
    flags = [f"--model_config_file={file}", "--model_config_file_poll_wait_seconds=0.2"]
    with running(flags) as started, grpc.insecure_channel(started.grpc) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        answer = stub.Predict(predict_request([2.0]), 10)
        assert list(answer.outputs["y"].float_val) == [3.0] and answer.model_spec.version.value == 124
        regress = regression_pb2.RegressionRequest()
        regress.model_spec.name, regress.model_spec.signature_name = "half", "regress_x_to_y"
        regress.input.example_list.examples.append(example(x=2.0))
        assert [r.value for r in stub.Regress(regress, 10).result.regressions] == [3.0]
        file.write_text("model_config_list { confi")
        time.sleep(0.5)
        assert stub.Predict(predict_request([2.0]), 10).outputs["y"].float_val == [3.0]
        configure(half="saved_model_half_plus_two_2_versions", counter="saved_model_counter")
        count = predict_request(None, "counter", signature="incr_counter")
        end = time.monotonic() + 60
        while (first := increment(stub, count)) is None and time.monotonic() < end:
            time.sleep(0.1)
        assert [first, increment(stub, count), increment(stub, count)] == [1.0, 2.0, 3.0]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda _: increment(stub, count), range(40)))
        get = predict_request(None, "counter", signature="get_counter")
        assert tf.make_ndarray(stub.Predict(get, 10).outputs["output"]).item() == 43.0


def increment(stub, request):
    """The counter's next value; None where its model is not there yet."""
    try:
        return tf.make_ndarray(stub.Predict(request, 10).outputs["output"]).item()
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.NOT_FOUND
        return None
