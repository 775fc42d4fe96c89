"""Compares two artifacts of any kind: SavedModels, .tflite and Keras files.

Example:
  tfopt-compare saved_models/digits /tmp/digits/device/int8.tflite --data=eval.npz --min_agreement=0.99

Exit codes: 0; 1 where --max_error or --min_agreement is not met; 2 bad usage or input.
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
    "Inputs: .npz keyed by input name, TFRecord glob of tf.Example or of logged requests (PredictionLog), or "
    "python:module:function that returns a tf.data.Dataset. Random ones where not given.",
)
flags.DEFINE_string("signature", None, "Of both; serving_default, or the one that both have, where not given.")
flags.DEFINE_string("eval_data", None, "Labelled inputs, in the same forms; labels under --label.")
flags.DEFINE_string("label", "label", "Array or feature of --eval_data that holds the labels.")
flags.DEFINE_string("metric", "accuracy", "accuracy, top5, auc, f1, logloss, mse, rmse or mae.")
flags.DEFINE_string("eval_output", None, "Output of A that --metric scores, where the signature has several.")
flags.DEFINE_integer("seed", 0, "Of random inputs.")
flags.DEFINE_bool("measure_latency", True, "Measure latency and memory, each artifact in a process of its own.")
flags.DEFINE_integer("threads", 2, "Threads of the runtimes.", lower_bound=1)
flags.DEFINE_string(
    "beam_args",
    None,
    'Read --data and --eval_data on Apache Beam, with these options of it in one string, or "" for its defaults; see '
    "tfopt-evaluate.",
)
flags.DEFINE_float("max_error", None, "Largest error, over the scale of the output, that is accepted.", lower_bound=0)
flags.DEFINE_float("min_agreement", None, "Smallest top-1 agreement that is accepted, from 0 to 1.")
flags.DEFINE_bool("allow_unsafe_deserialization", False, "Run code that a Keras file carries (Lambda layers).")


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    from tfopt.errors import TfoptError

    if len(argv) != 3:
        raise TfoptError(
            f"give two artifacts: SavedModel directories, .tflite or Keras files; received {len(argv) - 1}"
        )
    from tfopt.comparison import compare
    from tfopt.comparison_text import draw

    found = compare(
        argv[1],
        argv[2],
        data=FLAGS.data,
        signature=FLAGS.signature,
        eval_data=FLAGS.eval_data,
        metric=FLAGS.metric,
        label=FLAGS.label,
        eval_output=FLAGS.eval_output,
        seed=FLAGS.seed,
        latency=FLAGS.measure_latency,
        threads=FLAGS.threads,
        beam_args=FLAGS.beam_args,
        allow_unsafe_deserialization=FLAGS.allow_unsafe_deserialization,
    )
    if FLAGS.min_agreement is not None and found.agreement is None:
        raise TfoptError("--min_agreement: no output holds class scores, (rows, 2 classes or more)")
    print(found.to_json() if FLAGS.format == "json" else draw(found), end="")
    failed = []
    if FLAGS.max_error is not None and not found.max_error <= FLAGS.max_error:
        failed.append(f"the error is {found.max_error:.3g}, more than --max_error={FLAGS.max_error:g}")
    if FLAGS.min_agreement is not None and found.agreement < FLAGS.min_agreement:
        failed.append(f"top-1 agreement is {found.agreement:.4f}, less than --min_agreement={FLAGS.min_agreement:g}")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def run() -> None:
    """The console command."""
    isolate.run(main)


if __name__ == "__main__":
    run()
