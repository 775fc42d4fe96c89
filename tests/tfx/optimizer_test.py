from __future__ import annotations

import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

from tests.conftest import REPO, serve_v1


def test_the_stock_pusher_takes_what_optimizer_emits(local, importer):
    import numpy as np
    from tfx.components.pusher.component import Pusher
    from tfx.proto.pusher_pb2 import PushDestination

    from tfopt.tfx.optimizer import Optimizer

    model = importer(REPO / "saved_models" / "digits")
    optimizer = Optimizer(model, options={"tflite": ["float32"], "measure_latency": False})
    destination = PushDestination(filesystem=PushDestination.Filesystem(base_directory=str(local.root / "pushed")))
    pusher = Pusher(model=optimizer.outputs["optimized_model"], push_destination=destination)
    local.run(model.producer_component, optimizer, pusher)
    (pushed,) = (local.root / "pushed").iterdir()
    (name,) = _inputs(pushed)
    image = np.random.default_rng(0).normal(size=(3, *_inputs(pushed)[name])).astype(np.float32)
    for key, value in serve_v1(REPO / "saved_models" / "digits", {name: image}).items():
        np.testing.assert_allclose(serve_v1(pushed, {name: image})[key], value, rtol=1e-4, atol=1e-5)
    report = local.last(optimizer.outputs["report"])
    assert report["optimized_bytes"] < report["original_bytes"] and report["recipe"] == "lossless"
    assert {path.name for path in report["uri"].iterdir()} == {"report.json", "report.html"}
    device = local.last(optimizer.outputs["tflite_model"])
    assert [path.name for path in device["uri"].iterdir()] == ["float32.tflite"] == device["files"].split(",")
    local.run(model.producer_component, optimizer, pusher)
    assert local.executions()["Optimizer"] == ["COMPLETE", "CACHED"]


def _inputs(path) -> dict:
    from tfopt import runtime

    with runtime.open(path) as program:
        return {name: spec.shape[1:] for name, spec in program.signatures["serving_default"].inputs.items()}
