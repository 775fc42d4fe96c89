"""Optimizer: a Model artifact in; the optimized Serving model, TFLite files and a report out.

    optimizer = Optimizer(
        model=trainer.outputs["model"],
        examples=example_gen.outputs["examples"],
        recipe="lossless",
        options={"label": "big_tipper", "metric": "auc", "max_accuracy_drop": 0.01, "tflite": []},
    )
    Pusher(model=optimizer.outputs["optimized_model"], ...)

The component is thin: it finds the model and the splits, and `tfopt.optimize.optimize` does the work.
docs/tfx_components.md has every input, output, parameter and property.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from absl import logging
from tfx import types
from tfx.dsl.components.base.base_component import BaseComponent
from tfx.dsl.components.base.base_executor import BaseExecutor
from tfx.dsl.components.base.executor_spec import ExecutorClassSpec
from tfx.types import standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter
from tfx.types.system_executions import Transform
from tfx.utils import io_utils, path_constants

from tfopt import optimize, passes, recipe
from tfopt.errors import TfoptError
from tfopt.report import Report
from tfopt.tfx import artifacts, examples

_OWN = {  # fields of Options that the component itself sets, and what to use instead
    "recipe": "the parameter recipe",
    "command": "nothing: it is the component's id",
    "version": "nothing: TFX numbers the artifacts",
    "overwrite": "nothing: TFX gives every execution a directory of its own",
    "deployment": "tfopt-deployment, on the directory that the Pusher writes",
}


def parse_options(given: str | Mapping[str, Any]) -> dict[str, Any]:
    """Reads fields of `tfopt.optimize.Options` from a mapping or its JSON.

    Raises:
      TfoptError: a field that there is not, that the component sets itself, or with a value of another type.
    """
    return artifacts.fields(optimize.Options, given, "options", _OWN)


class OptimizerExecutor(artifacts.Reporting, BaseExecutor):
    """Runs `tfopt.optimize.optimize` beside the outputs, and copies there what is complete."""

    def _run(
        self,
        inputs: dict[str, list[types.Artifact]],
        outputs: dict[str, list[types.Artifact]],
        parameters: dict[str, Any],
    ) -> None:
        given = artifacts.single(inputs, "model")
        assert given is not None  # TFX checks inputs that are not optional
        with artifacts.scratch() as folder:
            found = artifacts.serving_model(given)
            model = artifacts.local(found, folder)
            made = Path(folder) / "made"
            options, sample = _options(inputs, parameters, folder)
            result = optimize.optimize(model, made, options)
            report = result.report
            if result.failed and not parameters.get("allow_rejected"):
                logging.error("%s", report.table())  # of outputs that fail, TFX keeps nothing
                reasons = [f"{a.name}: {a.rejected}" for a in report.artifacts if a.name in result.failed]
                raise TfoptError(
                    f"Optimizer: {'; '.join(reasons)} (allow_rejected=True goes on with what there is, and with the "
                    "original in the place of a rejected Serving model)"
                )
            kept = "serving" in result.failed
            report.model["path"] = found
            if sample:
                report.verify = report.verify.replace(str(options.representative_data), sample)
                report.data["representative"] = sample
                report.warnings = [w.replace(str(options.representative_data), sample) for w in report.warnings]
            _publish(report, model if kept else str(made / "serving" / "1"), str(made / "device"), kept, outputs)


def _publish(report: Report, serving: str, device: str, kept: bool, outputs: dict[str, list[types.Artifact]]) -> None:
    """Copies what was made to its artifacts, the Serving model last, and tells MLMD about it."""
    (optimized,), (tflite,), (recorded,) = (outputs[n] for n in ("optimized_model", "tflite_model", "report"))
    facts = artifacts.properties(report) | {"kept_original": int(kept)}
    final = posixpath.join(optimized.uri, path_constants.SERVING_MODEL_DIR)
    names = []
    for artifact in report.artifacts:
        if artifact.kind == "tflite" and artifact.path:
            io_utils.copy_file(artifact.path, posixpath.join(tflite.uri, Path(artifact.path).name))
            artifact.path = posixpath.join(tflite.uri, Path(artifact.path).name)
            names.append(artifact.name)
        elif artifact.name == "serving" and artifact.path:
            artifact.path = final
    for name in artifacts.client_files(device):
        io_utils.copy_file(posixpath.join(device, name), posixpath.join(tflite.uri, name))
    io_utils.write_string_file(posixpath.join(recorded.uri, "report.json"), report.to_json())
    io_utils.write_string_file(posixpath.join(recorded.uri, "report.html"), report.html())
    io_utils.copy_dir(serving, final)
    for name, value in facts.items():
        setattr(recorded, name, value)
    artifacts.set_custom_properties(optimized, facts)
    artifacts.set_custom_properties(tflite, _device_facts(report, facts, names))


def _options(
    inputs: dict[str, list[types.Artifact]], parameters: dict[str, Any], folder: str
) -> tuple[optimize.Options, str | None]:
    """The options of the run: those given, and the splits where none of them names data.

    Returns:
      The options, and what to call the representative rows in the report where they are a sample of the train split.
    """
    chosen, sample = parse_options(parameters.get("options") or "{}"), None
    steps = [name for name, _ in recipe.read(parameters["recipe"]).steps]
    if "compact_signature" in steps:
        chosen.setdefault("keep_example_signature", True)  # Evaluator, BulkInferrer and InfraValidator send tf.Examples
    if given := inputs.get("examples"):
        train = examples.source(given, parameters["train_split"])
        if "representative_data" not in chosen:
            chosen["representative_data"], rows = examples.sample(train, int(parameters["representative_rows"]), folder)
            sample = f"{rows} rows of {train}"
        if "label" in chosen:
            chosen.setdefault("eval_data", examples.source(given, parameters["eval_split"]))
            if any(passes.get(name).learns for name in steps):
                chosen.setdefault("labels", train)
    return optimize.Options(recipe=parameters["recipe"], command="tfopt.tfx.optimizer.Optimizer", **chosen), sample


def _device_facts(report: Report, facts: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The custom properties of the TFLite files: the same for all, and bytes and metric of each."""
    found: dict[str, Any] = {
        name: facts[name] for name in ("tfopt_version", "recipe", "metric", "samples") if name in facts
    }
    found["files"] = ",".join(f"{name}.tflite" for name in names)
    for artifact in report.artifacts:
        if artifact.name in names:
            found[f"{artifact.name}_bytes"] = artifact.bytes
            if artifact.accuracy is not None:
                found[f"{artifact.name}_metric"] = artifact.accuracy.value
    rejected = [f"{a.name}: {a.rejected}" for a in report.artifacts if a.kind == "tflite" and a.rejected]
    return {**found, "rejected": "; ".join(rejected)}


