"""correct_bias: moves each layer's bias by the mean error that quantized weights bring to its output.

    b' = b - (E[y_q] - E[y])      y = W x + b,   y_q the same with quantized weights and what came before them quantized

per output channel, over representative rows, each layer behind those that are corrected already (Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with means that are
measured). One batch gives the errors of all layers: the graph moves each mean to where it should be before it goes on.

The rounding error of a weight is the same for every row: where activations are not centred (after a ReLU), much of the
error of a layer is its mean.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from tfopt.calibration import call_of
from tfopt.data import Dataset, batch_size
from tfopt.fake_quant import insert, strip
from tfopt.function import Function
from tfopt.graph import infer_shapes, split
from tfopt.inline import label
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.quantization_sites import sites
from tfopt.rewrite import Log, Refused
from tfopt.rules.absorb import bias_after
from tfopt.rules.constants import attr
from tfopt.rules.emit import add_bias
from tfopt.rules.linear import CONVOLUTIONS, LINEAR_OPS, TRANSPOSED, Linear, linear, refine_shapes
from tfopt.rules.view import View
from tfopt.verify import input_specs

# A mean over this many rows is settled: the quantized and the float model see the same ones.
_ROWS = 256
_CALL_ROWS = 32

_BIASES = ("BiasAdd", "Add", "AddV2")


@dataclasses.dataclass(frozen=True)
class _Bias:
    """The bias of a layer: operand `index` of `node`; it is the same along the `others` of the axes of the result."""

    layer: str
    node: str
    index: int
    others: tuple[int, ...]

    @property
    def mean(self) -> str:
        """The name of the mean of the biased result, where it is an input or an output."""
        return f"{self.node}/mean"


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
    if not biases:
        return
    graph = model.graph
    fixed = batch_size(input_specs(model, signature), 0)
    size = fixed or _CALL_ROWS
    errors: dict[str, np.ndarray] = {}
    means: dict[str, np.ndarray] = {}
    with (
        Function(_measured(strip(model), signature, biases, centred=False)) as reference,
        Function(_measured(model, signature, biases, centred=True)) as quantized,
    ):
        for start in range(0, len(rows), size):
            inputs = call_of(rows, start, size, bool(fixed))
            wanted = reference(signature, inputs)
            received = quantized(signature, {**inputs, **wanted})
            part = min(size, len(rows) - start) / len(rows)
            for name, mean in wanted.items():
                means[name] = means.get(name, 0) + part * mean.astype(np.float64)
                errors[name] = errors.get(name, 0) + part * (received[name].astype(np.float64) - mean)
    largest = 0.0
    for bias in biases:
        old = graph.constant(graph.nodes[bias.node].input[bias.index])
        assert old is not None
        error, mean = errors[bias.mean], means[bias.mean]
        ref = graph.add_constant(f"{bias.node}/corrected", (old - error.reshape(old.shape)).astype(old.dtype))
        graph.set_input(bias.node, bias.index, ref)
        log.applied[f"bias of {graph.nodes[bias.layer].op}"] += 1
        if mean.any():
            largest = max(largest, float(np.sqrt(np.mean(error**2) / np.mean(mean**2))))
    graph.sweep()
    log.notes.append(f"the mean of a layer's output was off by up to {largest:.1%} of itself, on {len(rows)} rows")


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
    value, rank = view.graph.constant(node.input[constant[0]]), view.rank(name)
    if value is None or rank is None or rank < value.ndim:
        raise Refused("the rank of its result is not known")
    after = rank - 2 if node.op == "BiasAdd" and attr(node, "data_format").s == b"NCHW" else 0
    shape = (*[1] * (rank - value.ndim - after), *value.shape, *[1] * after)
    return _Bias(layer, name, constant[0], tuple(axis for axis, size in enumerate(shape) if size == 1))


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
    return _Bias(node.name, name, 1, tuple(other for other in range(len(shape)) if other != axis))


def _measured(model: Model, signature: str, biases: list[_Bias], centred: bool) -> Model:
    """A model whose signature gives the mean of each biased result, as `_Bias.mean`.

    Args:
      model: left as it is.
      signature: the one that is fed.
      biases: the biases; a mean has the rank of the result, and 1 for each axis along which the bias is the same.
      centred: whether what follows a result sees it with another mean, which becomes an input of the same name: one
        call then gives the errors of all layers, each behind layers that are corrected already.
    """
    opened = model.copy()
    graph = opened.graph
    definition = SignatureDef(inputs=model.signatures[signature].inputs)
    for bias in biases:
        dtype = tf.as_dtype(attr(graph.nodes[bias.node], "T").type)
        users = [(user, index) for user, index, port in graph.uses(bias.node) if port == 0]
        axes = graph.add_constant(f"{bias.mean}/axes", np.array(bias.others, np.int32))
        mean = graph.add_op(bias.mean, "Mean", [bias.node, axes], T=dtype, Tidx=tf.int32, keep_dims=True)
        definition.outputs[bias.mean].name = f"{mean}:0"
        graph.outputs[label(signature, bias.mean, "")] = mean
        if centred:
            wanted = graph.add_op(f"{bias.mean}/wanted", "Placeholder", [], dtype=dtype)
            definition.inputs[bias.mean].name = f"{wanted}:0"
            error = graph.add_op(f"{bias.mean}/error", "Sub", [mean, wanted], T=dtype)
            moved = graph.add_op(f"{bias.node}/centred", "Sub", [bias.node, error], T=dtype)
            for user, index in users:
                graph.set_input(user, index, moved)
    opened.signatures = {signature: definition}
    return opened


def run(model: Model, log: Log, data: Data, bits: int = 8, method: str = "max") -> None:
    """Corrects the biases of a float model for weights that will be quantized later, in place."""
    rows = data.need_rows("correct_bias")
    where = sites(model, signature=data.signature)
    weights = tuple(weight for weight in where.weights if weight.linear)
    insert(model, dataclasses.replace(where, weights=weights, activations={}, tied=()), {}, bits, method)
    correct(model, data.signature, rows, log)
    model.graph = strip(model).graph


PASS = Pass(
    "correct_bias",
    run,
    options={"bits": 8, "method": "max"},
    needs=("fold_affine",),
    lossless=False,
    learns=True,
    keeps=("sparsity", "clusters"),
)
