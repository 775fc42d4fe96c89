"""Input layers and tables of embeddings, compressed: what is left of the bytes and of the accuracy.

    python -m benchmarks.embeddings             both tables; trains what is missing
    python -m benchmarks.embeddings --only=sms

`sms` is a spam filter (../shared/data/sms-spam: words hashed to 10,000 ids by the client, embeddings of 32, their mean,
two dense layers), 4,000 messages without labels to learn from, 1,074 others to score. `mnist` is LeNet-300-100 of
`benchmarks.mnist`, 10,000 pictures without labels to learn from, the test pictures to score. Means of `--seeds`.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import mnist
from benchmarks.models import CACHE, REPOSITORY, SEED
from tfopt.data import Dataset

SMS = REPOSITORY.parent / "shared" / "data" / "sms-spam" / "SMSSpamCollection"
_IDS, _WORDS, _TRAINED, _HELD = 10_000, 64, 4_000, 4_500
_PICTURES = 10_000

TABLES: list[dict[str, Any]] = [
    *({"method": method, "ratio": ratio} for ratio in (4.0, 16.0) for method in ("quotient_remainder", "hashing")),
    *({"method": method, "ratio": ratio} for ratio in (4.0, 16.0) for method in ("mixed_dimension", "vocabulary")),
    {"method": "vocabulary", "min_count": 2},
    {"method": "auto", "ratio": 4.0},
]
LAYERS: list[dict[str, Any]] = [
    *({"topology": "node", "rank": rank} for rank in (1, 2, 4)),
    *({"topology": "shared", "rank": rank} for rank in (4, 8)),
    {"rank": 0, "dead_inputs": True},
]


def messages() -> tuple[np.ndarray, np.ndarray]:
    """Ids (5574, 64) int32, 0 after the end, and labels (5574, 1), in a fixed random order."""
    lines = SMS.read_text(encoding="utf-8").splitlines()
    labels = np.array([[line.startswith("spam\t")] for line in lines], np.float32)
    ids = np.zeros((len(lines), _WORDS), np.int32)
    for row, line in zip(ids, lines, strict=True):
        words = ["<start>", *re.findall(r"[a-z0-9£$!']+", line.split("\t", 1)[1].lower())][:_WORDS]
        row[: len(words)] = [1 + zlib.crc32(word.encode()) % (_IDS - 1) for word in words]
    order = np.random.default_rng(SEED).permutation(len(lines))
    return ids[order], labels[order]


def _train(seed: int) -> None:
    import keras

    ids, labels = messages()
    keras.utils.set_random_seed(SEED + seed)
    layers = keras.layers
    stack = [
        layers.Input((_WORDS,), dtype="int32", name="ids"),
        layers.Embedding(_IDS, 32, mask_zero=True),
        layers.GlobalAveragePooling1D(),
        layers.Dense(16, activation="relu"),
        layers.Dense(1, activation="sigmoid"),
    ]
    net = keras.Sequential(stack)
    net.compile("adam", "binary_crossentropy")
    net.fit(ids[:_TRAINED], labels[:_TRAINED], epochs=15, batch_size=64, verbose=0)
    net.export(CACHE / f"sms_{seed}", verbose=False)


def _sms(seed: int) -> Path:
    path = CACHE / f"sms_{seed}"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.embeddings", f"--train={seed}"]
        subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, check=True)
    return path


def _runs(
    path: Path, technique: str, options: list[dict[str, Any]], rows: Dataset, test: Dataset
) -> Iterator[list[float]]:
    """Yields the original's accuracy, the one without training, the one with it, bytes of weights, multiplications."""
    from tfopt import model, passes, recipe
    from tfopt.cost import graph_cost
    from tfopt.function import Function
    from tfopt.optimize import run_pass
    from tfopt.rewrite import Log

    labels = np.ravel(np.asarray(test.labels))

    def facts(of: model.Model) -> list[float]:
        with Function(of) as function:
            (scores,) = function("serving_default", test.inputs).values()
        found = scores.argmax(axis=1) if scores.shape[1] > 1 else scores[:, 0] > 0.5
        macs = (graph_cost(of.graph.to_graph_def(), weights=of.weights).flops or 0) // 2
        return [float(np.mean(found == labels)), of.weight_bytes, macs]

    original = model.load(path, ["serving_default"])
    clean = original.copy()
    for name, settings in recipe.read("lossless").steps:
        clean, _ = run_pass(clean, name, settings, None)
    yield facts(clean)
    data = passes.Data("serving_default", original, rows=rows)
    for given in options:
        once, trained = clean.copy(), clean.copy()
        passes.get(technique).run(once, Log(), data, **given, epochs=0)
        passes.get(technique).run(trained, Log(), data, **given, epochs=3, min_steps=0)
        yield [facts(once)[0], *facts(trained)]


def _table(technique: str, options: list[dict[str, Any]], found: list[list[list[float]]]) -> None:
    (accuracy, size, macs), *rest = [np.mean(rows, axis=0) for rows in zip(*found, strict=True)]
    print(f"| {technique} | bytes of weights | multiplications a row | accuracy, one-shot | trained |")
    print("|---|---|---|---|---|")
    print(f"| (lossless alone) | {size:,.0f} | {macs:,.0f} | {accuracy:.2%} | |")
    for given, (once, trained, smaller, fewer) in zip(options, rest, strict=True):
        words = ", ".join(f"{name}={value}" for name, value in given.items())
        cells = f"{smaller:,.0f} ({size / smaller:.1f}x) | {fewer:,.0f} | {once:.2%} | {trained:.2%} |"
        print(f"| {words} | {cells}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", choices=["", "sms", "mnist"])
    parser.add_argument("--seeds", type=int, default=3, help="how many, 3 at most")
    parser.add_argument("--train", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train is not None:
        _train(arguments.train)
        return
    if arguments.only != "mnist":
        ids, labels = messages()
        rows = Dataset({"ids": ids[:_TRAINED]}, None, "sms-spam")
        test = Dataset({"ids": ids[_HELD:]}, labels[_HELD:], "sms-spam")
        found = [list(_runs(_sms(seed), "compress_embeddings", TABLES, rows, test)) for seed in range(arguments.seeds)]
        _table("compress_embeddings", TABLES, found)
    if arguments.only != "sms":
        train, held = (np.load(mnist.data()[split]) for split in ("train", "test"))
        rows = Dataset({"image": train["image"][:_PICTURES]}, None, "mnist")
        test = Dataset({"image": held["image"]}, held["label"], "mnist")
        paths = [mnist.model("lenet_300_100", seed)[0] for seed in range(arguments.seeds)]
        _table("compress_inputs", LAYERS, [list(_runs(p, "compress_inputs", LAYERS, rows, test)) for p in paths])


if __name__ == "__main__":
    main()
