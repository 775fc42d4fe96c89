"""int8_weights: stores weights as int8 with a scale for each output channel, and computes in float32 as before.

    Q = round(W / s) in [-127, 127]        s = max|W| / 127 over what one output channel sums       W ~ s Q

The graph multiplies s and Q. Where Q is a constant, TensorFlow does that once, when the model is loaded: the file is a
quarter of the size, and a request takes as long as before. It does so up to 10 MiB of float32 (its constant folding
stops there); a larger product is therefore computed in blocks of output channels. A table of embeddings stays int8 in
memory too: rows are gathered first, and only they become float32.
"""

from __future__ import annotations

import math

import numpy as np
import tensorflow as tf
from tensorflow.core.framework.node_def_pb2 import NodeDef

from tfopt.graph import WEIGHT_ELEMENTS, Graph, make_node
from tfopt.model import Model
from tfopt.passes import Pass
from tfopt.rewrite import Log, Refused
from tfopt.rules.channels import CALLS, CONVOLUTIONS, LOOKUPS, PRODUCTS, kept, scales, summed_axes

# common_runtime/constant_folding.cc folds at most this much when a session is made.
FOLDED_BYTES = 10 << 20
_LEVELS = 127
_READERS = (*CONVOLUTIONS, *PRODUCTS, *LOOKUPS, *CALLS)


def run(model: Model, log: Log, keep_float32: str = "") -> None:
    """Stores weights of at least 1,024 elements as int8, in place.

    Args:
      model: the model.
      log: gets what was stored, and what stayed float32 with its reason.
      keep_float32: regular expression; the weights of a node that it matches from the start, by its op or its name,
        stay float32.

    Raises:
      TfoptError: `keep_float32` is no regular expression, or matches nothing.
    """
    graph = model.graph
    keep = kept(graph, "int8_weights", keep_float32)
    before = model.weight_bytes
    for name, weight in sorted(graph.weights.items()):
        uses = [(user, index) for user, index, port in graph.uses(name) if port == 0]
        readers = [graph.nodes[user] for user, _ in uses]
        if weight.size < WEIGHT_ELEMENTS or weight.dtype.kind in "iub":
            continue
        if not any(node.op in _READERS for node in readers):
            continue
        try:
            axes = _axes(graph, name, weight, keep)
            scale = scales(weight, axes, _LEVELS)
            if scale.nbytes > weight.nbytes // 4:
                raise Refused("so few elements share a scale that the scales would take what int8 saves")
        except Refused as reason:
            log.refused["int8 weight", name] = str(reason)
            continue
        quantized = np.clip(np.rint(weight / scale), -_LEVELS, _LEVELS).astype(np.int8)
        products = [use for use in uses if graph.nodes[use[0]].op not in LOOKUPS]
        for user, _ in uses:
            if graph.nodes[user].op in LOOKUPS:
                _gather(graph, graph.nodes[user], _stored(graph, name, quantized), scale)
                log.applied["table of embeddings stored as int8"] += 1
        count = in_blocks(graph, products, weight.nbytes) if products else 0
        if count > 1:
            axis = int(np.argmax(scale.shape))  # the one that is not summed over
            pieces = zip(np.array_split(quantized, count, axis), np.array_split(scale, count, axis), strict=True)
            blocks = [
                _restored(graph, f"{name}/block", graph.add_constant(f"{name}/block/int8", block), factors)
                for block, factors in pieces
            ]
            split_product(graph, graph.nodes[products[0][0]], blocks)
            log.applied["product in blocks of output channels"] += 1
        elif products:
            restored = _restored(graph, name, _stored(graph, name, quantized), scale)
            for user, index in products:
                graph.set_input(user, index, restored)
            if weight.nbytes > FOLDED_BYTES:
                log.notes.append(f"{name} is more than 10 MiB of float32: it is dequantized at every call")
        log.applied["weight stored as int8"] += 1
    graph.sweep()
    if log.applied:
        log.notes.append(f"{before:,} bytes of weights became {model.weight_bytes:,}")


