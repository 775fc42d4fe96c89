"""Fixtures shared by all tests. Nothing heavy is imported here: the edge environment reads this file too."""

from __future__ import annotations

from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the checkout; a test that needs it is skipped without it."""
    path = REPO.parent / "shared"
    if not (path / "models").is_dir():
        pytest.skip(f"real models and data are not there: {path}")
    return path


@pytest.fixture(scope="session")
def keras3_convnet(tmp_path_factory) -> Path:
    """A Keras 3 export() of a small convnet with batch norms whose statistics are not the initial ones.

    Input ``image`` float32 (None, 8, 8, 1), output (None, 10); holds dropout and a depthwise convolution.
    """
    import keras

    keras.utils.set_random_seed(7)
    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((8, 8, 1), name="image"),
            layers.Conv2D(8, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.2),
            layers.DepthwiseConv2D(3, padding="same"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10, activation="softmax"),
        ]
    )
    randomise_batch_norms(model)
    path = tmp_path_factory.mktemp("keras3_convnet") / "model"
    model.export(path, verbose=False)
    return path


@pytest.fixture(scope="session")
def plain_module(tmp_path_factory) -> Path:
    """A plain tf.Module with two signatures that share one weight: ``double`` and ``score``, float32 (None, 4)."""
    import tensorflow as tf

    class Plain(tf.Module):
        def __init__(self):
            super().__init__()
            self.kernel = tf.Variable(tf.random.stateless_normal((4, 3), seed=(1, 2)), name="kernel")

        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def score(self, x):
            return {"score": tf.nn.relu(x @ self.kernel)}

        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def double(self, x):
            return {"double": 2.0 * (x @ self.kernel)}

    path = tmp_path_factory.mktemp("plain_module") / "model"
    module = Plain()
    tf.saved_model.save(module, str(path), signatures={"score": module.score, "double": module.double})
    return path


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A function from the name of a model in tests/origins.py to its SavedModel, which is written once."""
    from tests.origins import ORIGINS

    root = tmp_path_factory.mktemp("origins")

    def path(name: str) -> Path:
        if not (root / name).exists():
            ORIGINS[name].build(root / name)
        return root / name

    return path


def randomise_batch_norms(model, seed: int = 0) -> None:
    """Give every batch norm of a Keras model statistics, scales and shifts that a wrong fold would show.

    Args:
        model: a Keras 3 or tf_keras model; changed in place.
        seed: of NumPy's generator.
    """
    import numpy as np

    random = np.random.default_rng(seed)
    for layer in model._flatten_layers():
        if type(layer).__name__ == "BatchNormalization":
            for weight in layer.weights:
                # Away from 0, so that variances are positive and scales do not vanish.
                weight.assign(random.uniform(0.5, 1.5, weight.shape).astype("float32"))


def serve_v1(path, inputs: dict) -> dict:
    """What serving_default answers in a v1 session, which is what TensorFlow Serving runs."""
    import tensorflow as tf

    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        meta = tf.compat.v1.saved_model.load(session, ["serve"], str(path))
        signature = meta.signature_def["serving_default"]
        assert set(signature.inputs) == set(inputs)
        return session.run(
            {name: tensor.name for name, tensor in signature.outputs.items()},
            {signature.inputs[name].name: value for name, value in inputs.items()},
        )
