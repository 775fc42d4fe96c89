"""Shows what is in a model, what tfopt would gain on it, and what to beware of. The model is never executed.

Example:
  tfopt-inspect saved_models/digits
  tfopt-inspect model.keras --format=json

Exit codes: 0, or 2 where the model cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from tfopt import isolate

FLAGS = flags.FLAGS

flags.DEFINE_enum("format", "text", ["text", "json"], "For people, or for programs.")
flags.DEFINE_list("signatures", None, "Signatures to look at; all where not given.")
flags.DEFINE_integer("top", 10, "How many ops, weights and variables the text lists.", lower_bound=1)
flags.DEFINE_list("inputs", None, "Input tensors of a frozen GraphDef.")
flags.DEFINE_list("outputs", None, "Output tensors of a frozen GraphDef.")


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    from tfopt.errors import TfoptError

    if len(argv) != 2:
        raise TfoptError(f"give one model: a SavedModel directory, .keras, .h5 or .pb; received {len(argv) - 1}")
    from tfopt.inspection import inspect
    from tfopt.inspection_text import draw

    found = inspect(argv[1], FLAGS.signatures, inputs=FLAGS.inputs, outputs=FLAGS.outputs)
    print(found.to_json() if FLAGS.format == "json" else draw(found, FLAGS.top), end="")
    return 0


def run() -> None:
    """The console command."""
    isolate.run(main)


if __name__ == "__main__":
    run()
