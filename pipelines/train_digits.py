r"""Trains the small convnet of saved_models/digits on scikit-learn's handwritten digits.

The data (1,797 images of 8 x 8 pixels) ships in scikit-learn's wheel, so nothing is downloaded.

    python -m pipelines.train_digits --output=saved_models/digits     # trains, and exports a SavedModel
    python -m pipelines.train_digits --data_dir=/tmp/digits           # writes the data of the two npz flags

Without ``--output`` nothing is trained.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from tfopt import isolate
from tfopt.errors import TfoptError

INPUT = "image"
MIN_ACCURACY = 0.97

FLAGS = flags.FLAGS


def split(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The digits, shuffled and split.

    Args:
        seed: of the shuffle.

    Returns:
        Training images float32 (1257, 8, 8, 1) in [0, 1], training labels int64 (1257,), and the same of
        the 540 held-out rows.
    """
    try:
        from sklearn import datasets, model_selection
    except ImportError as error:
        raise TfoptError("the digits need scikit-learn: pip install 'tfopt[digits]'") from error

    digits = datasets.load_digits()
    images = (digits.images[..., None] / 16.0).astype(np.float32)
    train_x, eval_x, train_y, eval_y = model_selection.train_test_split(
        images, digits.target, test_size=0.3, random_state=seed, stratify=digits.target
    )
    return train_x, train_y, eval_x, eval_y


def write_data(directory: Path, seed: int, rows: int = 256) -> None:
    """Write ``representative.npz`` (training rows without labels) and ``eval.npz`` (all held-out rows).

    Args:
        directory: made where it is missing.
        seed: of the split; that of the training, or held-out rows were trained on.
        rows: of the representative data.
    """
    train_x, _, eval_x, eval_y = split(seed)
    directory.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(directory / "representative.npz", **{INPUT: train_x[:rows]})
    np.savez_compressed(directory / "eval.npz", **{INPUT: eval_x, "label": eval_y})


def train(seed: int, epochs: int):
    """Train the convnet.

    Args:
        seed: of everything random.
        epochs: passes over the training rows.

    Returns:
        The Keras 3 model, and its accuracy on the held-out rows.
    """
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(seed)
    tf.config.experimental.enable_op_determinism()
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1), name=INPUT),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.DepthwiseConv2D(3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(32, 1, use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Dropout(0.25),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dropout(0.25),
            layers.Dense(10, activation="softmax", name="digit"),
        ]
    )
    train_x, train_y, eval_x, eval_y = split(seed)
    steps = epochs * -(-len(train_x) // 32)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, steps)),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    model.fit(train_x, train_y, batch_size=32, epochs=epochs, verbose=0)
    return model, model.evaluate(eval_x, eval_y, verbose=0)[1]


def export(model, output: Path) -> None:
    """Export a Keras 3 model; the directory appears only when it is complete."""
    beside = output.with_name(f".{output.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    model.export(beside, verbose=False)
    shutil.rmtree(output, ignore_errors=True)
    beside.rename(output)


def main(argv: Sequence[str]) -> int:
    """Turns flags into library calls; returns the exit code."""
    if argv[1:]:
        raise TfoptError(f"train_digits takes flags only. Received: {' '.join(argv[1:])}")
    if FLAGS.output is None and FLAGS.data_dir is None:
        raise TfoptError("nothing to do: give --output, --data_dir or both")
    if FLAGS.data_dir is not None:
        write_data(Path(FLAGS.data_dir), FLAGS.seed)
    if FLAGS.output is not None:
        output = Path(FLAGS.output)
        if output.exists() and not FLAGS.overwrite:
            raise TfoptError(f"--output={output} exists: give another path or --overwrite")
        model, accuracy = train(FLAGS.seed, FLAGS.epochs)
        if accuracy < MIN_ACCURACY:
            raise TfoptError(
                f"the model reached {accuracy:.4f} on held-out rows and needs {MIN_ACCURACY}: raise --epochs"
                f" (received {FLAGS.epochs})"
            )
        export(model, output)
        print(f"{output}: accuracy {accuracy:.4f} on the held-out digits")
    return 0


def run() -> None:
    """Entry point of ``python -m pipelines.train_digits``."""
    # Defined here, so that the functions above can be imported beside another script with flags of these names.
    flags.DEFINE_string("output", None, "Directory that the trained SavedModel is written to.")
    flags.DEFINE_string("data_dir", None, "Directory for representative.npz and eval.npz.")
    flags.DEFINE_integer("epochs", 30, "Passes over the training rows.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed of the split, the initial weights and the batches.")
    flags.DEFINE_bool("overwrite", False, "Replace an existing --output.")
    isolate.run(main)


if __name__ == "__main__":
    run()
