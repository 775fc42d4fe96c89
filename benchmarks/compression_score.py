"""Accuracy, bytes, FLOPs and parameters of one .tflite file, in a process of its own."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

import numpy as np

from benchmarks.compression_subjects import subject
from benchmarks.quantization_cases import default_signature, predict, score

LEVEL = 9  # of gzip


def file_score(path: str, name: str) -> dict:
    """Returns what one file is like; LiteRT runs it row by row on the test rows."""
    from tfopt import runtime
    from tfopt.cost import cost

    found = subject(name)
    stored = np.load(found.test)
    with runtime.open(path, 1) as program:
        signature = default_signature(program)
        top = predict(program, stored[found.key], found.key, batch=1).argmax(1)
    content, counted = Path(path).read_bytes(), cost(path, signature)
    return {
        "path": path,
        "accuracy": score(top, stored["label"]),
        "samples": len(top),
        "bytes": len(content),
        "gzip": len(gzip.compress(content, LEVEL)),
        "flops": counted.flops,
        "parameters": counted.parameters,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", required=True)
    parser.add_argument("--subject", required=True)
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    Path(arguments.json).write_text(json.dumps(file_score(arguments.path, arguments.subject)))


if __name__ == "__main__":
    main()
