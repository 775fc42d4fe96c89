"""Chooses the batching parameters of a model for TensorFlow Serving, or says to leave batching off.

Examples:
  tfopt-tune-batching --model=serving --slo_ms=200 --data=eval.npz --output_dir=tuned
  tfopt-tune-batching --model=serving --rate=50 --server=localhost:8500 --model_name=digits

Exit codes: 0; 2 bad usage or input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from tfopt import isolate

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "SavedModel directory, or the directory of its versions.")
flags.DEFINE_string("signature_name", "serving_default", "Signature that is asked.")
flags.DEFINE_string(
    "data",
    None,
    "Rows: .npz keyed by input name, TFRecord glob of tf.Example, or python:module:function that returns a "
    "tf.data.Dataset. Random ones where not given.",
)
flags.DEFINE_integer("rows_per_request", 1, "Rows of one request.", lower_bound=1)
flags.DEFINE_float("rate", None, "Requests per second to expect; without it, as many as --slo_ms allows.")
flags.DEFINE_float("slo_ms", None, "Bound of the p99 latency.")
flags.DEFINE_integer("max_batch_size", 128, "No batch of more rows is tried.", lower_bound=2)
flags.DEFINE_bool(
    "check", True, "Check the choice by load tests, beside no batching and TensorFlow Serving's defaults."
)
flags.DEFINE_float("check_s", 4.0, "Measured seconds of each load test of the check.", lower_bound=0.1)
flags.DEFINE_string(
    "server",
    None,
    "host:port (gRPC) of a server of yours, which you are asked to restart with each setting. Not given: tfopt-serve "
    "on this machine.",
)
flags.DEFINE_integer("seed", 0, "Of random rows and arrivals.")
flags.DEFINE_string("output_dir", None, "Where batching_params.pbtxt (unless it is off) and tuning.json go.")
flags.DEFINE_bool("overwrite", False, "Replace what an earlier run wrote there.")
flags.DEFINE_bool(
    "in_graph",
    False,
    "Write a model that batches whole requests in its graph (tf.nondifferentiable_batch_function), for inputs that do "
    "not share dimension 0 and have known shapes (docs/batching.md).",
)
flags.mark_flag_as_required("model")


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    from tfopt.errors import TfoptError

    if len(argv) > 1:
        raise TfoptError(f"unexpected argument {argv[1]!r}: everything is a flag, see --help")
    for name in ("rate", "slo_ms"):
        value = getattr(FLAGS, name)
        if value is not None and not 0 < value < float("inf"):
            raise TfoptError(f"--{name}={value:g}: wants more than 0")
    if FLAGS.in_graph and (FLAGS.output_dir is None or FLAGS.server):
        raise TfoptError("--in_graph: writes a model: give --output_dir, and no --server")
    from tfopt.publish import Workspace
    from tfopt.serving.batching_parameters import FILE
    from tfopt.serving.loadtest.result import to_json
    from tfopt.serving.tuning import in_graph, text, tune
    from tfopt.serving.tuning.check import by_hand
    from tfopt.serving.tuning.choice import Workload

    workload = Workload(FLAGS.rate, FLAGS.slo_ms, FLAGS.rows_per_request)
    options = {
        "signature": FLAGS.signature_name,
        "source": FLAGS.data,
        "largest": FLAGS.max_batch_size,
        "check": FLAGS.check,
        "check_s": FLAGS.check_s,
        "seed": FLAGS.seed,
        "progress": True,
    }
    if FLAGS.output_dir is None:
        serve = by_hand(FLAGS.server, Path.cwd()) if FLAGS.server else None
        print(text.draw(tune.tune(FLAGS.model, workload, serve=serve, **options)), end="")
        return 0
    model = "serving/1"
    with Workspace(Path(FLAGS.output_dir), [FILE, model, "tuning.json"], overwrite=FLAGS.overwrite) as workspace:
        if FLAGS.in_graph:
            found = in_graph.tune(Path(FLAGS.model), workload, workspace.path(model), **options)
        else:
            serve = by_hand(FLAGS.server, workspace.scratch) if FLAGS.server else None
            found = tune.tune(FLAGS.model, workload, serve=serve, **options)
            if found.parameters is not None:
                workspace.write(FILE, found.parameters.text())
        print(text.draw(found), end="")
        workspace.write("tuning.json", to_json(found.to_dict()))
        workspace.publish()
    return 0


def run() -> None:
    """The console command."""
    isolate.run(main)


if __name__ == "__main__":
    run()
