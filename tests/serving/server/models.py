"""Small models to serve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import predict_pb2

v1 = tf.compat.v1


def half_plus(base: Path, version: int, plus: float = 2.0) -> Path:
    """y = 0.5 x + plus, x float32 (None,), in TF 1's way: signatures of all three methods; a reference variable."""
    path = base / str(version)
    with tf.Graph().as_default(), v1.Session() as session:
        half = v1.get_variable("half", initializer=np.float32(0.5), use_resource=False)
        added = v1.get_variable("added", initializer=np.float32(plus), use_resource=True)
        x = v1.placeholder(tf.float32, [None], "x")
        y = tf.identity(half * x + added, "y")
        examples = v1.placeholder(tf.string, [None], "examples")
        parsed = tf.io.parse_example(examples, {"x": tf.io.FixedLenFeature([1], tf.float32)})["x"]
        scores = half * parsed + added
        labels = tf.where(scores > 3.0, tf.fill(tf.shape(scores), "high"), tf.fill(tf.shape(scores), "low"))
        session.run(v1.global_variables_initializer())
        info = v1.saved_model.build_tensor_info
        definition = v1.saved_model.build_signature_def
        method = "tensorflow/serving/"
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(
            session,
            ["serve"],
            {
                "serving_default": definition({"x": info(x)}, {"y": info(y)}, method + "predict"),
                "classify": definition(
                    {"inputs": info(examples)}, {"classes": info(labels), "scores": info(scores)}, method + "classify"
                ),
                "regress": definition({"inputs": info(examples)}, {"outputs": info(scores)}, method + "regress"),
            },
        )
        builder.save()
    return path


def two_inputs(base: Path, version: int = 1) -> Path:
    """Inputs a float32 (None, 3), text string (None,) and i int64 (None,); outputs of several dtypes."""

    class Two(tf.Module):
        def __init__(self):
            super().__init__()
            self.w = tf.Variable(np.arange(6, dtype=np.float32).reshape(3, 2))
            words = tf.lookup.KeyValueTensorInitializer(tf.constant(["ja", "nein"]), tf.constant([1, 2], tf.int64))
            self.table = tf.lookup.StaticHashTable(words, -1)

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, 3), tf.float32, name="a"),
                tf.TensorSpec((None,), tf.int64, name="i"),
                tf.TensorSpec((None,), tf.string, name="text"),
            ]
        )
        def serve(self, a, i, text):
            return {
                "product": a @ self.w,
                "word": self.table.lookup(text) + i,
                "echo": tf.strings.join([text, "!"]),
                "raw_bytes": text,
                "odd": i % 2 == 1,
            }

    module = Two()
    tf.saved_model.save(module, str(base / str(version)), {"serving_default": module.serve})
    return base / str(version)


def example(**features: float | str) -> tf.train.Example:
    """A tf.Example of one number or string a feature."""
    found = tf.train.Example()
    for name, value in features.items():
        if isinstance(value, str):
            found.features.feature[name].bytes_list.value.append(value.encode())
        else:
            found.features.feature[name].float_list.value.append(value)
    return found


def predict_request(x=(1.0, 2.0, 5.0), /, name="half", version=None, label=None, signature="", **inputs):
    """A PredictRequest; its input x is left out where that is None."""
    made = predict_pb2.PredictRequest()
    made.model_spec.name, made.model_spec.signature_name = name, signature
    if version is not None:
        made.model_spec.version.value = version
    if label is not None:
        made.model_spec.version_label = label
    for key, value in {**({} if x is None else {"x": np.float32(x)}), **inputs}.items():
        made.inputs[key].CopyFrom(tf.make_tensor_proto(value))
    return made
