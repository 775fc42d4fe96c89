"""OptimizationValidator: is the optimized model as good as the original? Its blessings stop a Pusher where it is not.

    validator = OptimizationValidator(
        model=trainer.outputs["model"],
        optimized_model=optimizer.outputs["optimized_model"],
        tflite_model=optimizer.outputs["tflite_model"],
        examples=example_gen.outputs["examples"],
        bars={"metrics": ["auc"], "label": "big_tip", "max_accuracy_drop": 0.01, "max_error": 1e-4},
    )
    Pusher(model=optimizer.outputs["optimized_model"], model_blessing=validator.outputs["blessing"], ...)
    DevicePusher(tflite_model=optimizer.outputs["tflite_model"], blessing=validator.outputs["tflite_blessing"], ...)

All artifacts run side by side on one pass over the split, by Beam with the pipeline's beam_pipeline_args. The Serving
model and the TFLite files have a blessing each: a TFLite file that lost too much does not keep a sound Serving model
from its server.
"""

from __future__ import annotations

import dataclasses
import json
import posixpath
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from tfx import types
from tfx.components.evaluator import constants
from tfx.dsl.components.base.base_beam_component import BaseBeamComponent
from tfx.dsl.components.base.base_beam_executor import BaseBeamExecutor
from tfx.dsl.components.base.executor_spec import BeamExecutorSpec
from tfx.types import standard_artifacts
from tfx.types.component_spec import ChannelParameter, ComponentSpec, ExecutionParameter
from tfx.types.system_executions import Evaluate
from tfx.utils import io_utils

from tfopt import counterparts
from tfopt.errors import TfoptError
from tfopt.evaluation import Evaluation, Result, evaluate
from tfopt.tfx import artifacts, examples
from tfopt.tfx.bars import Bars, parse_bars

EVALUATION = "evaluation.json"
# By current_model_id, a Resolver would take the files for the latest blessed model that serves.
_TFLITE_ID = "tflite_model_id"


class OptimizationValidatorExecutor(artifacts.Reporting, BaseBeamExecutor):
    """Evaluates once, and writes both blessings."""

    def _run(
        self,
        inputs: dict[str, list[types.Artifact]],
        outputs: dict[str, list[types.Artifact]],
        parameters: dict[str, Any],
    ) -> None:
        bars = parse_bars(parameters["bars"])
        original, optimized = (artifacts.single(inputs, name) for name in ("model", "optimized_model"))
        assert original is not None and optimized is not None  # TFX checks inputs that are not optional
        tflite = artifacts.single(inputs, "tflite_model")
        source = examples.source(inputs["examples"], parameters["eval_split"])
        (blessing,), (tflite_blessing,) = outputs["blessing"], outputs["tflite_blessing"]
        with artifacts.scratch() as folder:
            paths = [artifacts.local(artifacts.serving_model(each), folder) for each in (original, optimized)]
            paths += [] if tflite is None else artifacts.tflite_files(artifacts.local(tflite.uri, folder))
            found = _evaluate(paths, source, bars, self._beam_args())
        names = ["original", "serving", *(posixpath.basename(path).removesuffix(".tflite") for path in paths[2:])]
        found.results = [dataclasses.replace(r, path=name) for r, name in zip(found.results, names, strict=True)]
        first, serving, *device = found.results
        reasons = bars.problems(dataclasses.replace(found, results=[first, serving]), tflite=False)
        _bless(blessing, reasons, found, [first, serving], optimized, original)
        apart = dataclasses.replace(found, results=[first, *device])
        reasons = bars.problems(apart, tflite=True) if device else [_no_files(tflite)]
        _bless(tflite_blessing, reasons, found, apart.results, tflite, original, _TFLITE_ID)

    def _beam_args(self) -> str | None:
        """The pipeline's arguments as one string, without the labels that TFX adds; None where it has none."""
        given = list(self._beam_pipeline_args)
        if not given:
            return None
        kept = [
            each
            for before, each in zip(["", *given], given, strict=False)
            if each != "--labels" and before != "--labels" and not each.startswith("--labels=")
        ]
        return shlex.join(kept)


def _evaluate(paths: list[str], source: str, bars: Bars, beam_args: str | None) -> Evaluation:
    """Evaluates all in one pass; an artifact that cannot be compared with the first at all gets a failure."""

    def run(chosen: list[str]) -> Evaluation:
        return evaluate(
            chosen,
            source,
            metrics=bars.metrics,
            label=bars.label,
            signature=bars.signature,
            output=bars.output,
            beam_args=beam_args,
        )

    try:
        return run(paths)
    except TfoptError:
        reasons = [None, *(_unfit(paths[0], path, bars) for path in paths[1:])]
        if not any(reasons):
            raise
    fit = [path for path, reason in zip(paths, reasons, strict=True) if not reason]
    found = run(fit) if len(fit) > 1 or bars.metrics else Evaluation([Result(paths[0], "")], source, 0)
    left = iter(found.results)
    results = [
        Result(path, "", failure=reason) if reason else next(left) for path, reason in zip(paths, reasons, strict=True)
    ]
    return dataclasses.replace(found, results=results)


