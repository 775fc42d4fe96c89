"""The main job: a SavedModel in, verified and measured artifacts out, all or nothing."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import hashlib
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from tfopt import distribution, emit, metrics, passes, recipe, runtime, sources
from tfopt.assess import Assessment, assess
from tfopt.environment import describe, need_beam
from tfopt.errors import TfoptError, one_line
from tfopt.export import tflite
from tfopt.model import Model
from tfopt.model import load as load_model
from tfopt.publish import Workspace
from tfopt.report import Refusal, Report, Step
from tfopt.rewrite import Log
from tfopt.run_data import all_evaluation_rows, evaluation_rows, learned_on, learning_data, main_signature
from tfopt.tfmot import check as tfmot
from tfopt.verify import Verifier


@dataclasses.dataclass(frozen=True)
class Options:
    """What the main job is asked for; each field is a flag of `tfopt-optimize`, and is explained there.

    Attributes:
      tflite: names to emit; None emits what the data allows, and does not fail where the model cannot be converted.
    """

    recipe: str = "lossless"
    set: tuple[str, ...] = ()
    tflite: tuple[str, ...] | None = None
    representative_data: str | None = None
    labels: str | None = None
    eval_data: str | None = None
    metric: str = "accuracy"
    eval_output: str | None = None
    label: str = "label"
    max_accuracy_drop: float | None = None
    minimize: str = "bytes"
    engine: str = "graph"
    broadcast_inputs: str = ""
    keep_example_signature: bool = False
    signatures: tuple[str, ...] | None = None
    seed: int = 0
    checkpoint_dir: str | None = None
    strategy: str = ""
    overwrite: bool = False
    version: int = 1
    verify: bool = True
    io_type: str = "float32"
    runtime: str = "litert"
    all_integer: bool = False
    keep_batch: bool = False
    allow_select_tf_ops: bool = False
    serving_tflite: bool = False
    deployment: str = ""
    max_constant_bytes: int | None = None
    measure_latency: bool = True
    threads: int = 2
    inputs: tuple[str, ...] | None = None
    outputs: tuple[str, ...] | None = None
    allow_unsafe_deserialization: bool = False
    beam_args: str | None = None
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """What the main job gives back.

    Attributes:
      report: the record of the run; also written as report.json and report.html.
      directory: where everything is; None for a worker that trained along, and whose results are the chief's.
      failed: artifacts that were asked for by name and not emitted, or a serving model that was rejected.
      empty: whether nothing was emitted.
    """

    report: Report
    directory: Path | None
    failed: list[str]
    empty: bool


def optimize(model: str | Path, output_dir: str | Path, options: Options = Options()) -> Result:
    """Optimizes a model.

    Args:
      model: a SavedModel directory, a Keras file, or a frozen GraphDef (see `tfopt.sources`).
      output_dir: gets `serving/<version>/`, `device/*.tflite`, `report.json` and `report.html`, each by one rename at
        the very end.
      options: what to do.

    Returns:
      The report, and whether what was asked for is there.

    Raises:
      TfoptError: bad input or usage; nothing is left behind.
    """
    started = datetime.datetime.now(datetime.UTC)
    steps_wanted = _wanted(options)
    if options.tflite is None:
        options = dataclasses.replace(options, tflite=steps_wanted.tflite)
    _check(options, steps_wanted)
    with (
        distribution.using(options.strategy),
        distribution.place(output_dir) as place,
        Workspace(place, emit.targets(options), overwrite=options.overwrite) as workspace,
    ):
        source = sources.as_saved_model(
            model,
            inputs=options.inputs,
            outputs=options.outputs,
            allow_unsafe_deserialization=options.allow_unsafe_deserialization,
            workdir=workspace.scratch,
        )
        begun = time.monotonic()
        loaded = load_model(source, list(options.signatures) if options.signatures else None)
        loading = time.monotonic() - begun
        evaluation, everything = evaluation_rows(loaded, options), all_evaluation_rows(loaded, options)
        globs = [given.get("inputs", "") for name, given in steps_wanted.steps if name == "broadcast_inputs"]
        once = [glob.strip() for each in globs for glob in each.split(",") if glob.strip()]
        verifier = Verifier(loaded, options.representative_data, options.seed, once)
        report = Report(
            created=started.isoformat(timespec="seconds"),
            command=options.command,
            seed=options.seed,
            environment=describe(),
            recipe=steps_wanted.to_dict(),
            verify=_verify_words(verifier, options),
            data={
                "representative": next(iter(verifier.inputs.values())).source,
                "evaluation": options.eval_data,
            },
        )
        if evaluation and everything:
            report.data["searched_on"] = (
                f"the first {len(evaluation):,} rows of the evaluation data; artifacts: all of it"
            )
        report.steps.append(_load_step(loaded, loading))
        report.model = _model_facts(model, loaded)
        report.warnings += _warnings(verifier)
        for rows in [*verifier.inputs.values(), *([evaluation] if evaluation else [])]:
            report.warnings += [warning for warning in rows.warnings if warning not in report.warnings]
        optimized, served, data = loaded, None, learning_data(loaded, evaluation, model, options)
        if words := learned_on(data, options):
            report.data["learned_on"] = words
        steps = tqdm(steps_wanted.steps, desc="passes", unit="pass", leave=False, disable=None)
        for position, (name, chosen) in enumerate(steps, 1):
            if options.checkpoint_dir:
                own = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
                folder = Path(options.checkpoint_dir) / f"{position:02}_{name}" / own  # other options start anew
                data = dataclasses.replace(data, checkpoint=folder)
            if passes.get(name).files and not set(passes.get(name).files) & set(emit.files(options)):
                report.steps.append(_left_out(optimized, name, chosen))
                continue
            if served is None and passes.get(name).device:
                served = optimized
            optimized, step = run_pass(optimized, name, chosen, verifier if options.verify else None, data)
            report.steps.append(step)
            if step.status == "undone":
                report.warnings.append(f"{name} was undone: {step.notes[-1]}")
            report.warnings += step.warnings

        trained = any(step.name == "train_quantized" for step in report.steps)
        artifacts = emit.emit(served or optimized, optimized, trained, workspace, options, loaded)
        signatures = (served or optimized).signatures
        warmup = emit.warmup_data(loaded, served or optimized, workspace, options)
        assessment = Assessment(
            original=source,
            signature=main_signature(loaded),
            comparison=verifier.inputs,
            random=frozenset(verifier.random),
            evaluation=evaluation,
            everything=everything,
            beam_args=options.beam_args,
            metric=options.metric,
            output=options.eval_output,
            max_accuracy_drop=options.max_accuracy_drop,
            latency=options.measure_latency and distribution.is_chief(),
            threads=options.threads,
            lossless=all(passes.get(n).is_lossless(given) or passes.get(n).device for n, given in steps_wanted.steps),
            requests=optimized.requests,
            stands_for=optimized.stands_for,
        )
        del loaded, optimized, served, data
        gc.collect()  # sessions are in cycles, and hold their variables: measuring needs the memory of large weights
        _add_signatures(report.model, source, list(verifier.inputs))
        report.artifacts = assess(assessment, artifacts)
        if options.serving_tflite:
            report.artifacts += emit.add_serving_tflite(report.artifacts, signatures, options)
        emit.add_client(report.artifacts, workspace)
        emit.add_deployment(report.artifacts, warmup, options)
        emitted = [a for a in report.artifacts if a.name != "original" and not a.rejected]
        for artifact in report.artifacts:
            if artifact.rejected:
                workspace.discard(artifact.path)
                artifact.path = ""
        failed = [
            a.name
            for a in report.artifacts
            if a.rejected and a.name in ("serving", emit.SERVING_TFLITE, *(options.tflite or ()))
        ]
        for artifact in emitted:
            artifact.path = str(workspace.final(artifact.path))
        workspace.write("report.json", report.to_json())
        workspace.write("report.html", report.html())
        workspace.publish()
        for position, (name, _) in enumerate(steps_wanted.steps, 1):
            if options.checkpoint_dir:
                shutil.rmtree(Path(options.checkpoint_dir) / f"{position:02}_{name}", ignore_errors=True)
        distribution.wait()
        directory = place if distribution.is_chief() else None
    return Result(report, directory, failed, not emitted)


def _wanted(options: Options) -> recipe.Recipe:
    """The recipe, with the options of passes that have a flag of their own, and those of --set."""
    chosen, settings = recipe.read(options.recipe), list(options.set)
    own = {
        "--keep_example_signature": (options.keep_example_signature, "compact_signature.keep_example_signature=true"),
        "--broadcast_inputs": (options.broadcast_inputs, f"broadcast_inputs.inputs={options.broadcast_inputs}"),
    }
    for flag, (given, setting) in own.items():
        name = setting.partition(".")[0]
        if given and name not in [step for step, _ in chosen.steps]:
            raise TfoptError(f"{flag}: recipe {chosen.name} has no pass {name}; choose --recipe=compact_signature")
        settings += [setting] if given else []
    return recipe.override(chosen, settings)


def run_pass(
    model: Model, name: str, options: dict[str, Any], verifier: Verifier | None, data: passes.Data | None = None
) -> tuple[Model, Step]:
    """Runs one pass on a copy of a model, and keeps the copy only where its outputs are right.

    Args:
      model: left as it is.
      name: of the pass.
      options: its options, already checked by `recipe.parse`.
      verifier: compares with the original; None skips that.
      data: what a pass that learns is given.

    Returns:
      The model to go on with, and the record for the report.

    Raises:
      TfoptError: a pass that learns lacks data, or cannot do what it was asked for.
    """
    begun = time.monotonic()
    chosen = passes.get(name)
    log = Log()
    rewritten = model.copy()
    problem = None
    try:
        chosen.run(rewritten, log, *([data] if chosen.learns else []), **options)
        rewritten.check()
    except TfoptError as error:
        if chosen.learns or chosen.requests:
            raise
        problem = f"the pass failed: {error}"
    except Exception as error:  # whatever a pass or TensorFlow's optimizers raise, the model before it is sound
        logging.debug("pass %s failed", name, exc_info=True)
        problem = f"the pass failed: {type(error).__name__}: {one_line(error)}"
    step = Step(
        name=name,
        options=options,
        nodes_before=model.node_count(),
        weight_bytes_before=model.weight_bytes,
        applied=dict(log.applied),
        refused=[Refusal(rule, node, reason) for (rule, node), reason in log.refused.items()],
        notes=list(log.notes),
        warnings=list(log.warnings),
        sensitivity=list(log.sensitivity),
        summary=_summary(chosen),
    )
    same = not log.applied and rewritten.graph.same_as(model.graph) and rewritten.functions == model.functions
    if problem is None and verifier is not None:
        found = verifier.last if same else verifier.check(rewritten)
        step.max_error = found.relative
        if chosen.is_lossless(options) or not np.isfinite(found.relative):  # lossy, and yet an answer
            problem = found.broken
        if problem and np.isfinite(found.relative) and verifier.check(model).broken:  # by a lossy pass before this one
            problem = verifier.between(model, rewritten).broken
    if problem is not None:
        step.status = "undone"
        step.notes.append(problem)
        rewritten = model
    elif not log.applied:
        step.status = "no effect"
    elif verifier is None:
        step.status = "unverified"
    step.nodes_after = rewritten.node_count()
    step.weight_bytes_after = rewritten.weight_bytes
    step.seconds = time.monotonic() - begun
    return rewritten, step


def _load_step(model: Model, seconds: float) -> Step:
    """The record of loading, which already leaves behind what belongs to saving, restoring and training."""
    return Step(
        name="load",
        nodes_before=model.original_nodes,
        nodes_after=model.node_count(),
        weight_bytes_before=model.weight_bytes,
        weight_bytes_after=model.weight_bytes,
        applied={
            "node of another function, of saving, restoring or training": model.original_nodes - model.node_count()
        },
        status="applied",
        notes=[f"not read by any signature, left in the checkpoint: {listed(model.unused)}"] if model.unused else [],
        seconds=seconds,
        summary="reads the signatures, writes out the functions that they call, and leaves everything else behind.",
    )


def _left_out(model: Model, name: str, options: dict[str, Any]) -> Step:
    """The record of a pass that prepares files which are not made."""
    nodes, size, chosen = model.node_count(), model.weight_bytes, passes.get(name)
    return Step(
        name=name,
        options=options,
        nodes_before=nodes,
        nodes_after=nodes,
        weight_bytes_before=size,
        weight_bytes_after=size,
        status="left out",
        notes=[f"it is for the TFLite files {', '.join(chosen.files)}, of which none is made"],
        summary=_summary(chosen),
    )


def listed(names: list[str], limit: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _summary(chosen: passes.Pass) -> str:
    """The sentence with which the file of a pass opens."""
    text = sys.modules[chosen.run.__module__].__doc__ or ""
    return " ".join(text.split("\n\n")[0].split()).partition(": ")[2]


def _check(options: Options, steps: recipe.Recipe) -> None:
    """Raises what can be known to be wrong before any work is done."""
    try:
        tflite.check_names(options.tflite or ())
    except TfoptError as error:
        raise TfoptError(f"--tflite: {error}") from error
    learned = options.labels and any(passes.get(name).learns and passes.get(name).device for name, _ in steps.steps)
    for name in options.tflite or ():
        if name in tflite.STATIC and not options.representative_data and not learned:
            raise TfoptError(f"--tflite={name} needs --representative_data: integer activations are calibrated on it")
    if options.metric not in metrics.METRICS:
        raise TfoptError(f"--metric: unknown {options.metric!r}; choose from {', '.join(metrics.METRICS)}")
    if options.max_accuracy_drop is not None and not options.eval_data:
        raise TfoptError("--max_accuracy_drop needs --eval_data: there is nothing to measure accuracy on")
    if options.minimize not in passes.MINIMIZE:
        raise TfoptError(f"--minimize: choose from {', '.join(passes.MINIMIZE)}; received {options.minimize!r}")
    if options.engine not in passes.ENGINES:
        raise TfoptError(f"--engine: choose from {', '.join(passes.ENGINES)}; received {options.engine!r}")
    if options.engine != "graph":
        tfmot.check(steps.steps, options.strategy)
    if options.serving_tflite and options.tflite == ():
        raise TfoptError("--serving_tflite needs a quantized file: name one, such as --tflite=dynamic_int8")
    if options.version < 1:
        raise TfoptError(
            f"--version: must be a positive number, as TensorFlow Serving wants; received {options.version}"
        )
    if options.io_type not in tflite.IO_TYPES:
        raise TfoptError(f"--io_type: choose from {', '.join(tflite.IO_TYPES)}; received {options.io_type!r}")
    if options.beam_args is not None:
        need_beam("--beam_args")
        calibrates = [name for name, _ in steps.steps if "ranges" in passes.get(name).makes]
        if not options.eval_data and not (calibrates and options.representative_data):
            raise TfoptError(
                "--beam_args: nothing would run on Beam: give --eval_data, or --representative_data and a recipe that "
                "calibrates, such as --recipe=device_int8"
            )
    if options.runtime not in tflite.RUNTIMES:
        raise TfoptError(f"--runtime: choose from {', '.join(tflite.RUNTIMES)}; received {options.runtime!r}")


def _verify_words(verifier: Verifier, options: Options) -> str:
    if not options.verify:
        return "off: outputs were not compared after each pass (--verify=off)"
    rows = len(next(iter(verifier.inputs.values())))
    source = next(iter(verifier.inputs.values())).source
    return f"on: outputs of every signature compared after each pass on {rows} rows ({source})"


def _warnings(verifier: Verifier) -> list[str]:
    found = [
        f"signature {name!r} gives other outputs at each call: random ops are active at serving time, so nothing "
        "it does can be verified"
        for name in verifier.random
    ]
    for name, calls in verifier.expected.items():
        for output, value in calls[0].items():
            if value.dtype.kind == "f" and not _finite(value):
                found.append(
                    f"signature {name!r}: output {output!r} of the original is not finite on the inputs compared"
                )
    return found


def _finite(value: Any) -> bool:
    return bool(np.isfinite(value).all())


def _model_facts(given: str | Path, model: Model) -> dict[str, Any]:
    return {
        "path": str(given),
        "origin": model.origin,
        "nodes": model.original_nodes,
        "parameters": int(sum(w.size for w in model.weights.values())),
        "state": sorted(model.state),
        "tables": sum(n.op in ("HashTableV2", "MutableHashTableV2", "HashTable") for n in model.graph.nodes.values()),
        "assets": [asset.filename for asset in model.assets],
    }


def _add_signatures(facts: dict[str, Any], source: Path, names: list[str]) -> None:
    """Adds what a runtime says about the original; it holds the weights once more while it is open."""
    with runtime.open(source) as program:
        facts["origin"] += f", loaded by {program.loader}"
        facts["signatures"] = [
            {
                "name": name,
                "inputs": [_spec(s) for s in program.signatures[name].inputs.values()],
                "outputs": [_spec(s) for s in program.signatures[name].outputs.values()],
            }
            for name in names
            if name in program.signatures
        ]


def _spec(spec: Any) -> dict[str, Any]:
    return {"name": spec.name, "dtype": str(spec.dtype), "shape": None if spec.shape is None else list(spec.shape)}
