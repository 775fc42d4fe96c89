"""The command against a server whose faults are known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.forked import Server
from tests.serving.loadtest.fake_server import serving

SHORT = ["--model_name=m", "--warmup_s=0.2", "--duration_s=0.8"]


@pytest.fixture(scope="module")
def command():
    with Server(
        "pipelines.loadtest",
        "tfopt.serving.loadtest.run",
        "tfopt.serving.loadtest.requests",
        "tfopt.readers",
        "tensorflow_serving.apis.prediction_log_pb2",
        "tensorflow_serving.apis.get_model_metadata_pb2",
        environ={"GRPC_ENABLE_FORK_SUPPORT": "0"},
    ) as started:
        yield started


@pytest.fixture(scope="module")
def server():
    with serving() as fake:
        yield fake


@pytest.fixture
def fake(server):
    server.reset()
    return server


@pytest.fixture
def data(tmp_path):
    np.savez(tmp_path / "data.npz", x=np.ones((6, 4), np.float32))
    return str(tmp_path / "data.npz")


def test_one_run(command, fake, data, tmp_path):
    files = [f"--output_json={tmp_path}/out.json", f"--output_html={tmp_path}/out.html"]
    flags = [f"--server={fake.address}", f"--data={data}", "--rows_per_request=2", "--rate=50", *SHORT, *files]
    ended = command.run(flags, tmp_path)
    assert ended.code == 0, ended.stderr
    for phrase in ("open loop, poisson arrivals", "offered", "achieved", "p99.9", "errors       none", "sent late by"):
        assert phrase in ended.stdout
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["rows"] == 2 and facts["errors"] == {} and facts["latency"]["count"] > 20
    page = (tmp_path / "out.html").read_text()
    assert page.count("<polyline") >= 3 and "http" not in page.replace("http://www.w3.org", "")
    again = command.run(flags, tmp_path)
    assert again.code == 2 and "pass --overwrite" in again.stderr


def test_sweep(command, fake, data, tmp_path):
    fake.answer_s = 1 / 50
    flags = [f"--server={fake.address}", f"--data={data}", "--sweep", "--rate=20", "--sweep_resolution=0.9", *SHORT]
    ended = command.run([*flags, "--arrivals=constant", f"--output_html={tmp_path}/out.html"], tmp_path)
    assert ended.code == 0 and "the knee is at" in ended.stdout and "<- knee" in ended.stdout
    assert "Latency by offered rate" in (tmp_path / "out.html").read_text()


@pytest.mark.parametrize(
    "flags, fail, code, message",
    [
        (["--slo_ms=0.01"], 0, 1, "MISSED"),
        (["--slo_ms=5000"], 0, 0, "met"),
        ([], 5, 1, "UNAVAILABLE: the queue is full"),
        (["--loop=closed", "--concurrency=2"], 0, 0, "closed loop, 2 clients"),
        (["--model_name=nope"], 0, 2, "NOT_FOUND: Servable not found: nope"),
        (["--signature_name=nope"], 0, 2, "no such signature; it has: serving_default"),
        (["--check"], 0, 1, "WRONG_ANSWER: outputs [], wanted ['scores']"),
        (["--data=/no/such.npz"], 0, 2, "/no/such.npz: no such file"),
        (["--server=localhost"], 0, 2, "--server=localhost: wants host:port"),
        (["--rate=0"], 0, 2, "--rate=0: wants more than 0"),
        (["--server_pid=999999999"], 0, 2, "--server_pid=999999999: no such process"),
        (["--metrics=127.0.0.1:9/m"], 0, 2, "--metrics=127.0.0.1:9/m: no Prometheus metrics there"),
        (["--output_json=/no/such/out.json"], 0, 2, "there is no such directory"),
        (["--sweep", "--loop=closed"], 0, 2, "--sweep: looks for a rate"),
        (["extra"], 0, 2, "unexpected argument 'extra'"),
    ],
)
def test_exit_codes(command, fake, data, tmp_path, flags, fail, code, message):
    fake.fail = fail
    ended = command.run([f"--server={fake.address}", f"--data={data}", "--rate=50", *SHORT, *flags], tmp_path)
    assert ended.code == code, ended.stderr
    assert message in (ended.stderr if code == 2 else ended.stdout)
    assert "Traceback" not in ended.stderr
    if code == 2:
        assert len([line for line in ended.stderr.splitlines() if line.startswith("error: ")]) == 1


def test_no_server(command, tmp_path):
    ended = command.run([], tmp_path)
    assert ended.code == 2 and "--server: wants the host:port" in ended.stderr
