"""Writes what TensorFlow Serving needs beside a model: batching, warmup, Docker Compose, Kubernetes, the server's line.

Example:
  tfopt-deployment --model_base_path=/models/digits --model_name=digits --data=representative.npz

Exit codes: 0; 2 bad usage or input, nothing was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from tfopt import isolate
from tfopt.publish import remove_stale

FLAGS = flags.FLAGS

flags.DEFINE_string("model_base_path", None, "Directory that holds version directories: 1, 2, ...")
flags.DEFINE_string("model_name", None, "What clients call the model.")
flags.DEFINE_integer("version", None, "Version directory to prepare; the latest where not given.", lower_bound=0)
flags.DEFINE_bool("overwrite", False, "Replace files of an earlier run.")
flags.DEFINE_bool("enable_batching", True, "Write batching parameters, where requests to the model can be batched.")
flags.DEFINE_string(
    "batching_parameters_file", None, "Parameters to use, as tfopt-tune-batching writes; start values where not given."
)
flags.DEFINE_bool(
    "enable_per_model_batching_parameters", False, "Put batching_params.pbtxt into the version directory too."
)
flags.DEFINE_bool("warmup", True, "Write warmup requests.")
flags.DEFINE_list("warmup_batch_sizes", None, "Their batch sizes; the allowed ones where not given.")
flags.DEFINE_string(
    "data",
    None,
    "Real rows for them: .npz keyed by input name, TFRecord glob of tf.Example, or python:module:function that returns "
    "a tf.data.Dataset; drawn at random where not given.",
)
flags.DEFINE_bool("session_config", True, "Measure session overrides, and write saved_model_config.pb where they gain.")
flags.DEFINE_integer("memory_bytes", None, "Peak memory of the server; measured where not given.", lower_bound=1)
flags.DEFINE_integer("cpus", 2, "CPUs of a container, and threads of the server.", lower_bound=1)
flags.DEFINE_string("image", None, "Image of the model server; tensorflow/serving:latest where not given.")
flags.DEFINE_integer("min_replicas", 2, "Of the autoscaler.", lower_bound=1)
flags.DEFINE_integer("max_replicas", 10, "Of the autoscaler.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Of drawn rows.")
flags.mark_flags_as_required(["model_base_path", "model_name"])


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    from tfopt.errors import TfoptError

    if len(argv) > 1:
        raise TfoptError(f"unexpected argument {argv[1]!r}: everything is a flag, see --help")
    sizes = [size.strip() for size in FLAGS.warmup_batch_sizes or ()]
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise TfoptError(f"--warmup_batch_sizes={','.join(sizes)}: wants numbers of at least 1, as in 1,8,32")
    from tfopt.serving import batching_parameters, deployment, deployment_text

    given = FLAGS.batching_parameters_file
    options = deployment.Options(
        batching=batching_parameters.read(given) if given else None,
        enable_batching=FLAGS.enable_batching,
        per_model_batching=FLAGS.enable_per_model_batching_parameters,
        warmup=FLAGS.warmup,
        warmup_sizes=tuple(map(int, sizes)),
        data=FLAGS.data,
        session_config=FLAGS.session_config,
        peak_memory_bytes=FLAGS.memory_bytes,
        cpus=FLAGS.cpus,
        image=FLAGS.image or deployment_text.IMAGE,
        min_replicas=FLAGS.min_replicas,
        max_replicas=FLAGS.max_replicas,
        seed=FLAGS.seed,
    )
    made = deployment.write(
        FLAGS.model_base_path, FLAGS.model_name, options, version=FLAGS.version, overwrite=FLAGS.overwrite
    )
    for path in made.paths:
        print(f"wrote {path}")
    print("\n" + "\n".join(made.notes) + f"\n\n{made.command}")
    return 0


def clean_up() -> None:
    """Removes what a run that crashed left behind."""
    remove_stale(Path(FLAGS.model_base_path))


def run() -> None:
    """The console command."""
    isolate.run(main, clean_up)


if __name__ == "__main__":
    run()
