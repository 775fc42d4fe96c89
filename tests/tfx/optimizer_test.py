from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

from tfx.components.pusher.component import Pusher
from tfx.dsl.components.common.resolver import Resolver
from tfx.dsl.input_resolution.strategies.latest_artifact_strategy import LatestArtifactStrategy
from tfx.orchestration.data_types import RuntimeParameter
from tfx.proto.pusher_pb2 import PushDestination
from tfx.types import Channel, standard_artifacts

from tests.conftest import REPO, serve_v1
from tests.tfx.conftest import DIGITS, DIGITS_INPUT, write_examples
from tfopt import model, recipe
from tfopt.errors import TfoptError
from tfopt.report import Report
from tfopt.tfx import artifacts, examples
from tfopt.tfx.bars import Bars
from tfopt.tfx.device_pusher import DevicePusherSpec
from tfopt.tfx.optimization_validator import OptimizationValidatorSpec
from tfopt.tfx.optimizer import Optimizer, OptimizerSpec, _options

FAST = {"tflite": [], "measure_latency": False}


def test_the_stock_pusher_takes_what_optimizer_emits(local, importer, digits_examples):
    channel, rows = importer(DIGITS), importer(digits_examples, "Examples")
    optimizer = Optimizer(channel, rows, options={"label": "digit", "metric": "accuracy", "tflite": ["float32"]})
    destination = PushDestination(filesystem=PushDestination.Filesystem(base_directory=str(local.root / "pushed")))
    pusher = Pusher(model=optimizer.outputs["optimized_model"], push_destination=destination)
    local.run(channel.producer_component, rows.producer_component, optimizer, pusher)
    (pushed,) = (local.root / "pushed").iterdir()
    name, shape = DIGITS_INPUT
    image = np.random.default_rng(0).normal(size=(3, *shape)).astype(np.float32)
    for key, value in serve_v1(DIGITS, {name: image}).items():
        np.testing.assert_allclose(serve_v1(pushed, {name: image})[key], value, rtol=1e-4, atol=1e-5)

    report = local.last(optimizer.outputs["report"])
    assert report["optimized_bytes"] < report["original_bytes"] and report["recipe"] == "lossless"
    assert report["optimized_gzip_bytes"] > 0 and report["optimized_latency_ms_p50"] > 0
    assert (report["metric"], report["samples"]) == ("accuracy", 20)  # the eval split
    assert report["original_metric"] == report["optimized_metric"] == 1.0
    assert report["kept_original"] == 0 and report["rejected"] == "" and report["tfopt_version"] == artifacts.version()
    assert {path.name for path in report["uri"].iterdir()} == {"report.json", "report.html"}
    optimized = local.last(optimizer.outputs["optimized_model"])
    assert optimized["optimized_bytes"] == report["optimized_bytes"]
    read = Report.from_json((report["uri"] / "report.json").read_text())
    paths = {artifact.name: artifact.path for artifact in read.artifacts}
    device = local.last(optimizer.outputs["tflite_model"])
    assert paths["serving"] == str(optimized["uri"] / "Format-Serving") and read.model["path"] == str(DIGITS)
    assert paths["float32"] == str(device["uri"] / "float32.tflite")
    assert [path.name for path in device["uri"].iterdir()] == ["float32.tflite"] == device["files"].split(",")
    assert device["float32_bytes"] == (device["uri"] / "float32.tflite").stat().st_size

    assert device["float32_metric"] == 1.0 and device["samples"] == 20
    local.run(channel.producer_component, rows.producer_component, optimizer, pusher)
    assert local.executions()["Optimizer"] == ["COMPLETE", "CACHED"]


@pytest.mark.parametrize(
    "layout",
    ["Format-Serving", "serving_model_dir", "serving_model_dir/export/taxi/1700", ".", "12", "Format-Serving/3"],
)
def test_models_lie_where_any_tfx_puts_them(layout, tmp_path):
    given = standard_artifacts.Model()
    given.uri = f"{tmp_path}/model/"
    (tmp_path / "model" / layout).mkdir(parents=True)
    with pytest.raises(TfoptError, match=r"no saved_model.pb in it, in Format-Serving/"):
        artifacts.serving_model(given)
    (tmp_path / "model" / layout / "saved_model.pb").touch()
    assert artifacts.serving_model(given).rstrip("/.") == str(tmp_path / "model" / layout)


def test_of_several_versions_the_latest_is_taken(tmp_path):
    given = standard_artifacts.Model()
    given.uri = str(tmp_path)
    for version in ("9", "10", "x"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "saved_model.pb").touch()
    assert artifacts.serving_model(given) == str(tmp_path / "10")


