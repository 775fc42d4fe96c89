"""Evaluation and batch inference on Beam: wall time of one process and of 1 and 2 worker processes, and equal results.

    python -m benchmarks.beam
    python -m benchmarks.beam --rows=20000 --what=evaluate

The rows are taxi trips (or digits, where ../shared is not there) drawn with replacement from real ones, with noise on
their numbers, in 16 gzipped TFRecords. Every runtime has one thread. Start-up, of workers that import TensorFlow and
open the model, is told apart by a run on the first file alone: the speed beyond it is that of the other 15 ("-" where
they took no tenth longer). CPU seconds, of all processes, are what a busy machine does not change much.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import samples
from benchmarks.models import REPOSITORY, SEED, all_models

FILES = 16
NAME = "tfx-chicago-taxi"
WAYS = {
    "one process": None,
    "1 worker process": "--direct_running_mode=multi_processing --direct_num_workers=1",
    "2 worker processes": "--direct_running_mode=multi_processing --direct_num_workers=2",
}


def write_trips(folder: Path, rows: int) -> None:
    """Writes taxi trips: miles, seconds and fare of real ones times a number from 0.8 to 1.25; label: a good tip."""
    import tensorflow as tf

    rng = np.random.default_rng(SEED)
    real = [tf.train.Example.FromString(record) for record in samples.taxi_records("Split-train")]
    picked = rng.integers(len(real), size=rows)
    factors = np.exp(rng.uniform(-0.22, 0.22, (rows, 3)))
    for file, numbers in enumerate(np.array_split(np.arange(rows), FILES)):
        with tf.io.TFRecordWriter(str(folder / f"rows-{file:05}.gz"), "GZIP") as writer:
            for row in numbers:
                example = tf.train.Example()
                example.CopyFrom(real[picked[row]])
                features = example.features.feature
                for name, factor in zip(("trip_miles", "trip_seconds", "fare"), factors[row], strict=True):
                    for values in (features[name].float_list.value, features[name].int64_list.value):
                        for i, value in enumerate(values):
                            values[i] = type(value)(value * factor)
                tips, fare = (sum(features[name].float_list.value) for name in ("tips", "fare"))
                features["label"].int64_list.value.append(int(tips > 0.2 * fare))
                writer.write(example.SerializeToString())


def write_digits(folder: Path, rows: int) -> None:
    """Writes random images as tf.Examples, with random labels."""
    import tensorflow as tf

    rng = np.random.default_rng(SEED)
    for file, numbers in enumerate(np.array_split(np.arange(rows), FILES)):
        with tf.io.TFRecordWriter(str(folder / f"rows-{file:05}.gz"), "GZIP") as writer:
            for _ in numbers:
                features = tf.train.Features()
                features.feature["image"].float_list.value.extend(rng.random(64))
                features.feature["label"].int64_list.value.append(int(rng.integers(10)))
                writer.write(tf.train.Example(features=features).SerializeToString())


def evaluated(model: str, source: str, metrics: list[str], beam_args: str | None, batch: int) -> Any:
    """Evaluates; returns what must be equal: every metric and its counts."""
    from tfopt.evaluation import evaluate

    found = evaluate([model], source, metrics=metrics, beam_args=beam_args, threads=1, batch_size=batch)
    (result,) = json.loads(found.to_json())["artifacts"]
    return {"metrics": result["metrics"], "counts": result["counts"]}


def inferred(model: str, source: str, folder: Path, beam_args: str | None, batch: int) -> Any:
    """Infers to 4 files; returns a digest of their bytes."""
    from tfopt.inference import infer

    done = infer(
        model, source, f"{folder}/", beam_args=beam_args, threads=1, batch_size=batch, shards=4, overwrite=True
    )
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in done.files)).hexdigest()


def timed(call: Callable[[], Any]) -> tuple[float, float, Any]:
    """Returns wall seconds, CPU seconds of this process and of those that ended under it, and the result."""
    started, cpu = time.monotonic(), cpu_seconds()
    result = call()
    return time.monotonic() - started, cpu_seconds() - cpu, result


def cpu_seconds() -> float:
    """Returns what this process and its ended children used so far."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--what", default="evaluate,infer")
    arguments = parser.parse_args()
    taxi = samples.DATA.is_dir()
    model = all_models([NAME])[NAME] if taxi else str(REPOSITORY / "saved_models" / "digits")
    metrics = ["auc", "accuracy"] if taxi else ["accuracy"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "rows"
        folder.mkdir()
        (write_trips if taxi else write_digits)(folder, arguments.rows)
        everything, first = str(folder / "rows-*.gz"), str(folder / "rows-00000.gz")
        print(f"{arguments.rows} rows of {NAME if taxi else 'digits'}, batches of {arguments.batch_size}, seconds:\n")
        print("| what | where | first file | all files | CPU | rows/s | rows/s beyond start-up | over one process |")
        print("|---|---|---|---|---|---|---|---|")
        differ = False
        for what in arguments.what.split(","):
            one_speed, expected = 0.0, None
            for where, beam_args in WAYS.items():

                def run(source: str, what: str = what, beam_args: str | None = beam_args) -> Any:
                    if what == "evaluate":
                        return evaluated(model, source, metrics, beam_args, arguments.batch_size)
                    return inferred(model, source, Path(scratch) / "out", beam_args, arguments.batch_size)

                (short, *_), (long, cpu, result) = timed(lambda: run(first)), timed(lambda: run(everything))
                speed = arguments.rows * (FILES - 1) / FILES / (long - short) if long > 1.1 * short else 0.0
                one_speed, expected = one_speed or speed, expected or result
                same = "" if result == expected else ", RESULTS DIFFER"
                differ |= result != expected
                cells = [what, where, f"{short:.1f}", f"{long:.1f}", f"{cpu:.1f}", f"{arguments.rows / long:.0f}"]
                cells += [f"{speed:.0f}", f"{speed / one_speed:.2f}{same}"] if speed else ["-", f"-{same}"]
                print(f"| {' | '.join(cells)} |", flush=True)
            print(f"\n{what}: {expected}\n" if what == "evaluate" else "")
        print("results differ" if differ else "the results of all ways are equal, to the last bit")
        sys.exit(1 if differ else 0)


if __name__ == "__main__":
    main()