def _unfit(first: str, other: str, bars: Bars) -> str | None:
    """Why an artifact cannot be asked what the first is asked; None where it can."""
    with counterparts.opened([first], ["the original"], bars.signature):
        pass  # what is wrong with the original is no reason against another
    try:
        with counterparts.opened([first, other], ["the original", "it"], bars.signature):
            return None
    except TfoptError as error:
        return str(error)


def _no_files(tflite: types.Artifact | None) -> str:
    if tflite is None:
        return "no tflite_model was given"
    said = artifacts.custom_properties(tflite).get("rejected")
    return f"there is no .tflite file{f': {said}' if said else ''}"


def _bless(
    blessing: types.Artifact,
    reasons: Sequence[str],
    evaluation: Evaluation,
    shown: Sequence[Result],
    judged: types.Artifact | None,
    original: types.Artifact,
    id_key: str = constants.ARTIFACT_PROPERTY_CURRENT_MODEL_ID_KEY,
) -> None:
    """Writes a blessing as TFX's own Evaluator does, and says why."""
    good = not reasons
    name = constants.BLESSED_FILE_NAME if good else constants.NOT_BLESSED_FILE_NAME
    facts: dict[str, Any] = {
        constants.ARTIFACT_PROPERTY_BLESSED_KEY: constants.BLESSED_VALUE if good else constants.NOT_BLESSED_VALUE,
        constants.ARTIFACT_PROPERTY_BASELINE_MODEL_URI_KEY: original.uri,
        constants.ARTIFACT_PROPERTY_BASELINE_MODEL_ID_KEY: original.id,
        "reasons": "; ".join(reasons),
        "samples": evaluation.rows,
    }
    if judged is not None:
        facts[constants.ARTIFACT_PROPERTY_CURRENT_MODEL_URI_KEY] = judged.uri
        facts[id_key] = judged.id
    for result in shown:
        facts |= _figures(result)
    io_utils.write_string_file(posixpath.join(blessing.uri, EVALUATION), evaluation.to_json())
    io_utils.write_string_file(posixpath.join(blessing.uri, name), "")
    artifacts.set_custom_properties(blessing, facts)


def _figures(result: Result) -> dict[str, Any]:
    """The custom properties of one artifact: its metrics with the integers behind them, and how far it is apart."""
    found: dict[str, Any] = {f"{result.path}_{name}": metric.value for name, metric in result.metrics.items()}
    for name, counts in result.counts.items():
        found[f"{result.path}_{name}_counts"] = json.dumps(counts)
    if result.equivalence is not None and not result.failure:
        found[f"{result.path}_max_error"] = result.equivalence.max_error
        found[f"{result.path}_agreement"] = result.equivalence.agreement
    return found


class OptimizationValidatorSpec(ComponentSpec):
    """The interface of OptimizationValidator."""

    PARAMETERS: ClassVar = {
        "bars": ExecutionParameter(type=str),
        "eval_split": ExecutionParameter(type=str),
        "tfopt_version": ExecutionParameter(type=str),
    }
    INPUTS: ClassVar = {
        "model": ChannelParameter(type=standard_artifacts.Model),
        "optimized_model": ChannelParameter(type=standard_artifacts.Model),
        "examples": ChannelParameter(type=standard_artifacts.Examples),
        "tflite_model": ChannelParameter(type=standard_artifacts.Model, optional=True),
    }
    OUTPUTS: ClassVar = {
        "blessing": ChannelParameter(type=standard_artifacts.ModelBlessing),
        "tflite_blessing": ChannelParameter(type=standard_artifacts.ModelBlessing),
    }
    TYPE_ANNOTATION = Evaluate


class OptimizationValidator(BaseBeamComponent):
    """Blesses an optimized model that is as good as the original, and its TFLite files."""

    SPEC_CLASS = OptimizationValidatorSpec
    EXECUTOR_SPEC = BeamExecutorSpec(OptimizationValidatorExecutor)

    def __init__(
        self,
        model: types.BaseChannel,
        optimized_model: types.BaseChannel,
        examples: types.BaseChannel,
        tflite_model: types.BaseChannel | None = None,
        bars: Any = None,
        eval_split: Any = "eval",
    ):
        """Makes the component, and checks the bars.

        Args:
          model: the original Model.
          optimized_model: what Optimizer made of it.
          examples: Examples of tf.Example, with labels where there are metrics.
          tflite_model: the TFLite files that Optimizer made.
          bars: fields of `Bars`, a dict or JSON text; or a RuntimeParameter or placeholder of JSON text.
          eval_split: name of the split that all are run on.

        Raises:
          TfoptError: an unknown bar or metric, or no bar.
        """
        if bars is None or isinstance(bars, str | Mapping):
            parse_bars(bars or {})
            bars = bars if isinstance(bars, str) else json.dumps(bars, sort_keys=True)
        super().__init__(
            spec=OptimizationValidatorSpec(
                model=model,
                optimized_model=optimized_model,
                examples=examples,
                tflite_model=tflite_model,
                bars=bars,
                eval_split=eval_split,
                tfopt_version=artifacts.version(),
                blessing=types.Channel(type=standard_artifacts.ModelBlessing),
                tflite_blessing=types.Channel(type=standard_artifacts.ModelBlessing),
            )
        )
