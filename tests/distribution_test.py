"""Several replicas train as one does: on two devices of a process, and in two processes that TF_CONFIG joins."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import REPO
from tfopt import distribution
from tfopt.errors import TfoptError

# Trains the net of tests/training_test.py in a process of its own, and writes its weights. Where there is a directory
# for checkpoints it is interrupted, and goes on.
_TRAIN = """
import sys
import numpy as np
import tensorflow as tf
strategy, net, out, checkpoint, devices = sys.argv[1:]
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * int(devices))
from tfopt import distribution
with distribution.using(strategy):
    from tests.distribution_test import train
    train(net, out, checkpoint)
    distribution.wait()
    print("chief" if distribution.is_chief() else "other", distribution.replicas())
"""


def train(net, out, checkpoint=""):
    import tfopt.training_loop
    from tests.training_test import X, _killed_at, data, noised
    from tfopt.model import load
    from tfopt.optimizers import learning_rate
    from tfopt.training import fine_tune

    teacher = load(net)
    for stop in (23, 0) if checkpoint else (0,):
        model = noised(teacher, "serving_default")
        given = data(x=X), teacher, data(Y, x=X[:100]), SETTINGS
        tfopt.training_loop.learning_rate = _killed_at(stop) if stop else learning_rate
        with pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext():
            history = fine_tune(model, "serving_default", *given, checkpoint=checkpoint or None)
    kept = {name.replace("/", ":"): value for name, value in model.weights.items()}
    np.savez(out, validation=history.validation, **kept)


def _settings():
    from tfopt.training import Settings

    return Settings(
        epochs=4, learning_rate=5e-3, batch_size=33, optimizer="adamw", weight_decay=0.1, checkpoint_steps=5
    )


SETTINGS = _settings()
Y = np.arange(100) % 3


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    from tests.training_test import _net

    path = tmp_path_factory.mktemp("distribution") / "net"
    _net(path)
    return path


def start(strategy, net, out, checkpoint="", devices=1, config=None):
    command = [sys.executable, "-c", _TRAIN, strategy, str(net), str(out), str(checkpoint), str(devices)]
    environ = {**os.environ, "TF_CONFIG": json.dumps(config or {}), "TF_CPP_MIN_LOG_LEVEL": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=REPO, env=environ, **pipes)


def end(process) -> str:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, err[-3000:]
    return out.split("\n")[-2]


@pytest.fixture(scope="module")
def alone(net):
    """The weights that one device ends with."""
    train(net, net.parent / "alone.npz")
    return dict(np.load(net.parent / "alone.npz"))


def assert_close(path, alone):
    found = dict(np.load(path))
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-4, atol=2e-5)


def test_two_devices_end_where_one_does(net, alone, tmp_path):
    assert end(start("mirrored", net, tmp_path / "two.npz", devices=2)) == "chief 2"
    assert_close(tmp_path / "two.npz", alone)


def test_two_workers_end_where_one_does_and_go_on(net, alone, tmp_path):
    cluster = {"worker": [f"localhost:{_free_port()}" for _ in range(2)]}
    started = [
        start(
            "multiworker",
            net,
            tmp_path / f"{index}.npz",
            tmp_path / f"state{index}",
            config={"cluster": cluster, "task": {"type": "worker", "index": index}},
        )
        for index in range(2)
    ]
    assert [end(process) for process in started] == ["chief 2", "other 2"]
    assert (tmp_path / "state0" / "training.npz").exists()
    assert not (tmp_path / "state1").exists()  # only the chief writes: the other one got its state from there
    assert_close(tmp_path / "0.npz", alone)
    first, second = (dict(np.load(tmp_path / f"{index}.npz")) for index in range(2))
    assert all(np.array_equal(value, second[name]) for name, value in first.items())


def _free_port() -> int:
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("tpu", None, "--strategy: choose from mirrored, multiworker; received 'tpu'"),
        ("mirrored", None, "this machine has one device to train on, /device:CPU:0"),
        ("multiworker", None, "TF_CONFIG must name all workers and this one, .*; received 'nothing'"),
        ("multiworker", {"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0}}, "names 1 workers"),
        ("multiworker", {"cluster": {"worker": ["a:1", "b:1"]}, "task": {"type": "worker", "index": 2}}, "worker 2"),
    ],
)
def test_what_cannot_be(name, config, message, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config:
        monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(TfoptError, match=message), distribution.using(name):
        pass
    assert distribution.current() is None and distribution.is_chief() and distribution.replicas() == 1
