"""How long `import tfopt` and the --help of every command take: medians of interleaved runs.

python -m benchmarks.start
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

FLAGS = flags.FLAGS

flags.DEFINE_integer("repeats", 7, "Runs of each, in turns.", lower_bound=1)

_HEAVY = "sorted({'tensorflow', 'keras', 'apache_beam', 'tfx', 'grpc', 'numpy'} & set(sys.modules))"


def main(argv: Sequence[str]) -> None:
    """Prints a table."""
    del argv
    commands = {"import tfopt": [sys.executable, "-c", "import tfopt"]}
    for script in sorted(Path(sys.executable).parent.glob("tfopt-*")):
        commands[f"{script.name} --help"] = [str(script), "--help"]
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(FLAGS.repeats):
        for name, command in commands.items():
            begun = time.perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # absl ends --help with exit code 1
            taken[name].append(time.perf_counter() - begun)
    print(f"| start of a process, median of {FLAGS.repeats} | s |\n|---|---|")
    for name, seconds in taken.items():
        print(f"| `{name}` | {statistics.median(seconds):.2f} |")
    loaded = f"import sys, tfopt; print(*{_HEAVY})"
    print("\nimport tfopt loads of heavy packages:", subprocess.check_output([sys.executable, "-c", loaded], text=True))


if __name__ == "__main__":
    app.run(main)
