"""Batch norms folded into the layers before them, in a Keras 2 model.

    g (x W + b - m) / sqrt(v + e) + h  =  x (W s) + (b - m) s + h    s = g / sqrt(v + e)

A kernel that is clustered and folded afterwards has its clusters once for every output channel; folded before, it has
them once. Depthwise kernels stay: TFMOT neither prunes nor clusters them, and gives each one scale, which channels of
like size need.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from tfopt.tfmot.keras_model import clone, refusing


def fold_batch_norms(model: Any) -> Any:
    """A copy of a model, without the batch norms that follow a convolution or a dense layer.

    Args:
      model: Sequential or Functional; stays as it is.
    """
    pairs = _pairs(model)
    folded = copied(model, pairs)
    for layer, norm in pairs.items():
        weights = model.get_layer(layer).get_weights()
        folded.get_layer(layer).set_weights(_folded(weights, model.get_layer(norm)))
    return folded


def copied(model: Any, pairs: Mapping[str, str] = MappingProxyType({})) -> Any:
    """A copy of a model without regularizers: what the teacher says regularizes.

    Args:
      model: Sequential or Functional; stays as it is.
      pairs: name of a layer -> name of a batch norm behind it, which is left out; the layer then has initial weights.
    """
    with refusing():
        config = model.get_config()
        if not pairs and not _regularized(config):
            return clone(model)
        gone = {norm: layer for layer, norm in pairs.items()}
        kept = []
        for layer in config["layers"]:
            name = layer["config"]["name"]
            if name in gone:
                continue
            changed = {"use_bias": True} if name in pairs else {}
            nodes = {"inbound_nodes": _renamed(layer["inbound_nodes"], gone)} if "inbound_nodes" in layer else {}
            kept.append({**layer, **nodes, "config": {**_plain(layer["config"]), **changed}})
        custom = {type(layer).__name__: type(layer) for layer in model.layers}
        made = type(model).from_config({**config, "layers": kept}, custom_objects=custom)
        for layer in made.layers:
            if layer.name not in pairs:
                layer.set_weights(model.get_layer(layer.name).get_weights())
    return made


def _pairs(model: Any) -> dict[str, str]:
    """Name of a layer -> name of the batch norm that folds into it."""
    from tf_keras import layers

    found = {}
    for layer in model.layers:
        if type(layer) not in (layers.Conv1D, layers.Conv2D, layers.Dense) or len(layer.inbound_nodes) != 1:
            continue
        users = [node.outbound_layer for node in layer.outbound_nodes]
        if len(users) != 1 or type(users[0]) is not layers.BatchNormalization or len(users[0].inbound_nodes) != 1:
            continue
        (norm,) = users
        linear = layer.activation.__name__ == "linear"
        last = getattr(layer, "data_format", "channels_last") == "channels_last"
        if linear and last and list(norm.axis) == [len(norm.output_shape) - 1] and norm.name not in model.output_names:
            found[layer.name] = norm.name
    return found


def _folded(weights: list[np.ndarray], norm: Any) -> list[np.ndarray]:
    """Kernel and bias of a layer that does the work of the batch norm behind it, too."""
    mean, variance = (value.numpy().astype(np.float64) for value in (norm.moving_mean, norm.moving_variance))
    scale = (norm.gamma.numpy() if norm.scale else 1.0) / np.sqrt(variance + norm.epsilon)
    bias = (weights[1] if len(weights) > 1 else 0.0) - mean
    shift = norm.beta.numpy() if norm.center else 0.0
    return [(weights[0] * scale).astype(weights[0].dtype), (bias * scale + shift).astype(weights[0].dtype)]


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """References to layers, [name, node, tensor, ...], wherever they stand, with other names."""
    if isinstance(value, dict):
        return {key: _renamed(item, names) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        return value
    name = [names[value[0]]] if value and isinstance(value[0], str) and value[0] in names else []
    return [*name, *(_renamed(item, names) for item in value[len(name) :])]


def _plain(config: Any) -> Any:
    """A configuration without regularizers."""
    if isinstance(config, dict):
        return {key: None if key.endswith("_regularizer") else _plain(value) for key, value in config.items()}
    return [_plain(value) for value in config] if isinstance(config, list) else config


def _regularized(config: Any) -> bool:
    if isinstance(config, dict):
        return any((value and key.endswith("_regularizer")) or _regularized(value) for key, value in config.items())
    return isinstance(config, list) and any(map(_regularized, config))