def test_tfx_own_taxi_model_as_an_imported_artifact(local, importer, shared):
    path = shared / "models" / "tfx-chicago-taxi" / "estimator_serving"
    given = importer(path)
    rows = importer(shared / "data" / "chicago-taxi" / "tfexamples", "Examples", split_names='["train", "eval"]')
    optimizer = Optimizer(given, rows, options={"measure_latency": False}, representative_rows=300)
    local.run(given.producer_component, rows.producer_component, optimizer)
    facts = local.last(optimizer.outputs["report"])
    assert facts["optimized_bytes"] < 0.3 * facts["original_bytes"] and facts["max_abs_error"] < 1e-5
    assert "float32: no TFLite kernel for AsString" in facts["rejected"] and facts["kept_original"] == 0
    uri = local.last(optimizer.outputs["optimized_model"])["uri"] / "Format-Serving"
    assert set(model.load(uri).signatures) == set(model.load(path).signatures)
    report = Report.from_json((facts["uri"] / "report.json").read_text())
    assert "300 rows of" in report.verify and "Split-train" in report.verify
    assert "representative.tfrecord" not in report.verify
    assert list(local.last(optimizer.outputs["tflite_model"])["uri"].iterdir()) == []


def test_a_model_below_its_bar_fails_with_the_reason_in_mlmd(local, importer, digits_examples):
    given, rows = importer(DIGITS), importer(digits_examples, "Examples")
    options = {**FAST, "label": "digit", "max_accuracy_drop": -0.5}  # a gain that nothing can reach
    optimizer = Optimizer(given, rows, options=options)
    with pytest.raises(Exception, match=r"serving: accuracy falls by 0, more than --max_accuracy_drop=-0.5"):
        local.run(given.producer_component, rows.producer_component, optimizer)
    assert local.executions()["Optimizer"] == ["FAILED"]
    assert "Optimizer: serving: accuracy falls by 0" in local.message("Optimizer")
    left = [path for path in (local.root / "root").rglob("*") if path.is_file()]
    assert left == [], "something half-written is left"

    given, rows = importer(DIGITS), importer(digits_examples, "Examples")  # TFX mixes up components that share a node
    optimizer = Optimizer(given, rows, options=options, allow_rejected=True)
    local.run(given.producer_component, rows.producer_component, optimizer)
    facts = local.last(optimizer.outputs["optimized_model"])
    assert facts["kept_original"] == 1 and facts["rejected"].startswith("serving: accuracy falls by 0")
    assert "optimized_metric" not in facts and "optimized_bytes" not in facts
    same = facts["uri"] / "Format-Serving" / "saved_model.pb"
    assert same.read_bytes() == (DIGITS / "saved_model.pb").read_bytes()


def test_a_file_that_was_asked_for_by_name_must_be_there(local, importer, shared):
    given = importer(shared / "models" / "tfx-penguin")
    with pytest.raises(Exception, match="float32: no TFLite kernel for ParseExampleV2"):
        local.run(given.producer_component, Optimizer(given, options={**FAST, "tflite": ["float32"]}))


def test_parameters_may_be_known_only_at_run_time(local, importer):
    given = importer(DIGITS)
    optimizer = Optimizer(
        given,
        recipe=RuntimeParameter("recipe", str, '{"name": "mine", "passes": ["prune_graph"]}'),
        options=RuntimeParameter("options", str, json.dumps(FAST)),
    )
    local.run(given.producer_component, optimizer)
    assert local.last(optimizer.outputs["report"])["recipe"] == "mine"
    channel = Channel(type=standard_artifacts.Model, producer_component_id="Optimizer", output_key="optimized_model")
    latest = Resolver(strategy_class=LatestArtifactStrategy, model=channel).with_id("latest")
    again = Optimizer(
        latest.outputs["model"],
        recipe="none",
        options=RuntimeParameter("options", str, '{"tflit": []}'),
    ).with_id("again")
    with pytest.raises(Exception, match="options: there is no 'tflit'; choose from set, tflite"):
        local.run(latest, again)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"recipe": "losless"}, "unknown recipe 'losless'"),
        ({"recipe": ["prune_grap"]}, "prune_grap"),
        ({"options": {"label": 3}}, "options: 'label' wants str, received 3"),
        ({"options": {"tflite": "int8"}}, "options: 'tflite' wants tuple[str, ...] | None, received 'int8'"),
        ({"options": {"seed": True}}, "options: 'seed' wants int, received True"),
        ({"options": {"metrics": "auc"}}, "options: there is no 'metrics'; choose from set, tflite, representative"),
        ({"options": {"version": 2}}, "options: 'version' is not set here; use nothing: TFX numbers the artifacts"),
        ({"options": "{"}, "options: not JSON"),
        ({"options": "[]"}, "options: wants an object"),
    ],
)
def test_what_is_wrong_is_said_when_the_component_is_made(parameters, message, importer):
    with pytest.raises(TfoptError) as raised:
        Optimizer(importer(DIGITS), **parameters)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_recipe_file_is_read_when_the_component_is_made(importer, tmp_path):
    (tmp_path / "mine.json").write_text('["prune_graph"]')
    optimizer = Optimizer(importer(DIGITS), recipe=str(tmp_path / "mine.json"))
    text = optimizer.spec.exec_properties["recipe"]
    assert json.loads(text) == {"name": "mine", "passes": [{"pass": "prune_graph"}]}
    assert recipe.read(text).name == "mine"


