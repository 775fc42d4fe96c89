"""Weight clustering by TFMOT, of a Keras 2 model: each kernel holds few distinct values, which are trained.

w = c[a]    a = the nearest centroid; a centroid of zero stays zero where the kernel was pruned
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfopt.errors import TfoptError
from tfopt.invariants import is_sparse
from tfopt.tfmot.keras_model import layers, refusing, wrapped
from tfopt.tfmot.train import Training

# As tfopt calls them -> as TFMOT's CentroidInitialization does.
INITS = {"linear": "LINEAR", "density": "DENSITY_BASED", "kmeans++": "KMEANS_PLUS_PLUS"}
DEFAULT_INIT = "kmeans++"


def cluster(student: Any, training: Training | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Clusters the kernels that TFMOT clusters, in place, and trains the centroids.

    Args:
      student: the Keras model.
      training: None: clusters without training.
      options: `clusters`, how many distinct values; `init`, one of INITS; `per_channel`, for Conv2D; `skip`, a regular
        expression for layers; `embeddings`, whether they are clustered too.

    Returns:
      `kernels`, name -> its distinct values and its size; `refused`, name of a layer -> reason; what `Training.run`
      gives.

    Raises:
      TfoptError: TFMOT refuses the model, or it cannot be trained.
    """
    import tensorflow_model_optimization as tfmot
    from tensorflow_model_optimization.python.core.clustering.keras.clustering_registry import ClusteringRegistry
    from tensorflow_model_optimization.python.core.clustering.keras.experimental.cluster import cluster_weights

    init = tfmot.clustering.keras.CentroidInitialization[INITS[options["init"]]]
    refused: dict[str, str] = {}
    chosen: set[str] = set()

    skipped = re.compile(options["skip"]) if options["skip"] else None

    def reason(layer: Any, kernels: list[Any]) -> str | None:
        """Why a layer with kernels stays as it is."""
        if skipped and skipped.match(layer.name):
            return "it stays as it is, as skip wants it"
        if type(layer).__name__ == "Embedding" and not options["embeddings"]:
            return "a table that is looked up; embeddings clusters it too"
        known = ClusteringRegistry._LAYERS_WEIGHTS_MAP  # of a recurrent layer it is the cells that are known
        if not ClusteringRegistry.supports(layer) or not known.get(type(layer), ["cells"]):
            return f"TFMOT does not cluster {type(layer).__name__}"
        if min(math.prod(weight.shape) for weight in kernels) <= options["clusters"]:
            return f"a kernel of it has no more than {options['clusters']} weights"
        return None

    def wrap(layer: Any) -> Any:
        kernels = [weight for weight in layer.trainable_weights if len(weight.shape) > 1]
        if not kernels:
            return layer
        why = reason(layer, kernels)
        if why:
            refused[layer.name] = why
            return layer
        chosen.add(layer.name)
        return cluster_weights(
            layer,
            number_of_clusters=options["clusters"],
            cluster_centroids_init=init,
            preserve_sparsity=any(is_sparse(weight.numpy()) for weight in kernels),
            cluster_per_channel=options["per_channel"],
        )

    model = wrapped(student, wrap)
    if skipped and not any("skip" in why for why in refused.values()):
        raise TfoptError(f"skip={options['skip']!r} matches no layer that has a kernel")
    found: dict[str, Any] = {}
    with refusing():
        if training and training.steps and chosen:
            found = training.run(model)
        student.set_weights(tfmot.clustering.keras.strip_clustering(model).get_weights())
    kernels = {}
    for layer in layers(student):
        for weight in layer.trainable_weights:
            if layer.name in chosen and len(weight.shape) > 1:
                value = weight.numpy()
                kernels[f"{layer.name}/{weight.name}"] = len(np.unique(value)), value.size
    return {**found, "kernels": kernels, "refused": refused}
