"""Serves SavedModels as TensorFlow Serving does, for trying and for tests; production is tensorflow_model_server.

Example:
  tfopt-serve --port=8500 --rest_api_port=8501 --model_name=digits --model_base_path=/models/digits

The flags are those of tensorflow_model_server and mean the same, but for --address.

Exit codes: 0 where it was told to stop, 2 bad usage, or a model that cannot be loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import app, flags

FLAGS = flags.FLAGS

flags.DEFINE_integer("port", 8500, "Of gRPC; 0 for a free one, which is printed.")
flags.DEFINE_string("grpc_socket_path", None, "UNIX socket for gRPC, beside the port.")
flags.DEFINE_integer("rest_api_port", None, "Of REST; not listened at where not given, 0 for a free one.")
flags.DEFINE_integer("rest_api_timeout_in_ms", 30000, "After which a REST request is answered 504.", lower_bound=0)
flags.DEFINE_string(
    "address", "127.0.0.1", "To listen at; 0.0.0.0 for all. (tensorflow_model_server has no such flag.)"
)
flags.DEFINE_string("model_name", "default", "Of the model; ignored with --model_config_file.")
flags.DEFINE_string("model_base_path", None, "Folder of version folders; ignored with --model_config_file.")
flags.DEFINE_string("model_config_file", None, "ModelServerConfig in text form: several models, policies, labels.")
flags.DEFINE_float("model_config_file_poll_wait_seconds", 0, "How often to read that again; 0 for once.", lower_bound=0)
flags.DEFINE_bool("allow_version_labels_for_unavailable_models", False, "Labels may name versions not yet available.")
flags.DEFINE_float("file_system_poll_wait_seconds", 1, "How often to look for new versions; 0 for once.", lower_bound=0)
flags.DEFINE_bool("enable_batching", False, "Put rows of concurrent requests together.")
flags.DEFINE_string("batching_parameters_file", None, "BatchingParameters in text form; with --enable_batching.")
flags.DEFINE_bool(
    "enable_per_model_batching_parameters", False, "A version's batching_params.pbtxt stands above that file."
)
flags.DEFINE_bool("enable_model_warmup", True, "Replay assets.extra/tf_serving_warmup_requests before serving.")
flags.DEFINE_string("monitoring_config_file", None, "MonitoringConfig in text form: whether and where metrics are.")
flags.DEFINE_integer("num_load_threads", 0, "Versions loaded at once; 0: 2.", lower_bound=0)
flags.DEFINE_integer(
    "grpc_max_threads", 0, "Requests worked on at once; 0: 4 for each core, more with batching.", lower_bound=0
)
flags.DEFINE_enum(
    "grpc_server", "threads", ["threads", "aio"], "Which server of grpcio. (tensorflow_model_server has no such flag.)"
)
flags.DEFINE_integer("tensorflow_session_parallelism", 0, "Threads of both pools below.", lower_bound=0)
flags.DEFINE_integer(
    "tensorflow_intra_op_parallelism", 0, "Threads inside an operation; 0: as many as cores.", lower_bound=0
)
flags.DEFINE_integer(
    "tensorflow_inter_op_parallelism", 0, "Threads for operations side by side; 0: one by one.", lower_bound=0
)
flags.DEFINE_bool("enable_serialization_as_tensor_content", False, "Numbers of gRPC answers in tensor_content.")
flags.DEFINE_bool("version", False, "Print the version and end.")

_NOT_HERE = {
    "enable_grpc_healthcheck_service",
    "enable_profiler",
    "enable_signature_method_name_check",
    "flush_filesystem_caches",
    "grpc_channel_arguments",
    "load_retry_interval_micros",
    "max_num_load_retries",
    "mixed_precision",
    "num_tflite_interpreters_per_pool",
    "num_tflite_pools",
    "num_unload_threads",
    "per_process_gpu_memory_fraction",
    "platform_config_file",
    "prefer_tflite_model",
    "remove_unused_fields_from_bundle_metagraph",
    "rest_api_enable_cors_support",
    "rest_api_num_threads",
    "saved_model_tags",
    "skip_initialize_tpu",
    "ssl_config_file",
    "thread_pool_factory_config_file",
    "use_alts_credentials",
    "use_tflite_model",
    "xla_cpu_compilation_enabled",
    "xla_gpu_compilation_enabled",
}


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    from tfopt.errors import TfoptError

    if FLAGS.version:
        import importlib.metadata

        print(f"tfopt-serve {importlib.metadata.version('tfopt')}")
        return 0
    if len(argv) != 1:
        raise TfoptError(f"{argv[1]!r}: takes flags only")
    if not FLAGS.model_base_path and not FLAGS.model_config_file:
        raise TfoptError("--model_base_path: give the folder that holds the version folders, or --model_config_file")
    if FLAGS.batching_parameters_file and not FLAGS.enable_batching:
        raise TfoptError("--batching_parameters_file is set without --enable_batching")
    if FLAGS.rest_api_port and FLAGS.rest_api_port == FLAGS.port:
        raise TfoptError(f"--rest_api_port={FLAGS.rest_api_port}: --port is the same; give another")
    from tfopt.serving import batching_parameters

    batching = None
    if FLAGS.enable_batching:
        file = FLAGS.batching_parameters_file
        batching = batching_parameters.read(file) if file else batching_parameters.BatchingParameters()
    _silence_native_log()
    from tfopt.serving.server.run import Options, serve
    from tfopt.serving.server.servable import LoadOptions

    serve(
        Options(
            model_name=FLAGS.model_name,
            model_base_path=FLAGS.model_base_path or "",
            model_config_file=FLAGS.model_config_file,
            config_poll_s=FLAGS.model_config_file_poll_wait_seconds,
            any_label=FLAGS.allow_version_labels_for_unavailable_models,
            address=FLAGS.address,
            port=FLAGS.port,
            socket_path=FLAGS.grpc_socket_path,
            rest_port=FLAGS.rest_api_port,
            rest_timeout_s=FLAGS.rest_api_timeout_in_ms / 1000,
            monitoring_config_file=FLAGS.monitoring_config_file,
            poll_s=FLAGS.file_system_poll_wait_seconds,
            load_threads=FLAGS.num_load_threads,
            request_threads=FLAGS.grpc_max_threads,
            threaded=FLAGS.grpc_server == "threads",
            as_content=FLAGS.enable_serialization_as_tensor_content,
            load=LoadOptions(
                intra_op=FLAGS.tensorflow_intra_op_parallelism or FLAGS.tensorflow_session_parallelism,
                inter_op=FLAGS.tensorflow_inter_op_parallelism or FLAGS.tensorflow_session_parallelism,
                warmup=FLAGS.enable_model_warmup,
                batching=batching,
                batching_per_model=FLAGS.enable_per_model_batching_parameters,
            ),
        )
    )
    return 0


def _silence_native_log() -> None:
    """Imports TensorFlow with standard error closed to it: what it says there no log level holds back."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        import tensorflow as tf

        tf.config.get_visible_devices()
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _guarded(argv: Sequence[str]) -> None:
    from tfopt.errors import TfoptError, printable

    try:
        code = main(argv)
    except TfoptError as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # tearing TensorFlow down takes longer than it is worth


def _parse(argv: Sequence[str]) -> list[str]:
    try:
        return FLAGS(list(argv))
    except flags.UnrecognizedFlagError as error:
        known = error.flagname in _NOT_HERE
        hint = "a flag of tensorflow_model_server that this server does not have" if known else "unknown; see --help"
        print(f"error: --{error.flagname}: {hint}", file=sys.stderr)
    except flags.Error as error:
        print(f"error: {' '.join(str(error).split())}; see --help", file=sys.stderr)
    sys.exit(2)


def run() -> None:
    """The console command. One process: the server's id, signals and CPU time are those of the command."""
    app.run(_guarded, flags_parser=_parse)


if __name__ == "__main__":
    run()
