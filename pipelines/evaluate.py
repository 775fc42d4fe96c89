"""Evaluates artifacts side by side, in one pass over the rows: SavedModels, .tflite and Keras files.

Example:
  tfopt-evaluate saved_models/digits /tmp/digits/device/int8.tflite --data=eval.npz --metric=accuracy,logloss \\
      --max_accuracy_drop=0.01

The first artifact is the reference. Exit codes: 0; 1 where an artifact fails or misses a bar; 2 bad usage or input.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from tfopt import isolate

FLAGS = flags.FLAGS

flags.DEFINE_enum("format", "text", ["text", "json"], "For people, or for programs.")
flags.DEFINE_string(
    "data",
    None,
    "Rows, by the names of inputs that the first artifact has: .npz, TFRecord glob of tf.Example or of logged requests "
    "(PredictionLog), or python:module:function that returns a tf.data.Dataset.",
)
flags.DEFINE_list("metric", [], "accuracy, top5, auc, f1, logloss, mse, rmse, mae; none where the rows have no labels.")
flags.DEFINE_string("label", "label", "Array or feature of --data that holds the labels.")
flags.DEFINE_string("signature", None, "Of all; serving_default, or the first that all have, where not given.")
flags.DEFINE_string("eval_output", None, "Output of the first artifact that --metric scores, where it has several.")
flags.DEFINE_integer("batch_size", 32, "Rows of a call.", lower_bound=1)
flags.DEFINE_integer("threads", 2, "Threads of the runtimes, in each process.", lower_bound=1)
flags.DEFINE_string(
    "beam_args",
    None,
    'Read and run on Apache Beam, with these options of it: "--direct_running_mode=multi_processing '
    '--direct_num_workers=4", or "" for its defaults. Needs tfopt[beam].',
)
flags.DEFINE_integer("worst", 0, "How many of the rows that differ most are named.", lower_bound=0, upper_bound=10)
flags.DEFINE_float("max_accuracy_drop", None, "How much worse than the first each metric may be, in its own units.")
flags.DEFINE_float("max_error", None, "Largest error, over the scale of the output, that is accepted.", lower_bound=0)
flags.DEFINE_float("min_agreement", None, "Smallest top-1 agreement that is accepted, from 0 to 1.")
flags.DEFINE_list(
    "bar", [], "Worst value of a metric that is accepted, as auc=0.9: the least, or for losses and errors the largest."
)
flags.DEFINE_bool("allow_unsafe_deserialization", False, "Run code that a Keras file carries (Lambda layers).")


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    from tfopt.errors import TfoptError

    if len(argv) < 2:
        raise TfoptError("give artifacts: SavedModel directories, .tflite or Keras files; received none")
    if not FLAGS.data:
        raise TfoptError("--data: give the rows to evaluate on")
    from tfopt import evaluation_bars
    from tfopt.evaluation import evaluate
    from tfopt.evaluation_text import draw

    asked = {name: FLAGS[name].value for name in ("max_accuracy_drop", "max_error", "min_agreement")}
    asked["bars"] = dict(map(_bar, FLAGS.bar))
    evaluation_bars.check(len(argv) - 1, FLAGS.metric, **asked)
    found = evaluate(
        argv[1:],
        FLAGS.data,
        metrics=FLAGS.metric,
        label=FLAGS.label,
        signature=FLAGS.signature,
        output=FLAGS.eval_output,
        beam_args=FLAGS.beam_args,
        threads=FLAGS.threads,
        batch_size=FLAGS.batch_size,
        allow_unsafe_deserialization=FLAGS.allow_unsafe_deserialization,
    )
    failed = found.problems(**asked)
    print(found.to_json() if FLAGS.format == "json" else draw(found, FLAGS.worst), end="")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _bar(text: str) -> tuple[str, float]:
    from tfopt.errors import TfoptError

    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError as error:
        raise TfoptError(f"--bar: wants METRIC=VALUE, such as auc=0.9; received {text!r}") from error


def run() -> None:
    """The console command."""
    isolate.run(main)


if __name__ == "__main__":
    run()
