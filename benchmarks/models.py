"""The models that the benchmarks run on: built here once, or read from the shared folder of real models.

    python -m benchmarks.models --list              name and path of each; builds what is missing
    python -m benchmarks.models --list --models=resnet50,kws-ds-cnn

Untrained networks get random scales and shifts, and batch-norm statistics near those of their own activations: values
stay in a sane range through any depth, and no scale or shift is the identity that a fold could ignore. Scales are
below 1, as trained ones mostly are: above it a deep random network amplifies rounding until it hides what is measured.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = Path(__file__).resolve().parent / ".cache" / "models"
SHARED = REPOSITORY.parent / "shared" / "models"
SEED = 20261122

# What an input's numbers look like where it is not (-1, 1): images as their networks' preprocessing expects them.
INPUT_RANGE = {"efficientnet_b0": (0.0, 255.0), "convnext_tiny": (0.0, 255.0)}

SHARED_MODELS = {
    "kws-ds-cnn": "kws-ds-cnn/saved_model",
    "basic-pitch": "basic-pitch/nmp",
    "dtln": "dtln/saved_model",
    "tfx-chicago-taxi": "tfx-chicago-taxi/estimator_serving",
    "tfx-penguin": "tfx-penguin",
    "tfx-unsupported-op": "tfx-unsupported-op/benchmark_trained",
    "half-plus-two-tf1": "tf-serving-testdata/saved_model_half_plus_two_cpu/00000123",
    "half-plus-two-tf2": "tf-serving-testdata/saved_model_half_plus_two_tf2_cpu/00000123",
    "half-plus-two-v123": "tf-serving-testdata/saved_model_half_plus_two_2_versions/00000123",
    "half-plus-two-v124": "tf-serving-testdata/saved_model_half_plus_two_2_versions/00000124",
    "half-plus-two-config": "tf-serving-testdata/saved_model_half_plus_two_cpu_with_saved_model_config/00000123",
    "counter": "tf-serving-testdata/saved_model_counter/00000123",
}


def input_range(name: str) -> tuple[float, float]:
    """Returns (low, high): the range of the float inputs that `name` is fed with."""
    return INPUT_RANGE.get(name, (-1.0, 1.0))


def picture(rng, shape, low: float, high: float):
    """Returns float32 random images (or other arrays) in [low, high]: noise on a coarse pattern where there is room.

    Pure noise looks the same to a convnet whatever the seed: its features would hardly vary, and normalising that
    little variance would blow up rounding errors.
    """
    import numpy as np

    values = rng.uniform(low, high, shape)
    if len(shape) == 4 and min(shape[1:3]) >= 16:
        coarse = rng.uniform(low, high, (shape[0], 4, 4, shape[3]))
        rows, columns = (np.arange(size) * 4 // size for size in shape[1:3])
        values = 0.2 * values + 0.8 * coarse[:, rows][:, :, columns]
    return values.astype(np.float32)


def _settle(model, name: str) -> None:
    """Gives every normalisation of an untrained Keras model non-trivial statistics, scales and shifts."""
    import keras
    import numpy as np

    rng = np.random.default_rng(SEED)
    layers = model._flatten_layers()
    norms = [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization)]
    for layer in layers:
        for weight in layer.weights:
            if weight.name in ("gamma", "scale") or type(layer).__name__ == "LayerScale":
                weight.assign(rng.uniform(0.3, 0.8, weight.shape))
            elif weight.name in ("beta", "bias"):
                weight.assign(rng.normal(0, 0.1, weight.shape))
    if norms:
        momenta = [layer.momentum for layer in norms]
        for layer in norms:
            layer.momentum = 0.0
        low, high = input_range(name)
        images = [picture(rng, (8, *x.shape[1:]), low, high) for x in model.inputs]
        model(keras.tree.pack_sequence_as(model.input, images), training=True)
        for layer, momentum in zip(norms, momenta, strict=True):
            layer.momentum = momentum
            for weight, spread in ((layer.moving_mean, 0.05), (layer.moving_variance, 0.1)):
                weight.assign(np.asarray(weight) * rng.uniform(1 - spread, 1 + spread, weight.shape))
    head = model.layers[-1]
    if norms and len(model.outputs) == 1:  # logits of unit spread: a saturated softmax would hide every error
        features = np.asarray(keras.Model(model.inputs, head.input)(images))
        head.kernel.assign(head.kernel / np.std(features @ np.asarray(head.kernel)))


def _application(class_name: str) -> Callable:
    def build():
        import keras

        return getattr(keras.applications, class_name)(weights=None)

    return build


def _transformer():
    import keras
    from keras import layers

    tokens = keras.Input((32,), dtype="int32", name="tokens")
    positions = keras.ops.arange(0, 32)
    x = layers.Embedding(1000, 64, name="token_embedding")(tokens)
    x = x + layers.Embedding(32, 64, name="position_embedding")(positions)
    for _ in range(2):
        attended = layers.MultiHeadAttention(num_heads=4, key_dim=16, dropout=0.1)(x, x)
        x = layers.LayerNormalization()(x + attended)
        hidden = layers.Dropout(0.1)(layers.Dense(128, activation="gelu")(x))
        x = layers.LayerNormalization()(x + layers.Dense(64)(hidden))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(tokens, layers.Dense(10, activation="softmax")(x))


def _lstm(dropout: float = 0.0):
    import keras
    from keras import layers

    sequence = keras.Input((24, 16), name="sequence")
    x = layers.LSTM(64, return_sequences=True, dropout=dropout)(sequence)
    x = layers.BatchNormalization()(x)
    x = layers.LSTM(32)(x)
    return keras.Model(sequence, layers.Dense(5, activation="softmax")(x))


def _two_inputs():
    import keras
    from keras import layers

    image = keras.Input((32, 32, 3), name="image")
    features = keras.Input((8,), name="features")
    x = layers.Rescaling(1 / 127.5, offset=-0.5)(image)
    x = layers.Conv2D(16, 3, padding="same")(x)
    x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.Conv2D(32, 3, strides=2)(x)
    x = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.GlobalAveragePooling2D()(x)
    y = layers.ReLU()(layers.BatchNormalization()(layers.Dense(16)(features)))
    x = layers.BatchNormalization()(layers.Concatenate()([x, y]))
    x = layers.Dropout(0.5)(layers.Dense(32, activation="relu")(x))
    score = layers.Dense(1, activation="sigmoid", name="score")(x)
    return keras.Model({"image": image, "features": features}, {"score": score, "embedding": x})


KERAS_3_MODELS: Mapping[str, Callable] = {
    "mobilenet_v2": _application("MobileNetV2"),
    "resnet50": _application("ResNet50"),
    "efficientnet_b0": _application("EfficientNetB0"),
    "convnext_tiny": _application("ConvNeXtTiny"),
    "transformer": _transformer,
    "lstm": _lstm,
    "lstm_dropout": lambda: _lstm(dropout=0.1),  # Keras exports it with an assignment to the seed's state
    "two_inputs": _two_inputs,
}
KERAS_2_FILES = {
    "mobilenet-v1-025": "mobilenet-v1-025/mobilenet_v1_0.25_224.h5",
    "face-xception-mini": "face-xception/emotion_model.hdf5",
    "face-xception-big": "face-xception/fer2013_big_XCEPTION.54-0.66.hdf5",
}


def _build(name: str, directory: str) -> None:
    """Writes one SavedModel; runs in a child process, because Keras 2 and Keras 3 do not share one."""
    if name in KERAS_2_FILES:
        import tf_keras

        model = tf_keras.models.load_model(SHARED / KERAS_2_FILES[name], compile=False)
        model.save(directory, save_format="tf")
        return
    import keras

    keras.utils.set_random_seed(SEED)
    model = KERAS_3_MODELS[name]()
    _settle(model, name)
    model.export(directory, verbose=False)


def _ensure_built(name: str) -> Path:
    directory = CACHE / name
    if not directory.is_dir():
        partial = CACHE / f"{name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        legacy = {"TF_USE_LEGACY_KERAS": "1"} if name in KERAS_2_FILES else {}
        environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""} | legacy
        command = [sys.executable, "-m", "benchmarks.models", f"--build={name}", f"--directory={partial}"]
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
        partial.rename(directory)
    return directory


def all_models(names: list[str] | None = None) -> dict[str, str]:
    """Returns name -> SavedModel directory, building those that are not in the cache.

    Args:
        names: the models wanted; None for all. Models whose files are not on this machine are left out.

    Raises:
        SystemExit: a name is unknown.
    """
    known = [*KERAS_3_MODELS, *KERAS_2_FILES, *SHARED_MODELS]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise SystemExit(f"unknown model {', '.join(unknown)}; known: {', '.join(known)}")
    paths = {}
    for name in names or known:
        if name in KERAS_3_MODELS or (name in KERAS_2_FILES and (SHARED / KERAS_2_FILES[name]).is_file()):
            paths[name] = str(_ensure_built(name))
        elif name in SHARED_MODELS and (SHARED / SHARED_MODELS[name]).is_dir():
            paths[name] = str(SHARED / SHARED_MODELS[name])
    return paths


def parse_names(text: str) -> list[str] | None:
    """Returns the names in a comma-separated flag, or None for an empty one (all models)."""
    return [name for name in text.split(",") if name] or None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print name and path of each model")
    parser.add_argument("--models", default="", help="comma-separated names; all by default")
    parser.add_argument("--build", help=argparse.SUPPRESS)
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.build:
        _build(arguments.build, arguments.directory)
        return
    for name, path in all_models(parse_names(arguments.models)).items():
        if arguments.list:
            print(f"{name}\t{path}")


if __name__ == "__main__":
    main()
