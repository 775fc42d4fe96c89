"""Trains, optimizes, validates and pushes a model by TFX: CsvExampleGen to Pusher and DevicePusher.

Example:
  python -m pipelines.tfx_pipeline --data_root=DIR_OF_CSV --pipeline_root=/tmp/taxi/root \
    --metadata=/tmp/taxi/metadata.db --serving_dir=/tmp/taxi/serving --device_dir=/tmp/taxi/device

Exit codes: 0; 1 where the model is not blessed, so that nothing is pushed; 2 bad usage or input, or a component failed.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from pipelines import taxi_trainer
from tfopt import isolate
from tfopt.errors import TfoptError

NAME = "taxi"
# One input a feature: a device has no tf.Examples, nor LiteRT an op that reads them. The serving model takes both.
RECIPE = {
    "name": "taxi",
    "passes": [
        "prune_graph",
        "fold_constants",
        "compact_signature",
        {"pass": "client_lookups", "inputs": "*"},
        "fold_affine",
        "merge_duplicates",
        "prune_graph",
    ],
}

FLAGS = flags.FLAGS


def create_pipeline(
    *,
    data_root: str,
    pipeline_root: str,
    serving_dir: str,
    device_dir: str | None = None,
    metadata: str | None = None,
    module_file: str | None = None,
    train_steps: int = 400,
    label: str | None = None,
    metric: str = "auc",
    max_accuracy_drop: float | None = 0.01,
    max_error: float | None = None,
    recipe: str | dict[str, Any] | None = None,
    tflite: Sequence[str] = ("dynamic_int8",),
    verify: bool = True,
    measure_latency: bool = True,
    beam_args: str | None = None,
) -> Any:
    """Makes the pipeline.

    Args:
      data_root: folder of CSV files, as `CsvExampleGen` reads them.
      pipeline_root: folder of the artifacts.
      serving_dir: the Pusher makes versions in it.
      device_dir: the DevicePusher does so; there is none where `tflite` is empty.
      metadata: SQLite file; None leaves metadata to the orchestrator.
      module_file: of the Trainer.
      train_steps: batches.
      label: column of the CSV; None adds `big_tip` to Chicago's taxi trips.
      metric: of `tfopt.metrics.METRICS`.
      max_accuracy_drop: how much worse than the original's it may be, for the serving model and for TFLite files.
      max_error: largest error of the serving model, over the scale of the output; None does not look at it.
      recipe: a name, JSON (or what it holds), or a .json file; None takes `RECIPE`.
      tflite: names of files for devices.
      verify: check each pass.
      measure_latency: and memory, of each artifact.
      beam_args: for all components that run on Beam; None has the rows of the OptimizationValidator read without Beam.

    Returns:
      A tfx.orchestration.pipeline.Pipeline.
    """
    from tfx.components.example_gen.csv_example_gen.component import CsvExampleGen
    from tfx.components.pusher.component import Pusher
    from tfx.components.schema_gen.component import SchemaGen
    from tfx.components.statistics_gen.component import StatisticsGen
    from tfx.components.trainer.component import Trainer
    from tfx.orchestration import pipeline
    from tfx.orchestration.metadata import sqlite_metadata_connection_config
    from tfx.proto import pusher_pb2, trainer_pb2

    from pipelines.taxi_examples import TaxiExampleGen, csv_files
    from tfopt.tfx.device_pusher import DevicePusher
    from tfopt.tfx.local_run import beam_arguments
    from tfopt.tfx.optimization_validator import OptimizationValidator
    from tfopt.tfx.optimizer import Optimizer

    example_gen = CsvExampleGen(data_root, csv_files()) if label else TaxiExampleGen(data_root).with_id("CsvExampleGen")
    label = label or taxi_trainer.LABEL
    examples = example_gen.outputs["examples"]
    statistics_gen = StatisticsGen(examples=examples)
    schema_gen = SchemaGen(statistics=statistics_gen.outputs["statistics"])
    trainer = Trainer(
        examples=examples,
        schema=schema_gen.outputs["schema"],
        train_args=trainer_pb2.TrainArgs(num_steps=train_steps),
        eval_args=trainer_pb2.EvalArgs(),
        **({"module_file": module_file} if module_file else _own_trainer()),
    )
    optimizer = Optimizer(
        model=trainer.outputs["model"],
        examples=examples,
        recipe=RECIPE if recipe is None else recipe,
        options={
            "label": label,
            "metric": metric,
            "tflite": list(tflite),
            "verify": verify,
            "measure_latency": measure_latency,
        },
    )
    made = optimizer.outputs
    bars = {"metrics": [metric], "label": label, "max_accuracy_drop": max_accuracy_drop, "max_error": max_error}
    validator = OptimizationValidator(
        model=trainer.outputs["model"],
        optimized_model=made["optimized_model"],
        tflite_model=made["tflite_model"] if tflite else None,
        examples=examples,
        bars={name: value for name, value in bars.items() if value is not None},
    )
    filesystem = pusher_pb2.PushDestination.Filesystem(base_directory=serving_dir)
    pusher = Pusher(
        model=made["optimized_model"],
        model_blessing=validator.outputs["blessing"],
        push_destination=pusher_pb2.PushDestination(filesystem=filesystem),
    )
    components = [example_gen, statistics_gen, schema_gen, trainer, optimizer, validator, pusher]
    if tflite:
        tflite_blessing = validator.outputs["tflite_blessing"]
        components.append(DevicePusher(made["tflite_model"], tflite_blessing, device_dir))
    if beam_args is None:
        for component in (example_gen, statistics_gen):
            component.with_beam_pipeline_args(beam_arguments(""))
    return pipeline.Pipeline(
        pipeline_name=NAME,
        pipeline_root=pipeline_root,
        components=components,
        enable_cache=True,
        metadata_connection_config=sqlite_metadata_connection_config(metadata) if metadata else None,
        beam_pipeline_args=None if beam_args is None else beam_arguments(beam_args),
    )


def _own_trainer() -> dict[str, Any]:
    """The Trainer's arguments for the module of this package, which need not be packed; TFX caches by the hash."""
    source = Path(taxi_trainer.__file__).read_bytes()
    return {
        "run_fn": f"{taxi_trainer.__name__}.run_fn",
        "custom_config": {"sha256": hashlib.sha256(source).hexdigest()},
    }


