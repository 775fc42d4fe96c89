"""Keras 2 models in the child process of `engine.py`: in, matched with signatures, and out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tfopt import keras_file
from tfopt.errors import TfoptError
from tfopt.model import read_meta_graph

Ends = dict[str, tuple[list[str], list[str]]]  # signature -> names of inputs and outputs, in the order of the model's


def load(path: Path, allow_unsafe: bool) -> Any:
    """Loads a Keras file, or a SavedModel that Keras 2 wrote.

    Args:
      path: of the file or directory.
      allow_unsafe: run the Python code that it may carry.

    Raises:
      TfoptError: it carries code, Keras 2 cannot load it, or it is a subclassed model.
    """
    import tf_keras

    if path.is_dir() and not allow_unsafe:
        for config in _configurations(path):
            for layer, reason in keras_file.unsafe(config):
                raise TfoptError(f"layer '{layer}' {reason}; give --allow_unsafe_deserialization if you trust the file")
    if allow_unsafe:
        tf_keras.__internal__.enable_unsafe_deserialization()
    try:
        model = tf_keras.models.load_model(path, compile=False, safe_mode=not allow_unsafe)
    except Exception as error:  # whatever Keras raises about a file that is not its own
        raise TfoptError(f"Keras 2 cannot load it: {sentence(error)}") from error
    if not isinstance(model, tf_keras.Model):
        raise TfoptError("Keras 2 finds no layers in it: it is of Keras 3, TensorFlow 1, or no Keras at all")
    if not getattr(model, "_is_graph_network", False):
        raise TfoptError("TFMOT refuses it: it is a subclassed model, neither Sequential nor Functional")
    return model


def _configurations(path: Path) -> Iterator[Any]:
    """The configurations that Keras 2 keeps in a SavedModel, and makes layers of."""
    from tf_keras.protobuf.saved_metadata_pb2 import SavedMetadata

    texts = [node.user_object.metadata for node in read_meta_graph(path).object_graph_def.nodes]
    metadata = path / "keras_metadata.pb"
    if metadata.is_file():
        texts += [node.metadata for node in SavedMetadata.FromString(metadata.read_bytes()).nodes]
    for text in texts:
        try:
            yield json.loads(text) if text else None
        except ValueError:
            continue  # not a configuration of Keras


def match(model: Any, signature: str, inputs: list[str], outputs: list[str]) -> tuple[list[str], list[str]]:
    """The names of a signature's ends, in the order of the model's.

    Raises:
      TfoptError: the signature is not the model's call.
    """
    numbered = [f"output_{i}" for i in range(len(model.output_names))]
    found = []
    for given, candidates in ((inputs, (model.input_names,)), (outputs, (model.output_names, numbered))):
        order = next((list(names) for names in candidates if set(names) == set(given)), given)
        if len(order) != len(candidates[0]) or (len(order) > 1 and order is given):
            raise TfoptError(
                f"signature {signature!r} is not the model's call: it has {', '.join(sorted(given))}, the Keras model "
                f"{', '.join(candidates[0])}; leave it out by --signatures"
            )
        found.append(order)
    return found[0], found[1]


def clone(model: Any) -> Any:
    """A copy with weights of its own: TFMOT changes the model that it is given."""
    import tf_keras

    copied = tf_keras.models.clone_model(model)
    copied.set_weights(model.get_weights())
    return copied


def wrapped(model: Any, wrap: Callable[[Any], Any]) -> Any:
    """A clone whose layers, also those of models inside it, are what `wrap` makes of them.

    Raises:
      TfoptError: TFMOT refuses a layer.
    """
    import tf_keras

    def inside(layer: Any) -> Any:
        if isinstance(layer, tf_keras.Model):
            return tf_keras.models.clone_model(layer, clone_function=inside)
        return wrap(layer)

    with refusing():
        return inside(clone(model))


def layers(model: Any) -> Iterator[Any]:
    """Every layer, without wrappers, also those of models inside it."""
    import tf_keras

    for layer in model.layers:
        if isinstance(layer, tf_keras.Model):
            yield from layers(layer)
        else:
            yield getattr(layer, "layer", layer)


def batch_norms(model: Any) -> list[Any]:
    """The batch norms of a model."""
    import tf_keras

    return [layer for layer in layers(model) if isinstance(layer, tf_keras.layers.BatchNormalization)]


class refusing:  # noqa: N801 - reads as the context that it is
    """A context in which whatever TFMOT raises becomes a TfoptError of one line."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, TfoptError):  # TFMOT raises exceptions of many kinds
            raise TfoptError(f"TFMOT refuses it: {sentence(error)}") from error


def sentence(error: Exception) -> str:
    """The first sentence of a message: what follows explains how to write code."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"[.!] (?=[A-Z])", text)[0].rstrip(".")[:300]


def save(model: Any, ends: Ends, destination: str) -> None:
    """Writes a SavedModel with the names of the original's signatures; tf.Module, since Keras cannot reload its own."""
    import tensorflow as tf

    holder = tf.Module()
    holder.held = model.variables
    signatures = {}
    for signature, (inputs, outputs) in ends.items():

        def serve(inputs: list[str] = inputs, outputs: list[str] = outputs, **given: Any) -> dict[str, Any]:
            fed = [given[name] for name in inputs]
            answers = tf.nest.flatten(model(fed if len(fed) > 1 else fed[0], training=False))
            return dict(zip(outputs, answers, strict=True))

        specs = {n: tf.TensorSpec(t.shape, t.dtype, n) for n, t in zip(inputs, model.inputs, strict=True)}
        signatures[signature] = tf.function(serve).get_concrete_function(**specs)
    tf.saved_model.save(holder, destination, signatures=signatures)