def _axes(graph: Graph, name: str, weight: np.ndarray, keep: set[str]) -> tuple[int, ...]:
    if weight.dtype != np.float32:
        raise Refused(f"it is {weight.dtype}, not float32")
    if not np.isfinite(weight).all():
        raise Refused("it is not finite")
    if graph.output_labels(name) or name in graph.keep:
        raise Refused("it is a result of the graph")
    found = set()
    for user, index, port in graph.uses(name):
        if user in keep:
            raise Refused("it stays float32 as keep_float32 wants it")
        if port == 0:
            found.add(summed_axes(graph, graph.nodes[user], index, weight.ndim))
    if len(found) > 1:
        raise Refused("its readers sum over different axes, so no scale fits all of them")
    return found.pop()


def _stored(graph: Graph, name: str, quantized: np.ndarray) -> str:
    """The int8 weight, which several readers share."""
    stored = f"{name}/int8"
    return stored if stored in graph.nodes else graph.add_constant(stored, quantized)


def _restored(graph: Graph, hint: str, stored: str, scale: np.ndarray) -> str:
    number = graph.add_op(f"{hint}/float", "Cast", [stored], SrcT=tf.int8, DstT=tf.float32)
    factor = graph.add_constant(f"{hint}/scale", scale)
    return graph.add_op(f"{hint}/dequantized", "Mul", [number, factor], T=tf.float32)


def _gather(graph: Graph, node: NodeDef, stored: str, scale: np.ndarray) -> None:
    """s[i] * Q[i] in the place of W[i]."""
    inputs = list(node.input)

    def lookup(hint: str, table: str, dtype: tf.DType) -> str:
        gather = make_node(graph.unique_name(hint), "GatherV2", [table, *inputs[1:]])
        for key, attr in node.attr.items():
            gather.attr[key].CopyFrom(attr)
        gather.attr["Tparams"].type = dtype.as_datatype_enum
        return graph.add(gather)

    rows = lookup(f"{node.name}/int8", stored, tf.int8)
    number = graph.add_op(f"{node.name}/float", "Cast", [rows], SrcT=tf.int8, DstT=tf.float32)
    factors = lookup(f"{node.name}/scales", graph.add_constant(f"{node.name}/scale", scale), tf.float32)
    control = [ref for ref in inputs if ref.startswith("^")]
    graph.replace(make_node(node.name, "Mul", [number, factors, *control], T=tf.float32))


def in_blocks(graph: Graph, uses: list[tuple[str, int]], weight_bytes: int) -> int:
    """How many blocks of output channels a product needs for TensorFlow to restore its float32 weights at loading.

    One, where blocks are not possible: another op, several readers, channels that are not the last axis of the result.
    """
    node = graph.nodes[uses[0][0]]
    plain = node.op == "MatMul" or (
        node.op == "Conv2D" and node.attr["data_format"].s != b"NCHW" and not node.attr["explicit_paddings"].list.i
    )
    return math.ceil(weight_bytes / FOLDED_BYTES) if plain and len(uses) == 1 and uses[0][1] == 1 else 1


def split_product(graph: Graph, node: NodeDef, blocks: list[str]) -> None:
    """x W = [x W_1, x W_2, ..] for the references to the blocks of the weights, in the place of a product."""
    inputs, parts = list(node.input), []
    for weights in blocks:
        product = make_node(graph.unique_name(f"{node.name}/block"), node.op, [inputs[0], weights, *inputs[2:]])
        for key, attr in node.attr.items():
            product.attr[key].CopyFrom(attr)
        parts.append(graph.add(product))
    last = graph.add_constant(f"{node.name}/axis", np.array(1 if node.op == "MatMul" else 3, np.int32))
    graph.replace(make_node(node.name, "ConcatV2", [*parts, last], T=tf.float32, Tidx=tf.int32, N=len(parts)))


PASS = Pass("int8_weights", run, options={"keep_float32": ""}, lossless=False, keeps=("sparsity",))
