"""Quantization-aware training by TFMOT, of a Keras 2 model: QAT, PQAT, CQAT, PCQAT.

    min over W of  loss(f(q(W)), t)     zeros of a pruned kernel stay, and so do the clusters of a clustered one

TFMOT starts the range of every activation at [-6, 6], and moves it by a thousandth of the difference at each step:
thousands of steps later it fits. Here the ranges start from what the rows give. Batch norms keep the statistics that
they will be served with. What a kernel is to keep is read from its own values: TFMOT's schemes are for a whole model,
and the one for zeros and clusters gives up the zeros of all kernels where one has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

import numpy as np

from tfopt import invariants
from tfopt.tfmot.keras_model import clone, refusing
from tfopt.tfmot.train import Training

_CALIBRATION_ROWS = 256


def quantize(student: Any, training: Training, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Quantizes a clone, and trains it.

    Args:
      student: the Keras model; stays as it is.
      training: with rows.
      options: none.

    Returns:
      The clone, with fake-quant ops; `kept`, what -> the number of kernels that keep it, and what `Training.run` gives.

    Raises:
      TfoptError: TFMOT refuses the model, or it cannot be trained.
    """
    kept: dict[str, int] = {}
    with refusing():
        model = _quantized(student, kept)
        _calibrate(model, training.examples.few(_CALIBRATION_ROWS))
        found = training.run(model, statistics=False)
        _settle(model)
    return model, {**found, "kept": kept}


def _quantized(student: Any, kept: dict[str, int]) -> Any:
    import tensorflow_model_optimization as tfmot
    from tensorflow_model_optimization.python.core.quantization.keras.collab_opts.cluster_preserve import (
        cluster_preserve_quantize_registry as clusters,
    )
    from tensorflow_model_optimization.python.core.quantization.keras.collab_opts.prune_preserve import (
        prune_preserve_quantize_registry as zeros,
    )
    from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import (
        default_8bit_quantize_registry as plain,
    )
    from tensorflow_model_optimization.python.core.quantization.keras.default_8bit import (
        default_8bit_quantize_scheme as scheme,
    )

    class EachItsOwn(plain.Default8BitQuantizeRegistry):
        """Asks the registry that fits a layer."""

        def get_quantize_config(self, layer: Any) -> Any:
            values = [weight.numpy() for weight in layer.trainable_weights]
            sparse, clustered = (
                any(map(invariants.is_sparse, values)),
                any(invariants.clusters(v) is not None for v in values),
            )
            if not (sparse or clustered) or not zeros.PrunePreserveQuantizeRegistry.supports(layer):
                return super().get_quantize_config(layer)
            what = " and ".join(["zeros"] * sparse + ["clusters"] * clustered)
            kept[what] = kept.get(what, 0) + 1
            if not clustered:
                return zeros.Default8bitPrunePreserveQuantizeRegistry().get_quantize_config(layer)
            config = clusters.Default8bitClusterPreserveQuantizeRegistry(sparse).get_quantize_config(layer)
            if any(
                map(invariants.has_one_table, values)
            ):  # one scale: of its own, each channel would make other values of them
                config.weight_quantizer = clusters.ClusterPreserveDefault8BitWeightsQuantizer(sparse)
            return config

    class Scheme(scheme.Default8BitQuantizeScheme):
        def get_quantize_registry(self) -> Any:
            return EachItsOwn()

    own = clusters.get_centroids

    def centroids(layer: Any, weight: Any, data_format: Any) -> Any:
        """Clusters of the whole kernel where it has them: TFMOT makes them each channel's own where it can."""
        import tensorflow as tf

        if not invariants.has_one_table(weight.numpy()):
            return own(layer, weight, data_format)
        values, index = clusters.get_unique(weight)
        return values, tf.size(values), index, False

    annotated = tfmot.quantization.keras.quantize_annotate_model(clone(student))
    with mock.patch.object(clusters, "get_centroids", centroids), _relu_behind_kernels():
        return tfmot.quantization.keras.quantize_apply(annotated, scheme=Scheme())


def _relu_behind_kernels() -> Any:
    """A context in which a ReLU layer takes the range of the kernel's output alone: TFMOT takes the kernel's own too.

    Its transform was made for Add, which has no kernel, and matches Conv2D, DepthwiseConv2D and Dense as well.
    """
    from tensorflow_model_optimization.python.core.quantization.keras import quantize_aware_activation, utils
    from tensorflow_model_optimization.python.core.quantization.keras.default_8bit.default_8bit_transforms import (
        LayerReLUQuantize,
    )

    replacement, custom_objects = LayerReLUQuantize.replacement, LayerReLUQuantize.custom_objects
    nothing = quantize_aware_activation.NoOpActivation

    def replace(self: Any, relu: Any) -> Any:
        config = relu.input_layers[0].layer["config"]
        if "activation" not in config:  # Add
            return replacement(self, relu)
        if config["activation"] == "linear" and relu.input_layers[0].metadata.get("quantize_config") is None:
            config["activation"] = utils.serialize_activation(nothing(), use_legacy_format=True)
        return relu

    return mock.patch.multiple(
        LayerReLUQuantize,
        replacement=replace,
        custom_objects=lambda self: {**custom_objects(self), "NoOpActivation": nothing},
    )


def _calibrate(model: Any, inputs: list[np.ndarray]) -> None:
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
        for start in range(0, len(inputs[0]), 64):
            batch = [tf.constant(array[start : start + 64]) for array in inputs]
            model(batch if len(batch) > 1 else batch[0], training=False)
    for min_var, max_var, low, high in seen.values():
        min_var.assign(low)
        max_var.assign(max(high, low + 1e-6))


def _settle(model: Any) -> None:
    """Makes kernels what training made of them, so that no mask stays in the graph."""
    from tensorflow_model_optimization.python.core.quantization.keras import quantizers

    for layer in model.layers:
        for index, (weight, quantizer, ranges) in enumerate(getattr(layer, "_weight_vars", [])):
            if "sparsity_mask" in ranges:
                weight.assign(weight * ranges["sparsity_mask"])
            last = quantizers.LastValueQuantizer(
                quantizer.num_bits, quantizer.per_axis, quantizer.symmetric, quantizer.narrow_range
            )
            if "sparsity_mask" in ranges or "cluster_centroids_tf" in ranges:
                layer._weight_vars[index] = weight, last, ranges
