"""Load tests a server that speaks TensorFlow Serving's gRPC or REST: tensorflow_model_server, or tfopt-serve.

Examples:
  tfopt-loadtest --server=localhost:8500 --model_name=digits --data=eval.npz --rate=200 --slo_ms=20
  tfopt-loadtest --server=localhost:8501 --protocol=rest --model_name=digits --loop=closed --concurrency=4
  tfopt-loadtest --server=localhost:8500 --model_name=digits --data=eval.npz --sweep --output_html=sweep.html

Exit codes: 0; 1 requests failed, or --slo_ms was missed (with --sweep: no rate was held); 2 bad usage or input.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from tfopt import isolate

FLAGS = flags.FLAGS

flags.DEFINE_string("server", None, "host:port of the server.")
flags.DEFINE_enum("protocol", "grpc", ["grpc", "rest"], "What --server speaks.")
flags.DEFINE_string("model_name", "default", "As the server knows it.")
flags.DEFINE_string("signature_name", "serving_default", "Signature to ask.")
flags.DEFINE_integer("model_version", None, "Version to ask; the latest where not given.")
flags.DEFINE_string(
    "data",
    None,
    "Rows: .npz keyed by input name, TFRecord glob of tf.Example, or python:module:function that returns a "
    "tf.data.Dataset; or a TFRecord file of PredictionLogs (warmup requests) or PredictRequests. Random ones where not "
    "given.",
)
flags.DEFINE_integer("rows_per_request", 1, "Rows of a request that is made of rows.", lower_bound=1)
flags.DEFINE_integer("requests", None, "Send no more than this many.")
flags.DEFINE_enum("loop", "open", ["open", "closed"], "open: requests are sent when due; closed: after an answer.")
flags.DEFINE_float("rate", 100.0, "Requests per second of the open loop.")
flags.DEFINE_enum("arrivals", "poisson", ["poisson", "constant"], "Of the open loop.")
flags.DEFINE_integer("concurrency", 1, "Clients of the closed loop.")
flags.DEFINE_float("duration_s", 10.0, "Measured seconds; of each step of a sweep.")
flags.DEFINE_float("warmup_s", 2.0, "Seconds before, that are sent and not measured.")
flags.DEFINE_float("timeout_s", 30.0, "Deadline of a request.")
flags.DEFINE_integer("max_outstanding", 10_000, "Requests that may wait for answers; more are counted as NOT_SENT.")
flags.DEFINE_integer("seed", 0, "Of arrivals and random rows.")
flags.DEFINE_float("slo_ms", None, "Latency that --slo_percentile must not exceed.")
flags.DEFINE_float("slo_percentile", 99.0, "See --slo_ms.")
flags.DEFINE_bool("sweep", False, "Look for the highest rate that is held, starting at --rate.")
flags.DEFINE_float("sweep_factor", 2.0, "From one rate to the next, until one is not held.", lower_bound=1.01)
flags.DEFINE_float("sweep_resolution", 0.1, "How close the rates around the knee are in the end.", lower_bound=0.001)
flags.DEFINE_bool("check", False, "Parse each answer: all outputs there, none NaN or infinite.")
flags.DEFINE_string("metrics", None, "host:port/path of the server's Prometheus metrics, read before and after.")
flags.DEFINE_integer("server_pid", None, "Process of a server on this machine, for its CPU time.")
flags.DEFINE_bool(
    "self_test", False, "Measure what this generator can offer by itself, against a server that does nothing."
)
flags.DEFINE_string("output_json", None, "Where to write all figures.")
flags.DEFINE_string("output_html", None, "Where to write a page with the curves.")
flags.DEFINE_bool("overwrite", False, "Replace these files.")


def main(argv: Sequence[str]) -> int:
    """Turns flags into library calls."""
    from tfopt.errors import TfoptError

    if len(argv) > 1:
        raise TfoptError(f"unexpected argument {argv[1]!r}: everything is a flag, see --help")
    if FLAGS.server is None and not FLAGS.self_test:
        raise TfoptError("--server: wants the host:port of a server, such as localhost:8500")
    outputs = {name: getattr(FLAGS, name) for name in ("output_json", "output_html") if getattr(FLAGS, name)}
    for name, path in outputs.items():
        if Path(path).exists() and not FLAGS.overwrite:
            raise TfoptError(f"--{name}={path}: exists already; pass --overwrite to replace it")
        if not Path(path).resolve().parent.is_dir():
            raise TfoptError(f"--{name}={path}: there is no such directory")

    from tfopt.serving.loadtest import self_test

    if FLAGS.server is None:
        print(self_test.measure().text)
        return 0
    from tfopt.serving.loadtest import plan as plans
    from tfopt.serving.loadtest import requests, run, signature, sweep, text

    target = plans.Target(
        FLAGS.server, FLAGS.protocol, FLAGS.model_name, FLAGS.signature_name, FLAGS.model_version, FLAGS.timeout_s
    )
    plan = plans.Plan(
        mode=FLAGS.loop,
        rate=FLAGS.rate,
        arrivals=FLAGS.arrivals,
        concurrency=FLAGS.concurrency,
        warmup_s=FLAGS.warmup_s,
        duration_s=FLAGS.duration_s,
        requests=FLAGS.requests,
        max_outstanding=FLAGS.max_outstanding,
        seed=FLAGS.seed,
        slo_ms=FLAGS.slo_ms,
        slo_percentile=FLAGS.slo_percentile,
    )
    if FLAGS.sweep and FLAGS.loop == "closed":
        raise TfoptError("--sweep: looks for a rate, which a closed loop does not have; drop --loop=closed")
    ready = FLAGS.data is not None and requests.holds_requests(FLAGS.data)
    asked = None if ready and not FLAGS.check else signature.read(target)
    bodies, warnings = requests.load(target, asked, FLAGS.data, FLAGS.rows_per_request, FLAGS.seed)
    measure = functools.partial(
        run.run,
        target,
        bodies,
        check=requests.checker(asked, target) if FLAGS.check and asked else None,
        metrics=FLAGS.metrics,
        server_pid=FLAGS.server_pid,
        progress=True,
    )
    limit = None
    if FLAGS.self_test:
        limit = self_test.measure(max((request.body for request in bodies), key=len))
    found: sweep.Sweep | run.Result
    if FLAGS.sweep:
        found = sweep.sweep(
            measure, plan, start=FLAGS.rate, factor=FLAGS.sweep_factor, resolution=FLAGS.sweep_resolution
        )
        print(text.draw_sweep(found), end="")
        code = 0 if found.knee else 1
    else:
        found = measure(plan)
        print(text.draw(found), end="")
        code = 1 if found.failed or found.missed_slo else 0
    for warning in warnings:
        print(f"WARNING: {warning}")
    if limit is not None:
        print(limit.text)
    if "output_json" in outputs:
        from tfopt.serving.loadtest.result import to_json

        Path(outputs["output_json"]).write_text(to_json(found.to_dict()), encoding="utf-8")
    if "output_html" in outputs:
        from tfopt.serving.loadtest import page

        Path(outputs["output_html"]).write_text(page.draw(found, limit, warnings), encoding="utf-8")
    return code


def run() -> None:
    """The console command."""
    isolate.run(main)


if __name__ == "__main__":
    run()
