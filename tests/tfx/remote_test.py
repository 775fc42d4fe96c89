"""Artifacts not on this machine's disk: TensorFlow's ram:// stands for a bucket (no name may begin as another)."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

from tfx.dsl.input_resolution.strategies.latest_blessed_model_strategy import LatestBlessedModelStrategy
from tfx.dsl.io import fileio
from tfx.types import standard_artifacts
from tfx.utils import io_utils

from tests.tfx.conftest import DIGITS, write_examples
from tfopt.tfx import artifacts
from tfopt.tfx.device_pusher import DevicePusherExecutor
from tfopt.tfx.optimization_validator import OptimizationValidatorExecutor
from tfopt.tfx.optimizer import OptimizerExecutor


@pytest.fixture
def bucket() -> str:
    return f"ram://{uuid.uuid4().hex}"


def artifact(kind: type, uri: str, number: int) -> Any:
    made = kind()
    made.uri, made.id = uri, number
    return made


def test_every_executor_reads_from_and_writes_to_a_bucket(bucket, tmp_path):
    io_utils.copy_dir(str(DIGITS), f"{bucket}/model/Format-Serving")
    write_examples(tmp_path, {"train": [{"image": [0.5] * 64}] * 8, "eval": [{"image": [0.25] * 64}] * 9})
    io_utils.copy_dir(str(tmp_path), f"{bucket}/examples")
    model = artifact(standard_artifacts.Model, f"{bucket}/model", 1)
    examples = artifact(standard_artifacts.Examples, f"{bucket}/examples", 2)
    optimized = artifact(standard_artifacts.Model, f"{bucket}/optimized", 3)
    tflite = artifact(standard_artifacts.Model, f"{bucket}/tflite_files", 4)
    report = artifact(artifacts.OptimizationReport, f"{bucket}/report", 5)
    parameters = {
        "recipe": "lossless",
        "options": json.dumps({"tflite": ["float32"], "measure_latency": False}),
        **{"train_split": "train", "eval_split": "eval", "representative_rows": 5},
    }
    outputs = {"optimized_model": [optimized], "tflite_model": [tflite], "report": [report]}
    OptimizerExecutor().Do({"model": [model], "examples": [examples]}, outputs, parameters)
    assert fileio.exists(f"{bucket}/optimized/Format-Serving/saved_model.pb")
    assert artifacts.tflite_files(tflite.uri) == [f"{bucket}/tflite_files/float32.tflite"]
    assert report.optimized_bytes < report.original_bytes
    read = json.loads(fileio.open(f"{bucket}/report/report.json").read())
    assert read["model"]["path"] == f"{bucket}/model/Format-Serving" and str(tmp_path.parent) not in json.dumps(read)

    blessing = artifact(standard_artifacts.ModelBlessing, f"{bucket}/blessing", 6)
    of_tflite = artifact(standard_artifacts.ModelBlessing, f"{bucket}/blessing_of_files", 7)
    inputs = {"model": [model], "optimized_model": [optimized], "tflite_model": [tflite], "examples": [examples]}
    OptimizationValidatorExecutor().Do(
        inputs,
        {"blessing": [blessing], "tflite_blessing": [of_tflite]},
        {"bars": '{"max_error": 1e-4, "tflite_max_error": 1e-4}', "eval_split": "eval"},
    )
    assert fileio.exists(f"{bucket}/blessing/BLESSED") and fileio.exists(f"{bucket}/blessing_of_files/BLESSED")
    facts = artifacts.custom_properties(blessing)
    assert facts["samples"] == 9 and 0 < facts["serving_max_error"] < 1e-4, "it was compared with itself"

    latest = LatestBlessedModelStrategy()._resolve(
        {"model": [model, optimized, tflite], "blessing": [blessing, of_tflite]}, "model", "blessing"
    )
    assert latest["model"] == [optimized], "a TFLite model would be taken for one that serves"

    pushed = artifact(standard_artifacts.PushedModel, f"{bucket}/pushed", 8)
    DevicePusherExecutor().Do(
        {"tflite_model": [tflite], "blessing": [of_tflite]},
        {"pushed_model": [pushed]},
        {"push_destination": f"{bucket}/device/", "version": 5},
    )
    assert sorted(fileio.listdir(f"{bucket}/device/5")) == ["float32.tflite", "manifest.json"]
    assert artifacts.custom_properties(pushed)["pushed_destination"] == f"{bucket}/device/5"
    assert json.loads(fileio.open(f"{bucket}/device/5/manifest.json").read())["source"]["artifact_id"] == 4
