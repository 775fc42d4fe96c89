"""TFMOT's compression of the Keras 2 twin, as its guides do it: one recipe into one .tflite file, in a child process.

    python -m benchmarks.compression_peers --recipe=prune80 --path=/tmp/x.tflite --json=/tmp/x.json

Rows, epochs, batch, Adam and the highest rate of every training are those of tfopt's recipe, the rate a cosine. The
twin keeps its dropout in training.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.children import one_line
from benchmarks.compression_cases import BESIDE_TFMOT, BESIDE_TFMOT_SUBJECT, EPOCHS
from benchmarks.compression_subjects import Subject, subject
from benchmarks.fashion_nets import COMPRESSED
from benchmarks.models import CACHE, SEED


def _twin() -> Any:
    """Returns the net in Keras 2, with the weights that it was trained to."""
    import keras
    import tf_keras

    model = COMPRESSED[BESIDE_TFMOT_SUBJECT](tf_keras)
    trained = keras.models.load_model(CACHE / f"{BESIDE_TFMOT_SUBJECT}.keras", compile=False)
    model.set_weights(trained.get_weights())
    return model


def _fit(model: Any, found: Subject, step: dict[str, Any], callbacks: tuple = ()) -> int:
    """Trains on the labels; returns the number of steps."""
    import tf_keras

    stored = np.load(found.train)
    images, labels, size = stored[found.key], stored["label"], step["batch_size"]
    steps = step["epochs"] * -(-len(images) // size)
    rate = tf_keras.optimizers.schedules.CosineDecay(step["learning_rate"], steps)
    model.compile(tf_keras.optimizers.Adam(rate), loss="sparse_categorical_crossentropy")
    model.fit(images, labels, batch_size=size, epochs=step["epochs"], verbose=0, callbacks=list(callbacks))
    return steps


def _pruned(model: Any, found: Subject, step: dict[str, Any]) -> Any:
    import tensorflow_model_optimization as tfmot

    sparsity = tfmot.sparsity.keras
    steps = step["epochs"] * -(-len(np.load(found.train)["label"]) // step["batch_size"])
    if "pattern" in step:
        options = {"pruning_schedule": sparsity.ConstantSparsity(0.5, 0), "sparsity_m_by_n": (2, 4)}
    else:
        final = step["sparsity"]
        options = {"pruning_schedule": sparsity.PolynomialDecay(0.0, final, 0, steps // 2)}
    pruned = sparsity.prune_low_magnitude(model, **options)
    _fit(pruned, found, step, (sparsity.UpdatePruningStep(),))
    return sparsity.strip_pruning(pruned)


def _clustered(model: Any, found: Subject, step: dict[str, Any], sparse: bool) -> Any:
    import tensorflow_model_optimization as tfmot
    from tensorflow_model_optimization.python.core.clustering.keras.experimental import cluster

    clustering = tfmot.clustering.keras
    options = {
        "number_of_clusters": step["clusters"],
        "cluster_centroids_init": clustering.CentroidInitialization.KMEANS_PLUS_PLUS,
    }
    clustered = (
        cluster.cluster_weights(model, preserve_sparsity=True, **options)
        if sparse
        else clustering.cluster_weights(model, **options)
    )
    _fit(clustered, found, step)
    return clustering.strip_clustering(clustered)


def _quantized(model: Any, found: Subject, step: dict[str, Any]) -> Any:
    """PCQAT: quantization-aware training that keeps zeros and clusters."""
    import tensorflow_model_optimization as tfmot

    quantization = tfmot.quantization.keras
    annotated = quantization.quantize_annotate_model(model)
    scheme = tfmot.experimental.combine.Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=True)
    quantized = quantization.quantize_apply(annotated, scheme)
    _fit(quantized, found, step)
    return quantized


def _make(recipe: str, path: Path) -> str:
    """Writes the file; returns a note."""
    import tensorflow as tf
    import tensorflow_model_optimization  # noqa: F401 - before a model of Keras 2 is made
    import tf_keras

    tf_keras.utils.set_random_seed(SEED)
    found, model = subject(BESIDE_TFMOT_SUBJECT), _twin()
    steps, kind = BESIDE_TFMOT[recipe]
    done = []
    for step in steps:
        if step["pass"] == "distill":
            continue
        if step["pass"] == "prune_magnitude":
            model = _pruned(model, found, step)
        elif step["pass"] == "cluster":
            model = _clustered(model, found, step | {"epochs": EPOCHS}, sparse="prune_magnitude" in done)
        else:
            model = _quantized(model, found, step)
        done.append(step["pass"])
    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    if kind == "int8":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(converter.convert())
    kernels = [x for x in model.get_weights() if x.ndim > 1 and x.size > 100]
    zeros = sum(int((x == 0).sum()) for x in kernels) / sum(x.size for x in kernels)
    return f"{zeros:.1%} zeros"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, choices=BESIDE_TFMOT)
    parser.add_argument("--path", required=True)
    parser.add_argument("--json", required=True)
    arguments = parser.parse_args()
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    try:
        answer = {"path": arguments.path, "note": _make(arguments.recipe, Path(arguments.path))}
    except Exception as error:  # whatever a tool raises is its result
        answer = {"error": one_line(error)}
    Path(arguments.json).write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
