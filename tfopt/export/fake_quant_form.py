"""A graph with fake-quant ops, in the form that TensorFlow's converter reads.

    x W  =  reshape(conv(reshape(x, [1, rows, 1, in]), W as [1, 1, in, out]))

It gives a matrix product one scale for all of its weights, and fails where it finds more; a convolution has one for
each output channel, in every version of the runtime. In loops it fails as well: their matrices become floats on their
grid. A bias whose values are all equal gets the scale of the first channel: one value is moved by the least there is.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.fake_quant import OPS, PER_CHANNEL, add_weight, quantized_value
from tfopt.graph import Graph, infer_shapes, join, make_node, split
from tfopt.model import Model
from tfopt.quantization_sites import BODIES, PRODUCTS

_FOLLOW = ("BiasAdd", "AddV2", "Add", "Sub", "Relu", "Relu6", *OPS)  # what the kernel of a convolution does as well


def for_converter(model: Model) -> None:
    """Rewrites what it would not take, in place: dense layers become 1x1 convolutions.

    Args:
      model: with a fixed batch: the shape of a dense layer's result must be known, but for one dimension.

    Raises:
      ValueError: it is not.
    """
    graph = model.graph
    for node in list(graph.nodes.values()):
        if node.op in BODIES:
            _plain(graph, node)
        elif node.op in ("BiasAdd", "AddV2", "Add", "Sub"):
            _uneven(graph, node)
    graph.sweep()
    shapes = infer_shapes(graph, model.library())
    for node in list(graph.nodes.values()):
        if node.op not in PRODUCTS or graph.producer(node.input[1]).op != PER_CHANNEL:
            continue
        shape = shapes.get(join(node.name))
        if shape is None or shape.count(None) > 1 or shape[-1] is None:
            raise ValueError(f"dense layer {node.name!r} has the shape {shape}: its number of rows must be known")
        _dense(graph, node, [-1 if d is None else d for d in shape])


def _plain(graph: Graph, node: NodeDef) -> None:
    """Takes the fake quantization off the matrices that a loop or a branch is given; they keep to their grid."""
    for index, ref in enumerate(graph.data_inputs(node)):
        producer = graph.producer(ref)
        if producer.op in OPS and graph.constant(producer.input[0]) is not None:
            value = quantized_value(graph, producer.name)
            graph.set_input(node.name, index, add_weight(graph, f"{producer.name}/snapped", value))


def _uneven(graph: Graph, node: NodeDef) -> None:
    for index, ref in enumerate(graph.data_inputs(node)):
        value = graph.constant(ref)
        if value is None or value.dtype != np.float32 or value.size < 2:
            continue
        if value.flat[0] and (value == value.flat[0]).all():
            moved = value.copy()
            moved.flat[0] = np.nextafter(moved.flat[0], np.float32(np.inf))
            graph.set_input(node.name, index, add_weight(graph, f"{node.name}/uneven", moved))


def _dense(graph: Graph, node: NodeDef, shape: list[int]) -> None:
    quantized = graph.producer(node.input[1])
    weight = graph.weights[split(quantized.input[0])[0]]
    kernel = add_weight(graph, f"{node.name}/kernel", weight.reshape(1, 1, *weight.shape))
    attrs = {key: quantized.attr[key] for key in ("num_bits", "narrow_range")}
    inputs = [kernel, *quantized.input[1:]]
    kernel = graph.add_op(
        f"{kernel}/fake_quant", PER_CHANNEL, inputs, num_bits=attrs["num_bits"].i, narrow_range=attrs["narrow_range"].b
    )
    rows = [1, -1 if -1 in shape else math.prod(shape[:-1]), 1]
    x = node.input[0]
    if any(key in node.attr and node.attr[key].b for key in ("transpose_a", "adj_x")):
        swapped = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        swapped_ref = graph.add_constant(f"{node.name}/swapped", np.array(swapped, np.int32))
        x = graph.add_op(f"{node.name}/transposed", "Transpose", [x, swapped_ref], T=tf.float32, Tperm=tf.int32)
    x = _reshape(graph, f"{node.name}/rows", x, [*rows, weight.shape[0]])
    last = node
    while True:
        users = graph.uses(last.name)
        if len(users) != 1 or graph.output_labels(last.name) or graph.nodes[users[0][0]].op not in _FOLLOW:
            break
        user = graph.nodes[users[0][0]]
        others = [ref for ref in graph.data_inputs(user) if split(ref)[0] != last.name]
        if any(graph.constant(ref) is None for ref in others) or not _broadcasts(graph, user, others, shape[-1]):
            break
        last = user
    # The original shape comes back behind what belongs to the kernel.
    behind = [(user, index) for user, index, _ in graph.uses(last.name)]
    labels = graph.output_labels(last.name)
    back = _reshape(graph, f"{last.name}/back", last.name, shape)
    for user, index in behind:
        graph.set_input(user, index, back)
    for label in labels:
        graph.outputs[label] = back
    graph.replace(
        make_node(
            node.name, "Conv2D", [x, kernel], T=tf.float32, strides=[1, 1, 1, 1], padding="VALID", data_format="NHWC"
        )
    )


def _broadcasts(graph: Graph, node: NodeDef, others: list[str], channels: int) -> bool:
    """Whether the constants of a node are one number for a channel, so that they fit any shape."""
    values = [graph.constant(ref) for ref in others]
    return node.op in OPS or all(v is not None and v.size in (1, channels) and v.ndim <= 4 for v in values)


def _reshape(graph: Graph, hint: str, ref: str, shape: list[int]) -> str:
    target = graph.add_constant(f"{hint}/shape", np.array(shape, np.int32))
    return graph.add_op(hint, "Reshape", [ref, target], T=tf.float32, Tshape=tf.int32)