def main(argv: Sequence[str]) -> int:
    """Turns flags into a pipeline, runs or compiles it, and tells what came of it."""
    if argv[1:]:
        raise TfoptError(f"tfx_pipeline takes flags only; received {' '.join(argv[1:])}")
    if FLAGS.tflite and not FLAGS.device_dir:
        raise TfoptError("give --device_dir, where TFLite files are pushed to, or --tflite= for none")
    if FLAGS.compile_to:
        return _compile()
    if not FLAGS.metadata:
        raise TfoptError("give --metadata, the SQLite file of ML Metadata")
    if "://" not in FLAGS.data_root and not list(Path(FLAGS.data_root).glob("*.csv")):
        raise TfoptError(f"--data_root={FLAGS.data_root}: no .csv file in this folder")
    if FLAGS.module_file and not Path(FLAGS.module_file).is_file():
        raise TfoptError(f"--module_file={FLAGS.module_file}: no such file")
    _need_tfx()
    from tfopt.tfx import last_run, lineage, local_run

    metadata = _absolute(FLAGS.metadata)
    run = local_run.run(_from_flags(_absolute, metadata=metadata), metadata, quiet=not FLAGS["verbosity"].present)
    print(last_run.summary(run), end="")
    pushed = last_run.outputs(run, lineage.PUSHED)
    return 0 if all(artifact.properties.get("pushed") for artifact in pushed.values()) else 1


