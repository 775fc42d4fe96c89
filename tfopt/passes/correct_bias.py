"""correct_bias: moves each layer's bias by the mean error that quantized weights bring to its output.

    b' = b - (E[y_q] - E[y])      y = W x + b,   y_q the same with quantized weights and what came before them quantized

per output channel, over representative rows, layer by layer from the input to the output, so that each sees what the
correction of those before it left (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", ICCV 2019, section 4.2, with means that are measured). Rounding errors of one weight are the same for every
row: where activations are not centred (after a ReLU), much of the error of a layer is its mean.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.calibration import values
from tfopt.data import Dataset
from tfopt.fake_quant import insert, strip
from tfopt.graph import infer_shapes, split
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.quantization_sites import sites
from tfopt.rewrite import Log, Refused
from tfopt.rules.absorb import bias_after
from tfopt.rules.constants import attr
from tfopt.rules.emit import add_bias
from tfopt.rules.linear import CONVOLUTIONS, LINEAR_OPS, TRANSPOSED, Linear, linear, refine_shapes
from tfopt.rules.view import View

# A mean over this many rows is settled: the quantized and the float model see the same ones.
_ROWS = 256

_BIASES = ("BiasAdd", "Add", "AddV2")


@dataclasses.dataclass(frozen=True)
class _Bias:
    """The bias of a layer: operand `index` of `node`; along `axis` of the result, or aligned right (None)."""

    layer: str
    node: str
    index: int
    axis: int | None


def correct(model: Model, signature: str, rows: Dataset, log: Log) -> None:
    """Corrects the biases of a model with fake-quant ops, in place; a layer without a bias gets one.

    Args:
      model: with fake quantization of its weights, and of its activations or not (see `tfopt.fake_quant`).
      signature: the one that the rows are of.
      rows: representative rows.
      log: takes what was corrected, and what not.
    """
    rows = rows.take(slice(0, _ROWS))
    biases = _biases(model, signature, log)
    reference = strip(model)
    names = [bias.node for bias in biases]
    wanted = _means(reference, signature, biases, rows)
    largest = 0.0
    for bias, name in zip(biases, names, strict=True):
        mean, size = wanted[name]
        error = _means(model, signature, [bias], rows)[name][0] - mean
        graph = model.graph
        old = graph.constant(graph.nodes[name].input[bias.index])
        assert old is not None
        ref = graph.add_constant(f"{name}/corrected", (old - error).astype(old.dtype))
        graph.set_input(name, bias.index, ref)
        log.applied[f"bias of {graph.nodes[bias.layer].op}"] += 1
        if size:
            largest = max(largest, float(np.sqrt(np.mean(error**2))) / size)
    model.graph.sweep()
    if biases:
        log.notes.append(f"mean errors of up to {largest:.1%} of the size of a layer's output, on {len(rows)} rows")


def _biases(model: Model, signature: str, log: Log) -> list[_Bias]:
    """The biases of all layers that the signature computes, in the order of the computation."""
    plain = strip(model)
    view = View(plain.graph, infer_shapes(plain.graph, plain.library()), {}, plain.library())
    refine_shapes(view)
    labels = [label for label in plain.graph.outputs if label.startswith(f"{signature}:")]
    live = plain.graph.reachable(split(plain.graph.outputs[label])[0] for label in labels)
    found = []
    for node in plain.graph.topological():
        form = linear(view, node) if node.op in LINEAR_OPS and node.name in live else None
        if form is None or form.x is None:
            continue
        try:
            name = bias_after(view, node)
            found.append(_added(model, view, node, form) if name is None else _known(model, view, node.name, name))
        except Refused as refusal:
            log.refused["correct_bias", node.name] = str(refusal)
    return found


def _known(model: Model, view: View, layer: str, name: str) -> _Bias:
    """The bias that a node adds to a layer."""
    node = view.graph.nodes[name]
    if node.op not in _BIASES:
        raise Refused(f"{node.op} {name!r} is no plain bias: fold_affine makes one of it")
    constant = [index for index, ref in enumerate(node.input[:2]) if view.graph.constant(ref) is not None]
    if len(constant) != 1 or model.graph.constant(model.graph.nodes[name].input[constant[0]]) is None:
        raise Refused(f"the bias that {name!r} adds is quantized itself")
    first = node.op == "BiasAdd" and attr(node, "data_format").s == b"NCHW"
    return _Bias(layer, name, constant[0], 1 if first else None)


def _added(model: Model, view: View, node: NodeDef, form: Linear) -> _Bias:
    """A bias of zeros for a layer that has none, added to the model itself."""
    shape = view.shape(node.name)
    axis = len(shape or ()) - 1 if form.channel is None else form.channel
    if shape is None or shape[axis] is None or node.op not in {*CONVOLUTIONS, *TRANSPOSED, "MatMul"}:
        raise Refused("it has no bias, and none can be added to it")
    zeros = np.zeros([(size or 1) if a == axis else 1 for a, size in enumerate(shape)])
    name = model.graph.unique_name(f"{node.name}/bias")
    dtype = tf.as_dtype(attr(node, "T").type).as_numpy_dtype
    add_bias(View(model.graph, view.shapes), node.name, zeros.astype(dtype))()
    first = model.graph.nodes[name].op == "BiasAdd" and axis < len(shape) - 1
    return _Bias(node.name, name, 1, axis if first else None)


def _means(model: Model, signature: str, biases: list[_Bias], rows: Dataset) -> Mapping[str, tuple[np.ndarray, float]]:
    """Of each biased result, the mean in the shape of the bias, and the root mean square of all."""
    shapes = {}
    for bias in biases:
        value = model.graph.constant(model.graph.nodes[bias.node].input[bias.index])
        assert value is not None
        shapes[bias.node] = value.shape
    sums: dict[str, np.ndarray] = {}
    squares = dict.fromkeys(shapes, 0.0)
    counts = dict.fromkeys(shapes, 0)
    for _, tensors in values(model, signature, list(shapes), rows):
        for bias in biases:
            array, shape = tensors[bias.node], shapes[bias.node]
            after = array.ndim - 2 if bias.axis == 1 else 0
            wide = (*[1] * (array.ndim - len(shape) - after), *shape, *[1] * after)
            axes = tuple(a for a in range(array.ndim) if wide[a] == 1)
            total = array.sum(axis=axes, dtype=np.float64, keepdims=True).reshape(shape)
            sums[bias.node] = sums.get(bias.node, np.zeros(shape)) + total
            squares[bias.node] += float(np.square(array, dtype=np.float64).sum())
            counts[bias.node] += array.size
    return {
        name: (sums[name] * max(np.prod(shape), 1) / counts[name], float(np.sqrt(squares[name] / counts[name])))
        for name, shape in shapes.items()
    }


def run(model: Model, log: Log, data: Data, bits: int = 8, method: str = "max") -> None:
    """Corrects the biases of a float model for weights that will be quantized later, in place."""
    rows = data.need_rows("correct_bias")
    where = sites(model)
    weights = tuple(weight for weight in where.weights if weight.linear)
    insert(model, dataclasses.replace(where, weights=weights, activations={}, tied=()), {}, bits, method)
    correct(model, data.signature, rows, log)
    model.graph = strip(model).graph


PASS = Pass(
    "correct_bias", run, options={"bits": 8, "method": "max"}, needs=("fold_affine",), lossless=False, learns=True
)