def test_the_reference_names_every_parameter_bar_and_property():
    text = (REPO / "docs" / "tfx_components.md").read_text()
    names = {field.name for field in dataclasses.fields(Bars)} | artifacts.OptimizationReport.PROPERTIES.keys()
    for spec in (OptimizerSpec, OptimizationValidatorSpec, DevicePusherSpec):
        names |= spec.INPUTS.keys() | spec.OUTPUTS.keys() | spec.PARAMETERS.keys()
    assert {name for name in names if f"`{name}`" not in text} == set()


def _examples(*uris, **custom):
    made = []
    for uri in uris:
        artifact = standard_artifacts.Examples()
        artifact.uri = str(uri)
        artifacts.set_custom_properties(artifact, custom)
        made.append(artifact)
    return made


def test_splits_of_several_spans(digits_examples, tmp_path):
    write_examples(tmp_path, {"train": [{"digit": [7]}] * 5})
    given = _examples(digits_examples, tmp_path)
    globs = examples.source(given, "train")
    assert globs == f"{digits_examples}/Split-train/*,{tmp_path}/Split-train/*"
    path, rows = examples.sample(globs, 11, str(tmp_path))
    assert rows == 6 + 5 and examples.tf_records(path, None) == examples.tf_records(globs, 6) + examples.tf_records(
        f"{tmp_path}/Split-train/*", None
    )
    with pytest.raises(TfoptError, match="have no split 'eval'; they have: train"):
        examples.source(given, "eval")
    (tmp_path / "eval").mkdir()  # as TFX named them before 0.29
    assert examples.source(given, "eval").endswith(f",{tmp_path}/eval/*")
    patterns = _examples(tmp_path, custom_split_pattern='{"new": "x/part-*"}')
    assert examples.source(patterns, "new") == f"{tmp_path}/x/part-*"


@pytest.mark.parametrize(
    ("name", "value", "good"),
    [
        ("payload_format", "FORMAT_TF_EXAMPLE", True),
        ("file_format", "tfrecords_gzip", True),
        ("payload_format", "FORMAT_PARQUET", False),
        ("payload_format", "FORMAT_TF_SEQUENCE_EXAMPLE", False),
        ("file_format", "parquet", False),
    ],
)
def test_other_formats_end_in_one_line(name, value, good, digits_examples):
    given = _examples(digits_examples, **{name: value})
    if good:
        assert examples.source(given, "train")
    else:
        with pytest.raises(TfoptError, match=f"{name} of the examples is {value}; tfopt reads"):
            examples.source(given, "train")


@pytest.mark.parametrize(
    ("chosen", "options", "expected"),
    [
        ("lossless", {}, {"labels": None, "eval_data": None, "keep_example_signature": False}),
        ("lossless", {"label": "digit"}, {"labels": None, "eval_data": "{uri}/Split-eval/*"}),
        ("prune80", {"label": "digit"}, {"labels": "{uri}/Split-train/*", "eval_data": "{uri}/Split-eval/*"}),
        ("prune80", {"label": "digit", "labels": "mine.npz"}, {"labels": "mine.npz"}),
        ("lossless", {"representative_data": "mine.npz"}, {"representative_data": "mine.npz"}),
        ("compact_signature", {}, {"keep_example_signature": True}),
        ("compact_signature", {"keep_example_signature": False}, {"keep_example_signature": False}),
    ],
)
def test_splits_go_to_the_options_that_want_them(chosen, options, expected, digits_examples, tmp_path):
    parameters = {
        "recipe": chosen,
        "options": json.dumps(options),
        "train_split": "train",
        "eval_split": "eval",
        "representative_rows": 10,
    }
    made, sample = _options({"examples": _examples(digits_examples)}, parameters, str(tmp_path))
    wanted = {k: v.replace("{uri}", str(digits_examples)) if isinstance(v, str) else v for k, v in expected.items()}
    assert {name: getattr(made, name) for name in wanted} == wanted
    assert (
        sample is None if "representative_data" in options else sample == f"10 rows of {digits_examples}/Split-train/*"
    )
