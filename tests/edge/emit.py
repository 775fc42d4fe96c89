"""Makes what the edge environment runs: small models as .tflite files of every kind, and their outputs here.

    python -m tests.edge.emit build/edge          # in the main environment
    python -m pytest tests/edge                   # then, in one with tflite-runtime==2.14, "numpy<2" and pytest

`make test-edge` does both. The folder gets `cases.json` (a list of the cases that run_test.py checks), and for each
model `inputs.<signature>.npz`, `<file>.tflite` and `<file>.<signature>.npz` with the outputs that ai-edge-litert gives.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tfopt import model, runtime
from tfopt.data import Dataset
from tfopt.export import saved_model, tflite
from tfopt.export.fixed_batch import fix_batch

ROWS = 40


def convnet():
    """Convolutions and pooling, with a batch norm that the converter has to fold."""
    from keras import layers

    image = layers.Input((16, 16, 3), name="image")
    x = layers.Conv2D(32, 3, strides=2, padding="same", use_bias=False)(image)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(3, padding="same")(x)
    x = layers.Conv2D(64, 1, activation="relu6")(x)
    x = layers.Concatenate()([layers.MaxPooling2D(2)(x), layers.AveragePooling2D(2)(x)])
    return image, layers.Dense(10, activation="softmax")(layers.GlobalAveragePooling2D()(x))


def dense():
    """Fully connected layers, the op whose newest version old runtimes do not have."""
    from keras import layers

    features = layers.Input((64,), name="features")
    x = layers.Dense(128, activation="relu")(features)
    return features, layers.Dense(8)(layers.Dense(64, activation="tanh")(x))


def attention():
    """A transformer block: batched matrix products, layer normalization, gelu."""
    from keras import layers

    tokens = layers.Input((12, 32), name="tokens")
    x = layers.LayerNormalization()(tokens + layers.MultiHeadAttention(4, 8)(tokens, tokens))
    x = layers.LayerNormalization()(x + layers.Dense(32)(layers.Dense(64, activation="gelu")(x)))
    return tokens, layers.Dense(5, activation="softmax")(layers.GlobalAveragePooling1D()(x))


def recurrent():
    """A loop: neither int8 quantizer can calibrate one, so there is no int8 file."""
    from keras import layers

    steps = layers.Input((10, 8), name="steps")
    return steps, layers.Dense(4)(layers.LSTM(16)(steps))


MODELS: dict[str, Callable] = {"convnet": convnet, "dense": dense, "attention": attention, "recurrent": recurrent}
FILES = {"recurrent": ("float32", "float16", "dynamic_int8")}  # the others: all


def emit(folder: Path) -> list[dict]:
    """Fills `folder` and returns the cases."""
    import keras

    cases = []
    for name, build in MODELS.items():
        keras.utils.set_random_seed(0)
        keras.backend.clear_session()
        inputs, outputs = build()
        target = folder / name
        with tempfile.TemporaryDirectory() as work:
            keras.Model(inputs, outputs).export(f"{work}/keras", verbose=False)
            loaded = model.load(f"{work}/keras", ["serving_default"])
            saved_model.save(fix_batch(loaded, 1), f"{work}/serving")
            rows = np.random.default_rng(0).normal(size=(ROWS, *inputs.shape[1:])).astype(np.float32)
            data = {"serving_default": Dataset({inputs.name: rows}, None, "random")}
            target.mkdir(parents=True)
            np.savez(target / "inputs.serving_default.npz", **data["serving_default"].inputs)
            files = FILES.get(name, tflite.NAMES)
            made = tflite.convert(f"{work}/serving", files, target, representative=data)
            if name == "convnet":
                (integer,) = tflite.convert(
                    f"{work}/serving", ["int8"], f"{work}/int8", representative=data, io_type="int8"
                )
                path = integer.path and Path(shutil.move(integer.path, target / "int8_io.tflite"))
                made.append(tflite.Converted("int8_io", path, integer.error))
        for file in made:
            if file.path is None:
                raise SystemExit(f"{name}: {file.error}")
            with runtime.open(file.path, threads=1) as program:
                for signature in program.signatures:
                    np.savez(target / f"{file.name}.{signature}.npz", **program.run(signature, {inputs.name: rows}))
                    cases.append({"model": name, "file": file.name, "signature": signature})
    (folder / "cases.json").write_text(json.dumps(cases, indent=1))
    return cases


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.edge.emit FOLDER")
    print(f"{len(emit(Path(sys.argv[1])))} cases in {sys.argv[1]}")
