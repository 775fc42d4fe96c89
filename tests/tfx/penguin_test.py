"""All components on TFX's own penguin model, imported, with the stock components on what they make."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

import tensorflow_model_analysis as tfma
from tfx.components.bulk_inferrer.component import BulkInferrer
from tfx.components.evaluator.component import Evaluator
from tfx.components.example_gen.csv_example_gen.component import CsvExampleGen
from tfx.components.pusher.component import Pusher
from tfx.proto import bulk_inferrer_pb2
from tfx.proto.pusher_pb2 import PushDestination

from tfopt import runtime
from tfopt.tfx.device_pusher import DevicePusher
from tfopt.tfx.optimization_validator import OptimizationValidator
from tfopt.tfx.optimizer import Optimizer

RECIPE = {
    "name": "server_and_device",
    "passes": ["prune_graph", "fold_constants", "compact_signature", "prune_graph"],
    "tflite": ["float32"],
}


def evaluator(examples, model) -> Evaluator:
    """TFX's own: blesses an accuracy of 0.9 or more."""
    least = tfma.MetricThreshold(value_threshold=tfma.GenericValueThreshold(lower_bound={"value": 0.9}))
    metric = tfma.MetricConfig(class_name="SparseCategoricalAccuracy", threshold=least)
    config = tfma.EvalConfig(
        model_specs=[tfma.ModelSpec(label_key="species", signature_name="serving_default")],
        slicing_specs=[tfma.SlicingSpec()],
        metrics_specs=[tfma.MetricsSpec(metrics=[metric])],
    )
    return Evaluator(examples=examples, model=model, eval_config=config)


def test_penguin_through_every_component(local, importer, shared):
    given = importer(shared / "models" / "tfx-penguin")
    example_gen = CsvExampleGen(str(shared / "data" / "penguins"))
    examples = example_gen.outputs["examples"]
    optimizer = Optimizer(
        given, examples, recipe=RECIPE, options={"label": "species", "max_accuracy_drop": 0.0, "measure_latency": False}
    )
    optimized, tflite = optimizer.outputs["optimized_model"], optimizer.outputs["tflite_model"]
    bars = {"floors": {"accuracy": 0.9}, "label": "species", "max_accuracy_drop": 0.0, "max_error": 1e-4}
    validator = OptimizationValidator(given, optimized, examples, tflite, bars={**bars, "tflite_max_error": 1e-4})
    stock = evaluator(examples, optimized)
    place = PushDestination(filesystem=PushDestination.Filesystem(base_directory=str(local.root / "pushed")))
    pusher = Pusher(model=optimized, model_blessing=validator.outputs["blessing"], push_destination=place)
    device = DevicePusher(tflite, validator.outputs["tflite_blessing"], str(local.root / "device"))
    inferrer = BulkInferrer(
        examples=examples,
        model=optimized,
        data_spec=bulk_inferrer_pb2.DataSpec(),
        model_spec=bulk_inferrer_pb2.ModelSpec(),
    )
    importing = given.producer_component
    components = [importing, example_gen, optimizer, validator, stock, pusher, device, inferrer]
    local.run(*components, beam_args=["--runner=FnApiRunner"])

    blessing, of_tflite = (local.last(validator.outputs[name]) for name in ("blessing", "tflite_blessing"))
    assert blessing["blessed"] == of_tflite["blessed"] == local.last(stock.outputs["blessing"])["blessed"] == 1
    assert blessing["original_accuracy"] == blessing["serving_accuracy"] == of_tflite["float32_accuracy"] >= 0.95
    assert of_tflite["float32_max_error"] < 1e-5  # asked by its clients' steps: it takes features, not tf.Examples
    assert list(local.last(inferrer.outputs["inference_result"])["uri"].rglob("prediction_logs*"))
    (pushed,) = (local.root / "pushed").iterdir()
    with runtime.open(pushed) as program:
        assert set(program.signatures) == {"serving_default", "serving_default_compact"}
    (version,) = (local.root / "device").iterdir()
    manifest = json.loads((version / "manifest.json").read_text())
    assert manifest["client"] == ["assets.extra/signatures.json", "assets.extra/client.py"]
    assert all((version / name).is_file() for name in manifest["client"])
    (file,) = manifest["files"]
    assert file["metric"] == {
        "name": "accuracy",
        "value": blessing["original_accuracy"],
        "samples": blessing["samples"],
    }
    assert len(file["signatures"]["serving_default_compact"]["inputs"]) == 4
