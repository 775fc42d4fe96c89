"""Serves SavedModels as TensorFlow Serving does, for trying and for tests; production is tensorflow_model_server.

Example:
  tfopt-serve --port=8500 --rest_api_port=8501 --model_name=digits --model_base_path=/models/digits

The flags are those of tensorflow_model_server, and mean the same.

Exit codes: 0 where it was told to stop, 2 bad usage, or a model that cannot be loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import app, flags

FLAGS = flags.FLAGS

flags.DEFINE_integer("port", 8500, "Of gRPC; 0 for a free one, which is printed.")
flags.DEFINE_integer("rest_api_port", None, "Of REST; not listened at where not given, 0 for a free one.")
flags.DEFINE_string(
    "address", "127.0.0.1", "To listen at; 0.0.0.0 for all. (tensorflow_model_server has no such flag.)"
)
flags.DEFINE_string("model_name", "default", "Of the model; ignored with --model_config_file.")
flags.DEFINE_string("model_base_path", None, "Folder of version folders; ignored with --model_config_file.")
flags.DEFINE_float("file_system_poll_wait_seconds", 1, "How often to look for new versions.")
flags.DEFINE_integer("tensorflow_session_parallelism", 0, "Threads of both pools below; 0 for as many as cores.")
flags.DEFINE_integer("tensorflow_intra_op_parallelism", 0, "Threads inside an operation.")
flags.DEFINE_integer("tensorflow_inter_op_parallelism", 0, "Threads for operations that can run side by side.")


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    from tfopt.errors import TfoptError

    if len(argv) != 1:
        raise TfoptError(f"{argv[1]!r}: takes flags only")
    if not FLAGS.model_base_path:
        raise TfoptError("--model_base_path: give the folder that holds the version folders")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from tfopt.serving.server.run import Options, serve
    from tfopt.serving.server.servable import LoadOptions

    serve(
        Options(
            model_name=FLAGS.model_name,
            model_base_path=FLAGS.model_base_path,
            address=FLAGS.address,
            port=FLAGS.port,
            rest_port=FLAGS.rest_api_port,
            poll_s=FLAGS.file_system_poll_wait_seconds,
            load=LoadOptions(
                intra_op=FLAGS.tensorflow_intra_op_parallelism or FLAGS.tensorflow_session_parallelism,
                inter_op=FLAGS.tensorflow_inter_op_parallelism or FLAGS.tensorflow_session_parallelism,
            ),
        )
    )
    return 0


def _guarded(argv: Sequence[str]) -> None:
    from tfopt.errors import TfoptError, printable

    try:
        code = main(argv)
    except TfoptError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        code = 2
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # tearing TensorFlow down takes longer than it is worth


def run() -> None:
    """The console command. One process: the server's id, signals and CPU time are those of the command."""

    def parse(argv: Sequence[str]) -> list[str]:
        try:
            return FLAGS(list(argv))
        except flags.Error as error:
            print(f"error: {' '.join(str(error).split())}; see --help", file=sys.stderr)
            sys.exit(2)

    app.run(_guarded, flags_parser=parse)


if __name__ == "__main__":
    run()
