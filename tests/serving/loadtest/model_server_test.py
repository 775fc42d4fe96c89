"""The load test against the real tensorflow_model_server, where there is one."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time

import pytest

from tests.conftest import REPO
from tfopt.errors import TfoptError
from tfopt.serving.loadtest import requests, signature
from tfopt.serving.loadtest.plan import Plan, Target
from tfopt.serving.loadtest.run import run

pytestmark = [
    pytest.mark.model_server,
    pytest.mark.skipif(
        not shutil.which("tensorflow_model_server"), reason="tensorflow_model_server is not on the PATH"
    ),
]


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@pytest.fixture(scope="module")
def ports(tmp_path_factory):
    base = tmp_path_factory.mktemp("models") / "digits"
    base.mkdir()
    (base / "1").symlink_to(REPO / "saved_models" / "digits")
    grpc, rest = free_port(), free_port()  # it cannot say which ports it got
    flags = [f"--port={grpc}", f"--rest_api_port={rest}", "--model_name=digits", f"--model_base_path={base}"]
    process = subprocess.Popen(["tensorflow_model_server", *flags])
    try:
        for _ in range(300):
            with contextlib.suppress(TfoptError):
                signature.read(Target(f"127.0.0.1:{rest}", "rest", "digits"))
                break
            time.sleep(0.1)
        yield {"grpc": grpc, "rest": rest}
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("protocol", ["grpc", "rest"])
def test_good_answers(ports, protocol):
    target = Target(f"127.0.0.1:{ports[protocol]}", protocol, "digits")
    described = signature.read(target)
    bodies, _ = requests.load(target, described, None)
    found = run(target, bodies, Plan(rate=30, warmup_s=0.5, duration_s=1), check=requests.checker(described, target))
    assert not found.failed and found.latency.count == 30
