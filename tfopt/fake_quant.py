"""Quantization written into the graph, as TensorFlow's own fake-quant ops: what training sees and the converter reads.

    q(x) = s round((clip(x, min, max) - min) / s) + min    s = (max - min) / (2^b - 1)

with min and max nudged so that zero is a step (tf.quantization.fake_quant_with_min_max_vars). Weights are narrow:
2^b - 2 steps, symmetric around zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import tensorflow as tf

from tfopt.calibration import cluster_scale, weight_scale
from tfopt.graph import Graph, make_node, split
from tfopt.invariants import has_one_table
from tfopt.model import Model
from tfopt.quantization_sites import DEPTHWISE, TENSOR, Sites, Weight

PER_TENSOR, PER_CHANNEL = "FakeQuantWithMinMaxVars", "FakeQuantWithMinMaxVarsPerChannel"
OPS = (PER_TENSOR, PER_CHANNEL)
ACTIVATION_BITS = 8


def insert(
    model: Model,
    where: Sites,
    ranges: Mapping[str, tuple[float, float]],
    bits: Mapping[str, int] | int = 8,
    method: str = "max",
    skip: Collection[str] = (),
) -> None:
    """Puts fake-quant ops at sites of a model, in place.

    Args:
      model: the model that the sites were found in; weights that get one become weights of the model whatever their
        size, so that nothing folds the quantization away.
      where: the sites.
      ranges: reference of an activation -> (low, high); those that the specification fixes need none.
      bits: of the weights of linear ops, by node, or one number for all. Other constants have 8, as
        have weights whose kernel takes no other.
      method: how the scale of weights is found, see `weight_scale`.
      skip: linear nodes that stay in float: their weights get none.
    """
    graph = model.graph
    limits = {ref: fixed or ranges[ref] for ref, fixed in where.activations.items() if fixed or ref in ranges}
    for group in where.tied:
        known = [limits[ref] for ref in group if ref in limits]
        if known:
            union = (min(low for low, _ in known), max(high for _, high in known))
            limits.update(dict.fromkeys(group, union))
    done: dict[tuple[str, str, int], str] = {}
    for weight in where.weights:
        if weight.node in skip:
            continue
        width = (bits if isinstance(bits, int) else bits.get(weight.node, 8)) if weight.linear and weight.low else 8
        key = (weight.ref, weight.layout, width)
        if key not in done:
            done[key] = _weight(graph, weight, width, method)
        graph.set_input(weight.node, weight.index, done[key])
    shared: dict[frozenset[str], tuple[str, str]] = {}  # a group has one range, also while it is trained
    for ref, (low, high) in limits.items():
        group = next((group for group in where.tied if ref in group), frozenset([ref]))
        if group not in shared:
            shared[group] = _limits(graph, f"{split(ref)[0]}/fake_quant", low, high)
        _activation(graph, ref, shared[group])


def _activation(graph: Graph, ref: str, limits: tuple[str, str]) -> None:
    name, port = split(ref)
    users = [(user, index) for user, index, used in graph.uses(name) if used == port]
    labels = [label for label, output in graph.outputs.items() if output == ref]
    quantized = _add(graph, f"{name}/fake_quant" + (f"_{port}" if port else ""), ref, limits, ACTIVATION_BITS, False)
    for user, index in users:
        graph.set_input(user, index, quantized)
    for label in labels:
        graph.outputs[label] = quantized


def _weight(graph: Graph, weight: Weight, bits: int, method: str) -> str:
    """Adds the fake quantization of a constant; returns the reference to the quantized constant."""
    value = graph.constant(weight.ref)
    assert value is not None
    name = split(weight.ref)[0]
    while graph.nodes[name].op == "Identity":
        name = split(graph.nodes[name].input[0])[0]
    hint = f"{name}/fake_quant"
    if weight.layout == DEPTHWISE:
        # [h, w, channels, multiplier]: an output channel is one pair of the last two axes, held as one axis.
        flat = value.reshape(*value.shape[:2], -1)
        name = add_weight(graph, f"{name}/flat", flat)
    elif name not in graph.weights:
        _hold(graph, name, value)
    if not weight.linear:
        limits = _limits(graph, hint, min(float(value.min()), 0.0), max(float(value.max()), 1e-6))
        return _add(graph, hint, name, limits, 8, False)
    held = graph.weights[name]
    scale = weight_limit(weight, held, bits, method)
    quantized = _add(graph, hint, name, _limits(graph, hint, -scale, scale), bits, True)
    if weight.layout != DEPTHWISE:
        return quantized
    shape = graph.add_constant(f"{hint}/shape", np.array(value.shape, np.int32))
    return graph.add_op(f"{hint}/kernel", "Reshape", [quantized, shape], T=tf.float32, Tshape=tf.int32)


def weight_limit(weight: Weight, held: np.ndarray, bits: int, method: str) -> np.ndarray:
    """The m of [-m, m], the range of a weight; see `weight_scale`.

    A clustered kernel has one in 8 bits: its few values are as few in the file then, where a scale for each channel
    would make others of them in each. In 4 bits there are no more than 15 anyway.

    Args:
      weight: what it is.
      held: its value, in the shape that is quantized.
      bits, method: as `weight_scale` takes them.

    Returns:
      float32, one for each place of the last axis, or one in all.
    """
    if bits == 8 and weight.linear and has_one_table(held):
        return cluster_scale(held)
    return weight_scale(held, None if weight.layout == TENSOR else held.ndim - 1, bits, method)


def add_weight(graph: Graph, hint: str, value: np.ndarray) -> str:
    """Adds a weight whatever its size, see `_hold`; returns its name."""
    return _hold(graph, graph.add(make_node(graph.unique_name(hint), "NoOp")), value)


def _hold(graph: Graph, name: str, value: np.ndarray) -> str:
    """Makes a node a weight whatever its size: a Const node would be folded together with its fake quantization."""
    graph.replace(make_node(name, "Placeholder", dtype=tf.float32, shape=tuple(value.shape)))
    graph.weights[name] = np.ascontiguousarray(value).reshape(value.shape)  # a scalar would come back as a vector
    return name


def _limits(graph: Graph, hint: str, low: float | np.ndarray, high: float | np.ndarray) -> tuple[str, str]:
    least, most = (np.asarray(limit, np.float32) for limit in (low, high))
    return graph.add_constant(f"{hint}/min", least), graph.add_constant(f"{hint}/max", most)


def _add(graph: Graph, hint: str, ref: str, limits: tuple[str, str], bits: int, narrow: bool) -> str:
    held = graph.constant(limits[0])
    op = PER_CHANNEL if held is not None and held.ndim else PER_TENSOR
    return graph.add_op(hint, op, [ref, *limits], num_bits=bits, narrow_range=narrow)


def strip(model: Model, snap: bool = False) -> Model:
    """A copy of a model without fake-quant ops.

    Args:
      model: left as it is.
      snap: whether weights become what they are after quantization, instead of what is held; activations are as they
        were computed.
    """
    stripped = model.copy()
    graph = stripped.graph
    for node in [node for node in graph.nodes.values() if node.op in OPS]:
        name = split(node.input[0])[0]
        value = graph.constant(node.input[0])
        if value is not None and snap:
            value = quantized_value(graph, node.name)
            graph.weights[name] = value
        for user in graph.users(node.name):
            if value is not None and graph.nodes[user].op == "Reshape":  # a depthwise kernel, held flat
                shape = graph.constant(graph.nodes[user].input[1])
                graph.set_constant(user, value.reshape(shape))
        graph.redirect(node.name, node.input[0])
    graph.sweep()
    return stripped


def quantized_value(graph: Graph, name: str) -> np.ndarray:
    """What a fake-quant node makes of a constant."""
    node = graph.nodes[name]
    value, low, high = (graph.constant(ref) for ref in node.input[:3])
    compute = getattr(tf.raw_ops, node.op)
    options = {"num_bits": node.attr["num_bits"].i, "narrow_range": node.attr["narrow_range"].b}
    return compute(inputs=value, min=low, max=high, **options).numpy()


def is_quantized(model: Model) -> bool:
    """Whether a model holds fake-quant ops."""
    return any(node.op in OPS for node in model.graph.nodes.values())
