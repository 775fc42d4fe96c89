"""Batch inference: runs an artifact on every row of the data, and writes a record for each.

Example:
  tfopt-infer --model=serving --data='examples/*.gz' --output=predictions/ --keep=trip_id
  tfopt-infer --model=device/int8.tflite --data='log-*' --output=out/day1 --format=prediction_log \
      --beam_args='--direct_running_mode=multi_processing --direct_num_workers=4'

All files, or none: a run that fails or is killed leaves nothing at the output. Exit codes: 0; 2 bad usage or input.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from tfopt import isolate

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "SavedModel directory or .tflite file.", required=True)
flags.DEFINE_string(
    "data",
    None,
    "Rows: TFRecord glob of tf.Example or of requests that TensorFlow Serving logged, .npz keyed by input name, or "
    "python:module:function that returns a tf.data.Dataset.",
    required=True,
)
flags.DEFINE_string(
    "output",
    None,
    "Directory (it is there, or ends in /), for predictions-00000-of-00001.tfrecord.gz and so on; or what to put "
    "before -00000-of-00001.tfrecord.gz.",
    required=True,
)
flags.DEFINE_string("signature", None, "serving_default, or the only one, where not given.")
flags.DEFINE_list("outputs", [], "Outputs of the signature to write; all where not given.")
flags.DEFINE_list("keep", [], "Features of the input tf.Examples to copy beside the outputs, such as a key.")
flags.DEFINE_enum(
    "format",
    "example",
    ["example", "prediction_log"],
    "tf.Example of the outputs, or tensorflow.serving.PredictionLog of request and answer.",
)
flags.DEFINE_string(
    "beam_args",
    None,
    "Run on Beam, with these options of its runner: '--direct_running_mode=multi_processing --direct_num_workers=4', "
    "or --runner=... with what it needs. In this process where not given.",
)
flags.DEFINE_integer("batch_size", None, "Rows of a call; the signature's own, or 32, where not given.", lower_bound=1)
flags.DEFINE_integer("shards", None, "Files to write; 1, or 8 on Beam, where not given.", lower_bound=1)
flags.DEFINE_integer("limit", None, "Run no more than the first so many rows.", lower_bound=1)
flags.DEFINE_integer("threads", 2, "Threads of the runtime, in each process.", lower_bound=1)
flags.DEFINE_bool("overwrite", False, "Replace the files of an earlier run.")


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    from tfopt.errors import TfoptError

    if len(argv) > 1:
        raise TfoptError(f"takes flags only; received {argv[1]!r}")
    from absl import logging

    from tfopt.inference import infer

    done = infer(
        FLAGS.model,
        FLAGS.data,
        FLAGS.output,
        signature=FLAGS.signature,
        outputs=FLAGS.outputs,
        keep=FLAGS.keep,
        format=FLAGS.format,
        beam_args=FLAGS.beam_args,
        batch_size=FLAGS.batch_size,
        shards=FLAGS.shards,
        overwrite=FLAGS.overwrite,
        threads=FLAGS.threads,
        limit=FLAGS.limit,
    )
    for warning in done.warnings:
        logging.warning("%s", warning)
    print(f"{done.rows} rows in {done.seconds:.1f} s, {done.rows / done.seconds:.0f} rows/s")
    print("\n".join(done.files))
    return 0


def clean_up() -> None:
    """Removes what a killed run left."""
    from tfopt.prediction_records import remove_stale

    if FLAGS.output:
        remove_stale(FLAGS.output)


def run() -> None:
    """The console command."""
    isolate.run(main, clean_up)


if __name__ == "__main__":
    run()
