"""Optimizes a trained TensorFlow model for TensorFlow Serving and for devices.

Example:
  tfopt-optimize --model=saved_models/digits --output_dir=/tmp/digits --tflite=float32,int8 \\
    --representative_data=representative.npz --eval_data=eval.npz --max_accuracy_drop=0.01

Exit codes: 0 everything that was asked for is there; 1 something asked for was rejected, the report says why;
2 bad usage or input, nothing was written.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from tfopt import isolate
from tfopt.publish import remove_stale

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "SavedModel directory, .keras or .h5 file, or a frozen GraphDef .pb.")
flags.DEFINE_string("output_dir", None, "Where serving/, device/, report.json and report.html go.")
flags.DEFINE_string("recipe", "lossless", "Name of a recipe that ships with tfopt, or a .json file (docs/recipes.md).")
flags.DEFINE_multi_string("set", [], "Changes an option of the recipe: --set=prune_magnitude.sparsity=0.9; repeatable.")
flags.DEFINE_list(
    "tflite",
    None,
    "TFLite files to emit (docs/devices.md says which to choose): float32, float16, dynamic_int8, dynamic_int4, "
    "dynamic_int4_b32, _b64, _b128 or _b256 (in blocks), weight_int8, weight_int4, int8, int16x8 (int8 weights, int16 "
    "activations), int4, mixed. Empty: none. Not given: what the recipe is for, or else float32 and dynamic_int8, and "
    "int8 where there is representative data.",
)
flags.DEFINE_string(
    "representative_data",
    None,
    "Typical inputs, for verification and calibration: .npz keyed by input name, TFRecord glob of tf.Example, or "
    "python:module:function that returns a tf.data.Dataset.",
)
flags.DEFINE_string(
    "labels",
    None,
    "Labelled training rows, in the same forms, for recipes that train; without them the original model teaches.",
)
flags.DEFINE_string("eval_data", None, "Labelled inputs, in the same forms; labels under --label.")
flags.DEFINE_string("label", "label", "Array or feature of --eval_data that holds the labels.")
flags.DEFINE_string("metric", "accuracy", "accuracy, top5, auc, f1, logloss, mse, rmse or mae.")
flags.DEFINE_string("eval_output", None, "Output that --metric scores, where the signature has several.")
flags.DEFINE_float("max_accuracy_drop", None, "Artifacts that lose more, in the metric's own units, are not emitted.")
flags.DEFINE_enum(
    "minimize", "bytes", ["bytes", "latency"], "What recipes that search make least within --max_accuracy_drop."
)
flags.DEFINE_enum(
    "engine",
    "graph",
    ["graph", "tfmot"],
    "What prunes, clusters and trains quantized models: tfopt, the graph of any model; or TFMOT, one that is still of "
    "Keras 2 (docs/training.md).",
)
flags.DEFINE_alias("qat_engine", "engine")  # its name while it was for quantization alone
flags.DEFINE_string(
    "broadcast_inputs",
    "",
    "Globs, with commas, of features that a request of the recipe compact_signature holds once for all its rows: "
    "--broadcast_inputs='user_*' (docs/compact_signature.md).",
)
flags.DEFINE_bool(
    "keep_example_signature",
    False,
    "Keep signatures of tf.Examples beside the compact ones, which are then called <name>_compact.",
)
flags.DEFINE_list("signatures", None, "Signatures to keep; all where not given.")
flags.DEFINE_integer("seed", 0, "Of everything random.")
flags.DEFINE_string(
    "checkpoint_dir", None, "Where trainings keep their state: a run that was killed goes on from there if run again."
)
flags.DEFINE_enum(
    "strategy",
    "",
    ["", "mirrored", "multiworker"],
    "Train on all GPUs of this machine, or on all machines that TF_CONFIG names (docs/training.md); else one device.",
)
flags.DEFINE_bool("overwrite", False, "Replace what an earlier run wrote to --output_dir.")
flags.DEFINE_integer("version", 1, "Version directory under serving/.", lower_bound=1)
flags.DEFINE_enum("verify", "on", ["on", "off"], "Compare outputs before and after each pass.")
flags.DEFINE_enum("io_type", "float32", ["float32", "int8"], "Type of inputs and outputs of int8, int4, mixed files.")
flags.DEFINE_enum(
    "runtime",
    "litert",
    ["litert", "tflite-2.14"],
    "Runtime that the TFLite files are for; tflite-2.14 is the frozen tflite-runtime: what it cannot run is refused.",
)
flags.DEFINE_bool("all_integer", False, "Refuse int8, int16x8, int4 and mixed files in which an op was left in float.")
flags.DEFINE_bool("keep_batch", False, "Keep the batch of TFLite files dynamic instead of fixing it to 1.")
flags.DEFINE_bool("allow_select_tf_ops", False, "Let TFLite files use TensorFlow ops, which need the Flex delegate.")
flags.DEFINE_bool(
    "serving_tflite",
    False,
    "Put the first quantized file of --tflite beside saved_model.pb as model.tflite, for TensorFlow Serving's "
    "--prefer_tflite_model (docs/serving.md).",
)
flags.DEFINE_string(
    "deployment",
    "",
    "What clients call the model: writes warmup requests, batching parameters, models.config, Docker Compose and "
    "Kubernetes files and the server's command line beside the serving model (docs/deployment.md).",
)
flags.DEFINE_integer(
    "max_constant_bytes",
    None,
    "Weights up to this many bytes in all are constants in the serving model; the others are variables. Not given: "
    "128 MiB (docs/serving.md says why).",
    lower_bound=0,
)
flags.DEFINE_bool("measure_latency", True, "Measure latency and memory, each artifact in a process of its own.")
flags.DEFINE_integer("threads", 2, "Threads of the runtimes that are measured.", lower_bound=1)
flags.DEFINE_list("inputs", None, "Input tensors of a frozen GraphDef.")
flags.DEFINE_list("outputs", None, "Output tensors of a frozen GraphDef.")
flags.DEFINE_bool("allow_unsafe_deserialization", False, "Run code that a Keras file carries (Lambda layers).")
flags.DEFINE_string(
    "beam_args",
    None,
    "Read --representative_data for calibration, and --eval_data, on Apache Beam, all rows of them, with these flags "
    "of its own in one string: --beam_args='--runner=DirectRunner --direct_running_mode=multi_processing "
    "--direct_num_workers=2' (docs/beam.md). Empty: Beam with its defaults. Not given: in this process.",
)
flags.mark_flags_as_required(["model", "output_dir"])


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    from tfopt.errors import TfoptError

    if len(argv) > 1:
        raise TfoptError(f"unexpected argument {argv[1]!r}: everything is a flag, see --help")
    from tfopt.optimize import Options, optimize

    def names(values: list[str] | None) -> tuple[str, ...] | None:
        return None if values is None else tuple(value for value in values if value)

    result = optimize(
        FLAGS.model,
        FLAGS.output_dir,
        Options(
            recipe=FLAGS.recipe,
            set=tuple(FLAGS.set),
            tflite=names(FLAGS.tflite),
            representative_data=FLAGS.representative_data,
            labels=FLAGS.labels,
            eval_data=FLAGS.eval_data,
            metric=FLAGS.metric,
            eval_output=FLAGS.eval_output,
            label=FLAGS.label,
            max_accuracy_drop=FLAGS.max_accuracy_drop,
            minimize=FLAGS.minimize,
            engine=FLAGS.engine,
            broadcast_inputs=FLAGS.broadcast_inputs,
            keep_example_signature=FLAGS.keep_example_signature,
            signatures=names(FLAGS.signatures),
            seed=FLAGS.seed,
            checkpoint_dir=FLAGS.checkpoint_dir,
            strategy=FLAGS.strategy,
            overwrite=FLAGS.overwrite,
            version=FLAGS.version,
            verify=FLAGS.verify == "on",
            io_type=FLAGS.io_type,
            runtime=FLAGS.runtime,
            all_integer=FLAGS.all_integer,
            keep_batch=FLAGS.keep_batch,
            allow_select_tf_ops=FLAGS.allow_select_tf_ops,
            serving_tflite=FLAGS.serving_tflite,
            deployment=FLAGS.deployment,
            max_constant_bytes=FLAGS.max_constant_bytes,
            measure_latency=FLAGS.measure_latency,
            threads=FLAGS.threads,
            inputs=names(FLAGS.inputs),
            outputs=names(FLAGS.outputs),
            allow_unsafe_deserialization=FLAGS.allow_unsafe_deserialization,
            beam_args=FLAGS.beam_args,
            command=shlex.join(["tfopt-optimize", *sys.argv[1:]]),
        ),
    )
    if result.directory is None:
        print("This worker trained along; the results are where the chief runs.")
        return 0
    print(result.report.table())
    print(f"\nReport: {result.directory / 'report.html'}")
    return 1 if result.failed or result.empty else 0


def clean_up() -> None:
    """Removes what a run that crashed left behind."""
    remove_stale(Path(FLAGS.output_dir))


def run() -> None:
    """The console command."""
    isolate.run(main, clean_up)


if __name__ == "__main__":
    run()
