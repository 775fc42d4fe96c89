"""Shows where a model that a TFX pipeline pushed comes from: back to the examples, as a tree.

Example:
  tfopt-lineage --metadata=/tmp/taxi/metadata.db --pushed=/tmp/taxi/serving

Without --pushed and --artifact_id it shows the last outcome of each pusher, pushed or not.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from absl import flags

from tfopt import isolate
from tfopt.errors import TfoptError

FLAGS = flags.FLAGS

flags.DEFINE_string("metadata", None, "SQLite file of ML Metadata; it is only read.", required=True)
flags.DEFINE_string("pushed", None, "Directory that models were pushed to, or one version in it.")
flags.DEFINE_integer("artifact_id", None, "Any artifact of ML Metadata.")
flags.DEFINE_enum("format", "text", ["text", "json"], "For people, or for programs.")


def main(argv: Sequence[str]) -> int:
    """Turns flags into one library call."""
    if argv[1:]:
        raise TfoptError(f"tfopt-lineage takes flags only; received {' '.join(argv[1:])}")
    if FLAGS.pushed is not None and FLAGS.artifact_id is not None:
        raise TfoptError("--pushed and --artifact_id: give one of them")
    if importlib.util.find_spec("ml_metadata") is None:
        raise TfoptError("tfopt-lineage needs ML Metadata: pip install 'tfopt[tfx]'")
    from tfopt.tfx import lineage

    found = lineage.trace(FLAGS.metadata, FLAGS.artifact_id, FLAGS.pushed)
    print(found.to_json() if FLAGS.format == "json" else lineage.draw(found), end="")
    return 0


def run() -> None:
    """The console command."""
    isolate.run(main)


if __name__ == "__main__":
    run()
