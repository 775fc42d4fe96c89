"""Trained models for what must be judged by accuracy: small nets on Fashion-MNIST.

    python -m benchmarks.fashion --list             trains what is missing of fashion_nets.NETS; path and test accuracy
    python -m benchmarks.fashion --list --models=fashion_resnet20,fashion_vgg

The test images are never trained on, calibrated on or chosen by: the last 5,000 training images are held out for that.
A Keras 2 twin with the same weights lies beside each net that Keras 2 can build (TFMOT knows no other Keras).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.fashion_nets import COMPRESSED, NETS
from benchmarks.models import CACHE, REPOSITORY, SEED, parse_names

DATA = CACHE.parent / "data"
SOURCE = REPOSITORY.parent / "shared" / "data" / "keras" / "datasets" / "fashion-mnist"
HELD_OUT = 5_000
REPRESENTATIVE = 200
BATCH = 256
EPOCHS = {"fashion_mobilenet": 8, "fashion_se": 8, "fashion_vit": 6, "fashion_lstm": 10}
EPOCHS |= {"fashion_resnet20": 8, "fashion_vgg": 8, "fashion_mlp": 12, "fashion_lenet5": 8}
LEARNING_RATE = {"fashion_vit": 2e-3, "fashion_mlp": 1e-3, "fashion_lenet5": 2e-3}  # 4e-3 elsewhere
KNOWN = {**NETS, **COMPRESSED}
TWINS = ("fashion_mobilenet",)


def _idx(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the uint8 images (rows, 28, 28) and labels (rows,) of the dataset's own files, "train" or "t10k"."""
    images = gzip.decompress((source / f"{split}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((source / f"{split}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def data(prefix: str = "fashion", source: Path = SOURCE) -> dict[str, Path]:
    """Returns split -> .npz file with `image` (rows, 28, 28, 1) float32 in [0, 1] and, but for the first, `label`.

    The splits: `representative` (200 training images), `train` (55,000), `validation` (the other 5,000 training images,
    for choices that look at accuracy) and `test` (10,000).
    """
    paths = {split: DATA / f"{prefix}_{split}.npz" for split in ("representative", "train", "validation", "test")}
    if not all(path.is_file() for path in paths.values()):
        DATA.mkdir(parents=True, exist_ok=True)
        (images, labels), (test_images, test_labels) = _idx(source, "train"), _idx(source, "t10k")
        splits = {
            "train": (images[:-HELD_OUT], labels[:-HELD_OUT]),
            "validation": (images[-HELD_OUT:], labels[-HELD_OUT:]),
            "test": (test_images, test_labels),
        }
        for split, (pixels, classes) in splits.items():
            scaled = (pixels[..., None] / 255).astype(np.float32)
            np.savez(paths[split], image=scaled, label=classes.astype(np.int64))
        chosen = np.random.default_rng(SEED).choice(len(images) - HELD_OUT, REPRESENTATIVE, replace=False)
        np.savez(paths["representative"], image=(images[chosen][..., None] / 255).astype(np.float32))
    return paths


def augmented(images: np.ndarray, labels: np.ndarray, epochs: int, seed: int = SEED, augment: bool = True):
    """Returns a tf.data.Dataset of `epochs` shuffled passes over the images, mirrored and moved by up to 1 pixel."""
    import tensorflow as tf

    def change(batch, classes):
        count = tf.shape(batch)[0]
        mirrored = tf.random.uniform((count, 1, 1, 1)) < 0.5
        batch = tf.where(mirrored, batch[:, :, ::-1], batch)
        shift = tf.random.uniform((2,), 0, 3, tf.int32)  # one for the whole batch: cheap, and enough
        return tf.pad(batch, ((0, 0), (1, 1), (1, 1), (0, 0)))[:, shift[0] :, shift[1] :][:, :28, :28], classes

    rows = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images), seed=seed).repeat(epochs)
    batches = rows.batch(BATCH, drop_remainder=True)
    return (batches.map(change) if augment else batches).prefetch(4)


def _train(name: str) -> None:
    """Trains one net; writes the .keras file, the SavedModel and the test accuracy."""
    import keras

    keras.utils.set_random_seed(SEED)
    paths = data()
    train, validation, test = ((x["image"], x["label"]) for x in (np.load(paths[s]) for s in list(paths)[1:]))
    model = KNOWN[name](keras)
    print(f"{name}: {model.count_params():,} parameters", flush=True)
    fit(model, train, validation, EPOCHS[name], LEARNING_RATE.get(name, 4e-3))
    accuracy = model.evaluate(*test, batch_size=1000, verbose=0, return_dict=True)["accuracy"]
    model.save(CACHE / f"{name}.keras")
    model.export(CACHE / name, verbose=False)
    (CACHE / f"{name}.json").write_text(json.dumps({"accuracy": accuracy, "parameters": model.count_params()}))


def fit(model, train, validation, epochs: int, learning_rate: float, augment: bool = True) -> None:
    """AdamW with one epoch of warm-up and a cosine to zero; Loshchilov and Hutter 2019."""
    import keras

    steps = len(train[0]) // BATCH
    rate = keras.optimizers.schedules.CosineDecay(
        1e-5, (epochs - 1) * steps, warmup_target=learning_rate, warmup_steps=steps
    )
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.02, clipnorm=1.0),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,  # XLA is many times slower than oneDNN on a CPU
    )
    rows = augmented(*train, epochs, augment=augment)
    validate = {"validation_data": validation, "validation_batch_size": 1000}
    model.fit(rows, epochs=epochs, steps_per_epoch=steps, verbose=2, **validate)


def _train_in_child(name: str) -> dict:
    result = CACHE / f"{name}.json"
    if not result.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        environment = {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-m", "benchmarks.fashion", f"--train={name}"]
        subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, check=True)
    return json.loads(result.read_text())


def models(names: list[str] | None = None) -> dict[str, Path]:
    """Returns name -> SavedModel directory, training those that are not in the cache (5 to 10 minutes each).

    Raises:
        SystemExit: a name is unknown.
    """
    unknown = sorted(set(names or ()) - set(KNOWN))
    if unknown:
        raise SystemExit(f"unknown model {', '.join(unknown)}; known: {', '.join(KNOWN)}")
    for name in names or NETS:
        _train_in_child(name)
    return {name: CACHE / name for name in names or NETS}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print path and test accuracy of each")
    parser.add_argument("--models", default="", help="comma-separated names; all by default")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.train:
        _train(arguments.train)
        return
    for name, path in models(parse_names(arguments.models)).items():
        if arguments.list:
            found = json.loads((CACHE / f"{name}.json").read_text())
            print(f"{name}\t{path}\t{found['accuracy']:.2%} of 10,000 test images, {found['parameters']:,} parameters")


if __name__ == "__main__":
    main()
