"""The child's side of tfmot_route.py: quantization-aware training by TFMOT, in a process whose Keras is Keras 2.

    min over W of  loss(f(q(W)), t)     t = a label + (1 - a) teacher(x): every loss here is linear in its target

TFMOT starts the range of every activation at [-6, 6], and moves it by a thousandth of the difference at each step:
thousands of steps later it fits. Here the ranges start from what the rows give. Batch norms keep the statistics that
they will be served with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tfopt import keras_file
from tfopt.errors import TfoptError
from tfopt.model import read_meta_graph

_HELD_BACK = 10  # every tenth row decides which weights are best


def worker() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns the function that trains: see `_train` for what it takes and gives."""
    import tensorflow_model_optimization  # noqa: F401 - must come before a model of Keras 2 is made

    return _train


def _train(job: dict[str, Any]) -> dict[str, Any]:
    """Loads, quantizes, trains, and writes a SavedModel that holds fake-quant ops.

    Args:
      job: `source`, a Keras file or a SavedModel; `allow_unsafe`; `destination`; `ends`, signature -> (names of
        inputs, names of outputs); `main`, the signature that the rows are of; `rows` and `labelled`, arrays by input
        name or None; `labels`; `epochs`, `batch_size`, `learning_rate`, `alpha`, `seed`.

    Returns:
      `losses` on `held` rows, before training and after each epoch; `rows` that were trained on.

    Raises:
      TfoptError: the model is none that TFMOT takes, or the data do not fit it.
    """
    import tf_keras

    tf_keras.utils.set_random_seed(job["seed"])
    model = _load(Path(job["source"]), job["allow_unsafe"])
    qat = _quantized(model)  # before anything is asked of layers that a subclassed model does not show
    ends = {name: _match(model, name, *sides) for name, sides in job["ends"].items()}
    names = ends[job["main"]][0]
    inputs, targets, losses = _rows(model, names, job)
    some = [array[:: -(-len(array) // 256)] for array in inputs]
    _calibrate(qat, some, job["batch_size"])
    order = np.random.default_rng(job["seed"]).permutation(len(inputs[0]))
    held, used = order[::_HELD_BACK], np.delete(order, slice(None, None, _HELD_BACK))
    used = used if len(used) else held
    steps = max(job["epochs"], 1) * -(-len(used) // job["batch_size"])
    rate = tf_keras.optimizers.schedules.CosineDecay(job["learning_rate"], steps)
    qat.compile(tf_keras.optimizers.Adam(rate), loss=losses)
    train, check = ([[array[part] for array in side] for side in (inputs, targets)] for part in (used, held))

    def validation() -> float:
        return float(np.sum(qat.evaluate(*check, batch_size=job["batch_size"], verbose=0, return_dict=True)["loss"]))

    history, best = [validation()], qat.get_weights()
    for _ in range(job["epochs"]):
        qat.fit(*train, batch_size=job["batch_size"], epochs=1, verbose=0)
        history.append(validation())
        if history[-1] <= min(history):
            best = qat.get_weights()
    qat.set_weights(best)
    _save(qat, ends, job["destination"])
    return {"losses": history, "held": len(held), "rows": len(used)}


def _load(path: Path, allow_unsafe: bool) -> Any:
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
        raise TfoptError(f"Keras 2 cannot load it: {_sentence(error)}") from error
    if not isinstance(model, tf_keras.Model):
        raise TfoptError("Keras 2 finds no layers in it: it is of Keras 3, TensorFlow 1, or no Keras at all")
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


def _match(model: Any, signature: str, inputs: list[str], outputs: list[str]) -> tuple[list[str], list[str]]:
    """The names of a signature's ends, in the order of the model's."""
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


def _rows(model: Any, names: list[str], job: dict[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray], list[Any]]:
    """Inputs, targets and losses, one for each end of the model."""
    import tf_keras

    sets = [rows for rows in (job["rows"], job["labelled"]) if rows is not None]
    inputs = [np.concatenate([rows[name] for rows in sets]) for name in names]
    answers = model.predict(inputs, batch_size=job["batch_size"], verbose=0)
    targets = list(answers) if isinstance(answers, list) else [answers]
    labels = job["labels"]
    classes = labels is not None and _are_classes(labels, targets[0])
    if labels is not None and len(targets) > 1:
        raise TfoptError(f"it has {len(targets)} outputs, and labels fit one: leave out --labels")
    losses: list[Any] = []
    for index, target in enumerate(targets):
        within = bool(target.min() >= 0 and target.max() <= 1)
        if target.shape[-1] > 1 and within and np.allclose(target.sum(-1), 1, atol=1e-3):
            losses.append(tf_keras.losses.CategoricalCrossentropy())
        elif classes:
            targets[index] = np.exp(target - target.max(-1, keepdims=True))
            targets[index] /= targets[index].sum(-1, keepdims=True)
            losses.append(tf_keras.losses.CategoricalCrossentropy(from_logits=True))
        elif within:
            losses.append(tf_keras.losses.BinaryCrossentropy())
        else:
            losses.append(_relative_error(float(np.var(target)) or 1.0))
    if labels is not None:
        wanted = np.eye(targets[0].shape[-1])[labels.reshape(-1).astype(int)] if classes else labels
        taught = targets[0][-len(labels) :]
        targets[0][-len(labels) :] = job["alpha"] * wanted.reshape(taught.shape) + (1 - job["alpha"]) * taught
    return inputs, targets, losses


def _are_classes(labels: np.ndarray, output: np.ndarray) -> bool:
    """Whether labels are class ids of an output of scores, instead of values like it."""
    width = output.shape[-1]
    if labels.size == output.size:
        return False
    if output.ndim != 2 or labels.size != len(labels):
        raise TfoptError(f"labels of shape {labels.shape} do not fit its output of shape {output.shape}")
    if labels.min() < 0 or labels.max() >= width:
        raise TfoptError(f"labels go from {labels.min()} to {labels.max()}, and its output has {width} classes")
    return True


def _relative_error(variance: float) -> Callable[[Any, Any], Any]:
    import tensorflow as tf

    return lambda wanted, got: tf.reduce_mean(tf.square(wanted - got), axis=-1) / variance


def _quantized(model: Any) -> Any:
    """TFMOT's model, of a clone: it changes the model that it is given."""
    import tensorflow_model_optimization as tfmot
    import tf_keras

    if not getattr(model, "_is_graph_network", False):
        raise TfoptError("TFMOT refuses it: it is a subclassed model, neither Sequential nor Functional")
    try:
        clone = tf_keras.models.clone_model(model)
        clone.set_weights(model.get_weights())
        qat = tfmot.quantization.keras.quantize_model(clone)
    except Exception as error:  # TFMOT refuses by exceptions of many kinds
        raise TfoptError(f"TFMOT refuses it: {_sentence(error)}") from error
    for layer in qat.layers:
        inner = getattr(layer, "layer", layer)
        if isinstance(inner, tf_keras.layers.BatchNormalization):
            inner.call = _as_served(inner.call)
    return qat


def _sentence(error: Exception) -> str:
    """The first sentence of a message: what follows explains how to write code."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.split(r"[.!] (?=[A-Z])", text)[0].rstrip(".")[:300]


def _as_served(call: Callable[..., Any]) -> Callable[..., Any]:
    def answer(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        return call(inputs, training=False)

    return answer


def _calibrate(qat: Any, inputs: list[np.ndarray], batch_size: int) -> None:
    """Sets the range of every activation to the least and most that rows give it, and those of weights to theirs."""
    import tensorflow as tf
    from tensorflow_model_optimization.python.core.quantization.keras import quant_ops

    seen: dict[Any, tuple[Any, Any, float, float]] = {}

    def observe(x: Any, min_var: Any, max_var: Any, **_: Any) -> Any:
        _, _, low, high = seen.get(min_var.ref(), (None, None, 0.0, 0.0))
        low, high = min(low, float(tf.reduce_min(x))), max(high, float(tf.reduce_max(x)))
        seen[min_var.ref()] = (min_var, max_var, low, high)
        return x

    of_weights = quant_ops.LastValueQuantize

    def measured(*args: Any, **options: Any) -> Any:
        return of_weights(*args, **{**options, "is_training": True})

    patched: dict[str, Any] = {
        "MovingAvgQuantize": observe,
        "AllValuesQuantize": observe,
        "LastValueQuantize": measured,
    }
    with mock.patch.multiple(quant_ops, **patched):
        for start in range(0, len(inputs[0]), batch_size):
            batch = [tf.constant(array[start : start + batch_size]) for array in inputs]
            qat(batch if len(batch) > 1 else batch[0], training=False)
    for min_var, max_var, low, high in seen.values():
        min_var.assign(low)
        max_var.assign(max(high, low + 1e-6))


def _save(qat: Any, ends: dict[str, tuple[list[str], list[str]]], destination: str) -> None:
    """Writes a SavedModel with the names of the original's signatures; tf.Module, since Keras cannot reload its own."""
    import tensorflow as tf

    holder = tf.Module()
    holder.held = qat.variables
    signatures = {}
    for signature, (inputs, outputs) in ends.items():

        def serve(inputs: list[str] = inputs, outputs: list[str] = outputs, **given: Any) -> dict[str, Any]:
            fed = [given[name] for name in inputs]
            answers = tf.nest.flatten(qat(fed if len(fed) > 1 else fed[0], training=False))
            return dict(zip(outputs, answers, strict=True))

        specs = {n: tf.TensorSpec(t.shape, t.dtype, n) for n, t in zip(inputs, qat.inputs, strict=True)}
        signatures[signature] = tf.function(serve).get_concrete_function(**specs)
    tf.saved_model.save(holder, destination, signatures=signatures)