def _from_flags(place: Callable[[str], str], **others: Any) -> Any:
    """The pipeline of the flags; `place` is applied to its folders."""
    return create_pipeline(
        data_root=place(FLAGS.data_root),
        pipeline_root=place(FLAGS.pipeline_root),
        serving_dir=place(FLAGS.serving_dir),
        device_dir=place(FLAGS.device_dir or ""),
        module_file=FLAGS.module_file,
        train_steps=FLAGS.train_steps,
        label=FLAGS.label,
        metric=FLAGS.metric,
        max_accuracy_drop=FLAGS.max_accuracy_drop,
        max_error=FLAGS.max_error,
        recipe=FLAGS.recipe,
        tflite=FLAGS.tflite,
        verify=FLAGS.verify == "on",
        measure_latency=FLAGS.measure_latency,
        beam_args=FLAGS.beam_args,
        **others,
    )


def _compile() -> int:
    """Writes the pipeline for Kubeflow Pipelines or Vertex."""
    if not FLAGS.compile_to.endswith(".json"):
        raise TfoptError(f"--compile_to={FLAGS.compile_to}: the name must end in .json")
    if not FLAGS.image:
        raise TfoptError("--compile_to needs --image, a container image that holds tfopt[tfx]")
    _need_tfx()
    from tfopt.tfx import ir

    ir.compile_pipeline(_from_flags(str), FLAGS.compile_to, FLAGS.image)
    print(f"{FLAGS.compile_to}: for Kubeflow Pipelines and Vertex")
    return 0


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())


def _need_tfx() -> None:
    if importlib.util.find_spec("tfx") is None:
        raise TfoptError("the pipeline needs TFX: pip install 'tfopt[tfx]'")


def run() -> None:
    """Entry point of `python -m pipelines.tfx_pipeline`."""
    # Defined here, so that create_pipeline can be imported beside another script with flags of these names.
    flags.DEFINE_string("data_root", None, "Folder of CSV files.", required=True)
    flags.DEFINE_string("pipeline_root", None, "Folder of what the components make.", required=True)
    flags.DEFINE_string("metadata", None, "SQLite file of ML Metadata; made where it is missing.")
    flags.DEFINE_string("serving_dir", None, "Where the Pusher pushes the serving model to.", required=True)
    flags.DEFINE_string("device_dir", None, "Where the DevicePusher pushes the TFLite files to.")
    flags.DEFINE_string("module_file", None, "File of run_fn, instead of pipelines/taxi_trainer.py.")
    flags.DEFINE_integer("train_steps", 400, "Batches to train on.", lower_bound=1)
    flags.DEFINE_string(
        "label", None, "Column of the labels; the default is big_tip, tips of more than 20% of the fare."
    )
    flags.DEFINE_string("metric", "auc", "Scores the original and the optimized models: accuracy, auc, rmse, ...")
    flags.DEFINE_string("recipe", None, "Named recipe, JSON or .json file, instead of one of this script.")
    flags.DEFINE_list("tflite", ["dynamic_int8"], "TFLite files for devices; none where empty.")
    flags.DEFINE_enum("verify", "on", ["on", "off"], "Compare outputs before and after each pass.")
    flags.DEFINE_bool("measure_latency", True, "Measure latency and memory, each artifact in a process of its own.")
    flags.DEFINE_float("max_accuracy_drop", 0.01, "Bar: --metric may be worse than the original's by so much.")
    flags.DEFINE_float("max_error", None, "Bar: largest error of the serving model, over the scale of the output.")
    flags.DEFINE_string("beam_args", None, "Arguments of Beam, such as --beam_args='--runner=DirectRunner ...'.")
    flags.DEFINE_string("compile_to", None, "Write a .json for Kubeflow Pipelines and Vertex, and run nothing.")
    flags.DEFINE_string("image", None, "Container image that holds tfopt[tfx], for --compile_to.")
    isolate.run(main)


if __name__ == "__main__":
    run()
