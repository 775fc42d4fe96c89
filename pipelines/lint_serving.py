"""Says whether a model will load, batch, warm up, run as TFLite or by XLA on stock TensorFlow Serving.

Example:
  tfopt-lint-serving --model=/models/digits --enable_batching --batching_parameters_file=batching_params.pbtxt

Flags but the first and the last four are those of tensorflow_model_server. Exit codes: 0 no errors; 1 errors were
found; 2 bad usage, or no model.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from tfopt import isolate

FLAGS = flags.FLAGS

flags.DEFINE_string("model", None, "Version directory, or the base path above it (its latest version is looked at).")
flags.DEFINE_bool("enable_batching", False, "Requests are batched.")
flags.DEFINE_string("batching_parameters_file", None, "BatchingParameters of all models.")
flags.DEFINE_bool("enable_per_model_batching_parameters", False, "Each version has its own batching_params.pbtxt.")
flags.DEFINE_bool("prefer_tflite_model", False, "model.tflite is served instead of saved_model.pb.")
flags.DEFINE_bool("xla_cpu_compilation_enabled", False, "jit_compile is allowed.")
flags.DEFINE_bool("enable_model_warmup", True, "Warmup requests are replayed at load.")
flags.DEFINE_bool("enable_signature_method_name_check", False, "Signatures must have a method of TensorFlow Serving's.")
flags.DEFINE_string("model_config_file", None, "ModelServerConfig.")
flags.DEFINE_integer("memory_bytes", None, "What the container may use.", lower_bound=1)
flags.DEFINE_string(
    "data",
    None,
    "Real rows to try the model with: .npz keyed by input name, TFRecord glob of tf.Example, or "
    "python:module:function that returns a tf.data.Dataset; drawn at random where not given.",
)
flags.DEFINE_bool("run", True, "Load and call the model, in a process of its own; without, less is seen.")
flags.DEFINE_string("output_json", None, "Write the findings there too.")
flags.mark_flags_as_required(["model"])


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    import dataclasses
    from pathlib import Path

    from tfopt.errors import TfoptError

    if len(argv) > 1:
        raise TfoptError(f"unexpected argument {argv[1]!r}: everything is a flag, see --help")
    output = Path(FLAGS.output_json) if FLAGS.output_json else None
    if output and not output.parent.is_dir():
        raise TfoptError(f"--output_json={output}: no such directory: {output.parent}")
    from tfopt.serving.lint import run as lint

    given = lint.Flags(**{field.name: getattr(FLAGS, field.name) for field in dataclasses.fields(lint.Flags)})
    found = lint.lint(FLAGS.model, given, run=FLAGS.run)
    print(found.text(), end="")
    if output:
        try:
            output.write_text(found.to_json(), encoding="utf-8")
        except OSError as error:
            raise TfoptError(f"--output_json={output}: cannot be written: {error.strerror}") from error
    return 1 if found.failed else 0


def run() -> None:
    """The console command."""
    isolate.run(main)


if __name__ == "__main__":
    run()