class OptimizerSpec(ComponentSpec):
    """The interface of Optimizer."""

    PARAMETERS: ClassVar = {
        "recipe": ExecutionParameter(type=str),
        "options": ExecutionParameter(type=str),
        "train_split": ExecutionParameter(type=str),
        "eval_split": ExecutionParameter(type=str),
        "representative_rows": ExecutionParameter(type=int),
        "allow_rejected": ExecutionParameter(type=int),
        "tfopt_version": ExecutionParameter(type=str),
    }
    INPUTS: ClassVar = {
        "model": ChannelParameter(type=standard_artifacts.Model),
        "examples": ChannelParameter(type=standard_artifacts.Examples, optional=True),
    }
    OUTPUTS: ClassVar = {
        "optimized_model": ChannelParameter(type=standard_artifacts.Model),
        "tflite_model": ChannelParameter(type=standard_artifacts.Model),
        "report": ChannelParameter(type=artifacts.OptimizationReport),
    }
    TYPE_ANNOTATION = Transform


class Optimizer(BaseComponent):
    """Optimizes a trained model for TensorFlow Serving and for devices."""

    SPEC_CLASS = OptimizerSpec
    EXECUTOR_SPEC = ExecutorClassSpec(OptimizerExecutor)

    def __init__(
        self,
        model: types.BaseChannel,
        examples: types.BaseChannel | None = None,
        recipe: Any = "lossless",
        options: Any = None,
        train_split: Any = "train",
        eval_split: Any = "eval",
        representative_rows: Any = 1000,
        allow_rejected: bool = False,
    ):
        """Makes the component, and checks what can be known to be wrong.

        Args:
          model: Model, in any layout of `tfopt.tfx.artifacts.serving_model`.
          examples: Examples of tf.Example; without them equivalence is checked on random rows, nothing is scored, and
            no int8 file is made.
          recipe: the name of one, the JSON text of one, or a .json file, which is read now; or a RuntimeParameter or
            placeholder of a name or JSON text.
          options: fields of `tfopt.optimize.Options`, a dict or JSON text; or a RuntimeParameter or placeholder of JSON
            text. With `label`, the train split is what recipes learn from, and the eval split is scored.
          train_split, eval_split: names of splits.
          representative_rows: how many rows of the train split, the same number of each span, outputs are compared and
            activations calibrated on.
          allow_rejected: go on where the Serving model or a TFLite file asked for by name is rejected. The original
            then stands in the place of a rejected Serving model, with the property kept_original=1.

        Raises:
          TfoptError: an unknown recipe or option.
        """
        super().__init__(
            spec=OptimizerSpec(
                model=model,
                examples=examples,
                recipe=_checked_recipe(recipe),
                options=_checked_options(options),
                train_split=train_split,
                eval_split=eval_split,
                representative_rows=representative_rows,
                allow_rejected=int(allow_rejected),
                tfopt_version=artifacts.version(),
                optimized_model=types.Channel(type=standard_artifacts.Model),
                tflite_model=types.Channel(type=standard_artifacts.Model),
                report=types.Channel(type=artifacts.OptimizationReport),
            )
        )


def _checked_recipe(given: Any) -> Any:
    """A name or JSON text; a file becomes its text, so that a changed file is not taken for a cached one."""
    if isinstance(given, str):
        read = recipe.read(given)
        return given if given in recipe.NAMED else json.dumps(read.to_dict())
    if isinstance(given, Mapping | list):
        return _checked_recipe(json.dumps(given))
    return given


def _checked_options(given: Any) -> Any:
    if given is None or isinstance(given, str | Mapping):
        return json.dumps(parse_options(given or "{}"), sort_keys=True)
    return given
