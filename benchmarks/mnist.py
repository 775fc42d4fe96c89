"""Deep Compression's two nets on MNIST, trained to the errors published there (Han et al. 2016): 1.64% and 0.80%.

    python -m benchmarks.mnist              trains what is missing; test error of each net and seed

The last 5,000 training images are held out for choices, and the test images are for the figures alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks import fashion
from benchmarks.fashion_nets import lenet5, perceptron
from benchmarks.models import CACHE, REPOSITORY, SEED, parse_names

SOURCE = REPOSITORY.parent / "shared" / "data" / "mnist"
SEEDS = (0, 1, 2)
NETS = {"lenet_300_100": lambda keras: perceptron(keras, (300, 100)), "lenet5": lenet5}
PUBLISHED = {"lenet_300_100": 0.0164, "lenet5": 0.0080}
EPOCHS = {"lenet_300_100": 20, "lenet5": 12}
LEARNING_RATE = {"lenet_300_100": 2e-3, "lenet5": 1e-3}


def data() -> dict[str, Path]:
    """Returns split -> .npz file, as `fashion.data` does."""
    return fashion.data("mnist", SOURCE)


def _train(name: str, seed: int) -> None:
    """Trains one net, without augmentation as the published ones; writes the SavedModel and the test error."""
    import keras

    keras.utils.set_random_seed(SEED + seed)
    paths = data()
    train, validation, test = ((x["image"], x["label"]) for x in (np.load(paths[s]) for s in list(paths)[1:]))
    model = NETS[name](keras)
    fashion.fit(model, train, validation, EPOCHS[name], LEARNING_RATE[name], augment=False)
    error = 1 - model.evaluate(*test, batch_size=1000, verbose=0, return_dict=True)["accuracy"]
    model.save(CACHE / f"{name}_{seed}.keras")
    model.export(CACHE / f"{name}_{seed}", verbose=False)
    (CACHE / f"{name}_{seed}.json").write_text(json.dumps({"error": error, "parameters": model.count_params()}))


def model(name: str, seed: int) -> tuple[Path, float]:
    """Returns the SavedModel directory and the test error of a net, training it in a child where it is missing."""
    result = CACHE / f"{name}_{seed}.json"
    if not result.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "benchmarks.mnist", f"--train={name}", f"--seed={seed}"]
        subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, check=True)
    return CACHE / f"{name}_{seed}", json.loads(result.read_text())["error"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="comma-separated names; both by default")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        _train(arguments.train, arguments.seed)
        return
    for name in parse_names(arguments.models) or NETS:
        for seed in SEEDS:
            path, error = model(name, seed)
            print(f"{name}\tseed {seed}\t{path}\t{error:.2%} error, published {PUBLISHED[name]:.2%}", flush=True)


if __name__ == "__main__":
    main()
