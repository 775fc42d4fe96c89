"""The pipeline compiled for Kubeflow Pipelines and Vertex: the JSON is checked against kfp's proto, not run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2

from tests.conftest import REPO
from tfopt.tfx.artifacts import OptimizationReport

IMAGE = "registry.example/taxi:7"
FLAGS = {
    "data_root": "gs://bucket/data",
    "pipeline_root": "gs://bucket/root",
    "serving_dir": "gs://bucket/serving",
    "device_dir": "gs://bucket/device",
    "train_steps": "123",
    "max_error": "0.001",
    "beam_args": "--runner=DataflowRunner --region=europe-west4",
    "image": IMAGE,
}
# Component -> its inputs as (name, component and output that they come from), and its outputs with their types.
WANTED = {
    "CsvExampleGen": ({}, {"examples": "tfx.Examples"}),
    "StatisticsGen": ({"examples": "CsvExampleGen.examples"}, {"statistics": "tfx.ExampleStatistics"}),
    "SchemaGen": ({"statistics": "StatisticsGen.statistics"}, {"schema": "tfx.Schema"}),
    "Trainer": (
        {"examples": "CsvExampleGen.examples", "schema": "SchemaGen.schema"},
        {"model": "tfx.Model", "model_run": "tfx.ModelRun"},
    ),
    "Optimizer": (
        {"model": "Trainer.model", "examples": "CsvExampleGen.examples"},
        {"optimized_model": "tfx.Model", "tflite_model": "tfx.Model", "report": "tfopt.OptimizationReport"},
    ),
    "OptimizationValidator": (
        {
            "model": "Trainer.model",
            "optimized_model": "Optimizer.optimized_model",
            "tflite_model": "Optimizer.tflite_model",
            "examples": "CsvExampleGen.examples",
        },
        {"blessing": "tfx.ModelBlessing", "tflite_blessing": "tfx.ModelBlessing"},
    ),
    "Pusher": (
        {"model": "Optimizer.optimized_model", "model_blessing": "OptimizationValidator.blessing"},
        {"pushed_model": "tfx.PushedModel"},
    ),
    "DevicePusher": (
        {"tflite_model": "Optimizer.tflite_model", "blessing": "OptimizationValidator.tflite_blessing"},
        {"pushed_model": "tfx.PushedModel"},
    ),
}
EXECUTORS = {
    "CsvExampleGen": "pipelines.taxi_examples.Executor",
    "StatisticsGen": "tfx.components.statistics_gen.executor.Executor",
    "SchemaGen": "tfx.components.schema_gen.executor.Executor",
    "Trainer": "tfx.components.trainer.executor.GenericExecutor",
    "Optimizer": "tfopt.tfx.optimizer.OptimizerExecutor",
    "OptimizationValidator": "tfopt.tfx.optimization_validator.OptimizationValidatorExecutor",
    "Pusher": "tfx.components.pusher.executor.Executor",
    "DevicePusher": "tfopt.tfx.device_pusher.DevicePusherExecutor",
}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """The PipelineJob as the script writes it."""
    path = tmp_path_factory.mktemp("ir") / "pipeline.json"
    flags = [f"--{name}={value}" for name, value in FLAGS.items()]
    command = [sys.executable, "-m", "pipelines.tfx_pipeline", f"--compile_to={path}", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=300)
    assert done.returncode == 0, done.stderr
    return json_format.Parse(path.read_text(), pipeline_spec_pb2.PipelineJob())


@pytest.fixture(scope="module")
def spec(job):
    return json_format.ParseDict(json_format.MessageToDict(job.pipeline_spec), pipeline_spec_pb2.PipelineSpec())


@pytest.fixture(scope="module")
def executors(spec):
    """Component -> its container."""
    config = pipeline_spec_pb2.PipelineDeploymentConfig()
    json_format.ParseDict(json_format.MessageToDict(spec.deployment_spec), config)
    return {name: config.executors[spec.components[name].executor_label].container for name in spec.components}


def schema_of(artifact):
    return yaml.safe_load(artifact.artifact_type.instance_schema)


def constant(task, name):
    value = task.inputs.parameters[name].runtime_value.constant
    return value.string_value or value.number_value


def test_the_job(job, spec):
    assert job.runtime_config.gcs_output_directory == "gs://bucket/root"
    assert spec.pipeline_info.name == "taxi"
    assert spec.schema_version == "2.1.0"
    assert set(spec.components) == set(spec.root.dag.tasks) == set(WANTED)


@pytest.mark.parametrize("component", WANTED)
def test_inputs_and_outputs(spec, component):
    inputs, outputs = WANTED[component]
    definition, task = spec.components[component], spec.root.dag.tasks[component]
    assert {name: schema_of(each)["title"] for name, each in definition.output_definitions.artifacts.items()} == outputs
    assert set(definition.input_definitions.artifacts) == set(inputs)
    found = {name: each.task_output_artifact for name, each in task.inputs.artifacts.items()}
    assert {name: f"{each.producer_task}.{each.output_artifact_key}" for name, each in found.items()} == inputs
    assert set(task.dependent_tasks) == {each.partition(".")[0] for each in inputs.values()}
    assert task.caching_options.enable_cache
    # Each parameter of the definition has a value of its type.
    for name, each in definition.input_definitions.parameters.items():
        kind = "string_value" if each.parameter_type == pipeline_spec_pb2.ParameterType.STRING else "number_value"
        assert task.inputs.parameters[name].runtime_value.constant.WhichOneof("kind") == kind, name


@pytest.mark.parametrize("component", WANTED)
def test_commands(executors, component):
    container = executors[component]
    assert container.image == IMAGE
    assert list(container.command)[:2] == ["python", "-m"]
    args = list(container.args)
    assert args[args.index("--executor_class_path") + 1] == EXECUTORS[component]
    module, _, name = EXECUTORS[component].rpartition(".")
    assert hasattr(__import__(module, fromlist=[name]), name)
    assert args[-3:] == [*FLAGS["beam_args"].split(), "--beam_plugins=tfx"]


def test_parameters(spec):
    tasks = spec.root.dag.tasks
    assert constant(tasks["CsvExampleGen"], "input_base") == "gs://bucket/data"
    assert json.loads(constant(tasks["Trainer"], "train_args")) == {"num_steps": 123}
    assert constant(tasks["Trainer"], "run_fn") == "pipelines.taxi_trainer.run_fn"
    recipe = json.loads(constant(tasks["Optimizer"], "recipe"))
    assert {"pass": "client_lookups", "inputs": "*"} in recipe["passes"]
    options = json.loads(constant(tasks["Optimizer"], "options"))
    assert options["label"] == "big_tip" and options["tflite"] == ["dynamic_int8"]
    bars = json.loads(constant(tasks["OptimizationValidator"], "bars"))
    assert bars == {"label": "big_tip", "metrics": ["auc"], "max_accuracy_drop": 0.01, "max_error": 0.001}
    destination = json.loads(constant(tasks["Pusher"], "push_destination"))
    assert destination == {"filesystem": {"base_directory": "gs://bucket/serving"}}
    assert constant(tasks["DevicePusher"], "push_destination") == "gs://bucket/device"


def test_schema_of_the_report(spec):
    schema = schema_of(spec.components["Optimizer"].output_definitions.artifacts["report"])
    kinds = {name: each["type"] for name, each in schema["properties"].items()}
    assert set(kinds) == set(OptimizationReport.PROPERTIES)
    assert (kinds["recipe"], kinds["original_bytes"], kinds["max_abs_error"]) == ("string", "integer", "number")


def test_a_container_makes_the_report_again(spec):
    """The code that TFX runs in containers finds the class by the schema's title, and its properties by the class."""
    from tfx.orchestration.kubeflow.v2.container import kubeflow_v2_entrypoint_utils as entry

    given = pipeline_spec_pb2.RuntimeArtifact(name="projects/1/artifacts/2", uri="gs://bucket/root/report")
    given.type.CopyFrom(spec.components["Optimizer"].output_definitions.artifacts["report"].artifact_type)
    given.metadata.update({"recipe": "taxi", "original_bytes": 1200.0, "original_metric": 0.5, "other": "x"})
    listed = {"report": pipeline_spec_pb2.ArtifactList(artifacts=[given])}
    (made,) = entry.parse_raw_artifact_dict(listed, {})["report"]
    assert type(made) is OptimizationReport
    assert (made.recipe, made.original_bytes, made.original_metric) == ("taxi", 1200, 0.5)
    assert made.get_string_custom_property("other") == "x"
