"""TFX pipelines as JSON for Kubeflow Pipelines and Vertex: a PipelineJob of kfp's pipeline specification 2.1."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from tfx.orchestration.kubeflow.v2 import compiler_utils
from tfx.orchestration.kubeflow.v2.kubeflow_v2_dag_runner import KubeflowV2DagRunner, KubeflowV2DagRunnerConfig
from tfx.types.artifact import PropertyType

from tfopt.errors import TfoptError, one_line
from tfopt.tfx.artifacts import OptimizationReport

_TYPES = {PropertyType.INT: "integer", PropertyType.FLOAT: "number", PropertyType.STRING: "string"}


def compile_pipeline(pipeline: Any, path: str | Path, image: str) -> dict[str, Any]:
    """Writes a pipeline for Kubeflow Pipelines or Vertex.

    Args:
      pipeline: a tfx.orchestration.pipeline.Pipeline.
      path: of the .json file; one that is there is replaced.
      image: container image that holds the modules of all components, so tfopt[tfx] among them.

    Returns:
      What was written.

    Raises:
      TfoptError: TFX cannot compile the pipeline, or the file cannot be written.
    """
    config = KubeflowV2DagRunnerConfig(default_image=image, use_pipeline_spec_2_1=True)
    try:
        with _schema_of_the_report():
            job = KubeflowV2DagRunner(config).run(pipeline, write_out=False)
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise TfoptError(f"{path}: TFX cannot compile the pipeline: {one_line(error)}") from error
    beside = Path(path).with_name(f".{Path(path).name}.partial")
    try:
        beside.write_text(json.dumps(job, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        beside.rename(path)
    except OSError as error:
        raise TfoptError(f"{path}: cannot be written: {error.strerror}") from error
    return job


def report_schema() -> str:
    """The YAML schema of `OptimizationReport`; its title is where a container imports the class from."""
    properties = {name: {"type": _TYPES[each.type]} for name, each in sorted(OptimizationReport.PROPERTIES.items())}
    schema = {"title": "tfopt.OptimizationReport", "type": "object", "properties": properties}
    return yaml.safe_dump(schema, sort_keys=False)


@contextlib.contextmanager
def _schema_of_the_report() -> Iterator[None]:
    """Makes TFX find that schema; it knows schemas of its own types only, and refuses properties of any other."""
    known = compiler_utils.get_artifact_schema

    def schema(artifact_type: Any) -> Any:
        return report_schema() if artifact_type is OptimizationReport else known(artifact_type)

    with mock.patch.object(compiler_utils, "get_artifact_schema", schema):
        yield
