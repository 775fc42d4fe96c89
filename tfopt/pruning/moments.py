"""Gives each layer whose kernel lost weights the mean and the spread per channel that it had before.

    W' = r W,  b' = r (b - mu) + m,  r = s / sigma      mu, sigma of y = W x + b now; m, s before

per output channel over representative rows, each layer behind those that are corrected already (Jordan et al. 2023,
"REPAIR"; for kernels that batch norms were folded into, it is what new statistics of these would do). Zeros stay zeros.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

from tfopt.data import Dataset, batch_size
from tfopt.differentiable import differentiable
from tfopt.function import Function
from tfopt.graph import infer_shapes, split
from tfopt.inline import label
from tfopt.invariants import clusters
from tfopt.model import Model
from tfopt.passes.correct_bias import _Bias, _biases
from tfopt.rewrite import Log
from tfopt.rules.constants import attr
from tfopt.rules.linear import linear, refine_shapes
from tfopt.rules.view import View
from tfopt.verify import input_specs

_ROWS, _CALL_ROWS = 256, 64
_RATIO = 10.0  # a channel is scaled by no more, and no less than the inverse


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Names of a kernel and of its bias, which are weights; from ratios (of the result's rank) to factors of W."""

    bias: _Bias
    kernel: str
    shift: str
    factors: Callable[[np.ndarray], np.ndarray]


class Moments:
    """The means and spreads that a model has now, to be restored when its weights are others."""

    def __init__(self, model: Model, signature: str, rows: Dataset):
        """
        Args:
          model: before it is pruned, its trainable constants being weights; left as it is.
          signature: the one that the rows are of; nothing is restored where its batch is fixed.
          rows: representative rows.
        """
        self._layers: list[_Layer] = []
        if batch_size(input_specs(model, signature), 0):
            return
        graph = model.graph
        view = View(graph, infer_shapes(graph, model.library()), {}, model.library())
        refine_shapes(view)
        for bias in _biases(model.copy(), signature, Log()):
            form = linear(view, graph.nodes[bias.layer]) if bias.node in graph.nodes else None
            if form is None:
                continue
            kernel = split(graph.nodes[bias.layer].input[form.w])[0]
            shift = split(graph.nodes[bias.node].input[bias.index])[0]
            if all(name in graph.weights and len(graph.uses(name)) == 1 for name in (kernel, shift)):
                self._layers.append(_Layer(bias, kernel, shift, form.widen_out))
        if not self._layers:
            return
        biases = [layer.bias for layer in self._layers]
        size = min(len(rows), _CALL_ROWS)
        starts = range(0, min(len(rows), _ROWS) - size + 1, size)
        parts = [rows.take(slice(start, start + size)).inputs for start in starts]
        with Function(_measured(model, signature, biases, corrected=False)) as function:
            self._wanted = _pooled([function(signature, part) for part in parts])
        self._inputs = [{n: tf.constant(v) for n, v in {**part, **self._wanted}.items()} for part in parts]
        self._function = differentiable(_measured(model, signature, biases, corrected=True), signature)

    def restore(self, model: Model) -> int:
        """Scales kernels and moves biases of the pruned model, in place; a clustered kernel is not scaled.

        Returns:
          How many layers.
        """
        if not self._layers:
            return 0
        calls = [self._function(model.weights, part) for part in self._inputs]
        found = _pooled([{name: value.numpy() for name, value in call.items()} for call in calls])
        for layer in self._layers:
            key, spread = layer.bias.mean, f"{layer.bias.mean}/spread"
            width, kernel, bias = found[spread], model.weights[layer.kernel], model.weights[layer.shift]
            ratio = np.divide(self._wanted[spread], width, out=np.ones_like(width), where=width > 0)
            ratio = np.ones_like(width) if clusters(kernel) else np.clip(ratio, 1 / _RATIO, _RATIO)
            moved = ratio * (bias.reshape(ratio.shape) - found[key]) + self._wanted[key]
            model.weights[layer.kernel] = (kernel * layer.factors(ratio)).astype(kernel.dtype)
            model.weights[layer.shift] = moved.reshape(bias.shape).astype(bias.dtype)
        return len(self._layers)


def _pooled(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Means and spreads over several batches of one size."""
    pooled = {}
    for name in parts[0]:
        if name.endswith("/spread"):
            means = np.stack([part[name.removesuffix("/spread")] for part in parts])
            squares = np.stack([part[name] for part in parts]) ** 2 + means**2
            pooled[name] = np.sqrt(np.maximum(squares.mean(0) - means.mean(0) ** 2, 0)).astype(np.float32)
        else:
            pooled[name] = np.mean([part[name] for part in parts], axis=0).astype(np.float32)
    return pooled


def _measured(model: Model, signature: str, biases: list[_Bias], corrected: bool) -> Model:
    """A model whose signature gives mean and standard deviation of each biased result, as `mean` and `mean/spread`.

    Args:
      model: left as it is.
      signature: the one that is fed.
      biases: the biases.
      corrected: whether what follows a result sees it with a mean and a spread that become inputs of these names.
    """
    opened = model.copy()
    graph = opened.graph
    definition = SignatureDef(inputs=model.signatures[signature].inputs)
    for bias in biases:
        dtype = tf.as_dtype(attr(graph.nodes[bias.node], "T").type)
        users = [(user, index) for user, index, port in graph.uses(bias.node) if port == 0]

        def add(
            role: str, op: str, inputs: list[str], at: str = bias.node, kind: tf.DType = dtype, **attrs: object
        ) -> str:
            return graph.add_op(f"{at}/{role}", op, inputs, **{"dtype" if op == "Placeholder" else "T": kind}, **attrs)

        axes = graph.add_constant(f"{bias.mean}/axes", np.array(bias.others, np.int32))
        mean = graph.add_op(bias.mean, "Mean", [bias.node, axes], T=dtype, Tidx=tf.int32, keep_dims=True)
        centred = add("centred", "Sub", [bias.node, mean])
        variance = add("variance", "Mean", [add("square", "Square", [centred]), axes], Tidx=tf.int32, keep_dims=True)
        spread = add("mean/spread", "Sqrt", [variance])
        for ref in (mean, spread):
            definition.outputs[ref].name = f"{ref}:0"
            graph.outputs[label(signature, ref, "")] = ref
        if corrected:
            wanted = [add(f"wanted{part}", "Placeholder", []) for part in ("", "_spread")]
            for ref, name in zip((mean, spread), wanted, strict=True):
                definition.inputs[ref].name = f"{name}:0"
            scaled = add("scaled", "Mul", [add("unit", "DivNoNan", [centred, spread]), wanted[1]])
            moved = add("moved", "AddV2", [scaled, wanted[0]])
            for user, index in users:
                graph.set_input(user, index, moved)
    opened.signatures = {signature: definition}
    return opened
