"""binarize: one bit for each weight of inner convolutions and dense layers, trained to answer as the original does.

    W ~ a sign(W),  a = mean|W| of an output channel      (Rastegari et al. 2016, XNOR-Net, eq. 6; inputs stay float32)

Training goes on with W = a sign(L): the gradient of L passes straight through the sign (Courbariaux et al. 2016), and a
is trained along (Bulat and Tzimiropoulos 2019). Only the sign of L counts, so it starts as W in units in which one step
of the optimizer can matter. The SavedModel holds eight weights a byte; TensorFlow unpacks them to float32 once, when it
loads the model, so the file shrinks and a request takes as long as before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from tfopt.errors import TfoptError
from tfopt.graph import WEIGHT_ELEMENTS, Graph, make_node
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.passes.int8_weights import FOLDED_BYTES, in_blocks, split_product
from tfopt.recovery import recover
from tfopt.rewrite import Log, Refused
from tfopt.rules.channels import CONVOLUTIONS, PRODUCTS, kept, summed_axes
from tfopt.trainable import demote, promote

_LINEAR = (*CONVOLUTIONS, *PRODUCTS)
_LATENT = 0.05  # mean |L| at the start: some fifty steps of Adam at a rate of 0.001 turn a common weight around


@dataclasses.dataclass(frozen=True)
class _Binary:
    """A weight while it is trained: names of L and a, the node a L, and the axes that share an a."""

    latent: str
    scale: str
    product: str
    axes: tuple[int, ...]
    uses: tuple[tuple[str, int], ...]


def run(
    model: Model,
    log: Log,
    data: Data,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    alpha: float = 0.5,
    keep_ends: bool = True,
    keep_float32: str = "",
) -> None:
    """Makes weights of at least 1,024 elements binary, in place.

    Args:
      model: the model.
      log: gets what became binary, what did not and why, and how the loss fell.
      data: with representative rows, labelled rows, or both.
      epochs: of the training; with 0 nothing is trained, and no rows are needed.
      batch_size, learning_rate: of the training; the rate falls along a cosine.
      alpha: the share of the labels in the loss, where there are labels; the rest is the original's.
      keep_ends: whether the first and the last linear layers stay float32, as XNOR-Net keeps them.
      keep_float32: regular expression; the weights of a node that it matches from the start, by its op or its name,
        stay float32.

    Raises:
      TfoptError: no rows, nothing that can be binary, or `keep_float32` matches nothing.
    """
    if epochs:
        data.need_rows("binarize")
    graph = model.graph
    before = model.weight_bytes
    chosen = _choose(graph, log, keep_ends, kept(graph, "binarize", keep_float32))
    if not chosen:
        reasons = dict.fromkeys(log.refused.values())
        reason = "; ".join(reasons) or "it has no convolution or dense layer with 1,024 weights or more"
        raise TfoptError(f"binarize: no weight of the model can be binary: {reason}")
    names = promote(model, data.signature) if epochs else []
    small = {name for name in names if model.weights[name].size < WEIGHT_ELEMENTS}
    binaries = [_latent(graph, name, axes) for name, axes in chosen.items()]
    if epochs:
        own = [name for binary in binaries for name in (binary.latent, binary.scale)]
        recover(
            model,
            log,
            data,
            "binarize",
            transform=_signs([binary.latent for binary in binaries]),
            names=[name for name in names if name in graph.nodes and name not in chosen] + own,
            epochs=epochs,
            min_steps=0,
            batch_size=batch_size,
            learning_rate=learning_rate,
            alpha=alpha,
        )
    for binary in binaries:
        _pack(graph, binary, log)
    graph.sweep()
    demote(model, small & model.weights.keys())
    log.notes.append(f"{before:,} bytes of weights became {model.weight_bytes:,}")
    log.notes.append("binary weights are unpacked to float32 when the model loads: smaller on disk, no faster")


def _choose(graph: Graph, log: Log, keep_ends: bool, keep: set[str]) -> dict[str, tuple[int, ...]]:
    """Weight -> the axes that share a scale."""
    linear = {
        node.name
        for node in graph.nodes.values()
        if node.op in _LINEAR and any(graph.constant(ref) is not None for ref in graph.data_inputs(node))
    }
    ends = _ends(graph, linear) if keep_ends else {}
    chosen = {}
    for name, weight in sorted(graph.weights.items()):
        uses = [(user, index) for user, index, port in graph.uses(name) if port == 0]
        if weight.size < WEIGHT_ELEMENTS or not any(user in linear for user, _ in uses):
            continue
        try:
            if weight.dtype != np.float32 or not np.isfinite(weight).all():
                raise Refused(f"it is {weight.dtype}" if weight.dtype != np.float32 else "it is not finite")
            if graph.output_labels(name):
                raise Refused("it is a result of the graph")
            found = {summed_axes(graph, graph.nodes[user], index, weight.ndim) for user, index in uses}
            for user, _ in uses:
                if user not in linear:
                    raise Refused(f"{graph.nodes[user].op} {user!r} reads it too")
                if graph.nodes[user].op == "DepthwiseConv2dNative":
                    raise Refused("a depthwise convolution sums too few weights for one bit each")
                if user in ends:
                    raise Refused(f"it belongs to the {ends[user]} linear layer, which keeps float32 (keep_ends)")
                if user in keep:
                    raise Refused("it stays float32 as keep_float32 wants it")
            if len(found) > 1:
                raise Refused("its readers sum over different axes, so no scale fits all of them")
        except Refused as reason:
            log.refused["binary weight", name] = str(reason)
            continue
        chosen[name] = found.pop()
    return chosen


def _ends(graph: Graph, linear: set[str]) -> dict[str, str]:
    """Linear node -> "first" where no other one comes before it, "last" where none comes after."""
    ends = {}
    followed: set[str] = set()
    for name in linear:
        before = (graph.reachable([name]) & linear) - {name}
        followed |= before
        if not before:
            ends[name] = "first"
    return {**ends, **dict.fromkeys(linear - followed, "last")}


def _latent(graph: Graph, name: str, axes: tuple[int, ...]) -> _Binary:
    """W = a L in the place of W, both to be trained."""
    weight = graph.weights[name]
    mean = np.mean(np.abs(weight), axis=axes, keepdims=True)
    unit = np.where(mean > 0, mean, 1).astype(np.float32)
    names = []
    for role, value in (("latent", weight / unit * np.float32(_LATENT)), ("scale", mean.astype(np.float32))):
        names.append(
            graph.add(
                make_node(graph.unique_name(f"{name}/{role}"), "Placeholder", dtype=tf.float32, shape=value.shape)
            )
        )
        graph.weights[names[-1]] = np.ascontiguousarray(value)
    uses = tuple((user, index) for user, index, port in graph.uses(name) if port == 0)
    product = graph.add_op(f"{name}/binary", "Mul", names, T=tf.float32)
    for user, index in uses:
        graph.set_input(user, index, product)
    return _Binary(names[0], names[1], product, axes, uses)


def _signs(latents: list[str]):
    """sign(L), with the gradient of L."""

    def transform(variables: Mapping[str, tf.Variable]) -> dict[str, tf.Tensor]:
        signs = {name: tf.where(variables[name] < 0, -1.0, 1.0) for name in latents if name in variables}
        return {name: variables[name] + tf.stop_gradient(sign - variables[name]) for name, sign in signs.items()}

    return transform


def _pack(graph: Graph, binary: _Binary, log: Log) -> None:
    """Stores sign(L) as bits."""
    positive = graph.weights[binary.latent] >= 0
    scale = graph.weights[binary.scale]
    count = in_blocks(graph, list(binary.uses), 4 * positive.size)
    hint = binary.product
    if count == 1:
        restored = _unpacked(graph, hint, positive, scale)
        for user, index in binary.uses:
            graph.set_input(user, index, restored)
        if 4 * positive.size > FOLDED_BYTES:
            log.notes.append(f"{hint} is more than 10 MiB of float32: it is unpacked at every call")
    else:
        axis = int(np.argmax(scale.shape))  # the one that is not summed over
        pieces = zip(np.array_split(positive, count, axis), np.array_split(scale, count, axis), strict=True)
        blocks = [_unpacked(graph, f"{hint}/block", bits, factors) for bits, factors in pieces]
        split_product(graph, graph.nodes[binary.uses[0][0]], blocks)
        log.applied["product in blocks of output channels"] += 1
    log.applied["weight stored as one bit"] += 1


def _unpacked(graph: Graph, hint: str, positive: np.ndarray, scale: np.ndarray) -> str:
    """(2 bit - 1) scale, from eight bits a byte, the first in the highest place."""

    def constant(role: str, value: object, dtype: type) -> str:
        return graph.add_constant(f"{hint}/{role}", np.asarray(value, dtype))

    packed = constant("bits", np.packbits(positive.ravel())[:, None], np.uint8)
    places = constant("places", np.arange(7, -1, -1), np.uint8)
    shifted = graph.add_op(f"{hint}/shifted", "RightShift", [packed, places], T=tf.uint8)
    bits = graph.add_op(f"{hint}/bit", "BitwiseAnd", [shifted, constant("one", 1, np.uint8)], T=tf.uint8)
    flat = graph.add_op(f"{hint}/flat", "Reshape", [bits, constant("all", [-1], np.int32)], T=tf.uint8, Tshape=tf.int32)
    if positive.size % 8:
        begin, size = constant("begin", [0], np.int32), constant("size", [positive.size], np.int32)
        flat = graph.add_op(f"{hint}/used", "Slice", [flat, begin, size], T=tf.uint8, Index=tf.int32)
    shape = constant("shape", positive.shape, np.int32)
    shaped = graph.add_op(f"{hint}/shaped", "Reshape", [flat, shape], T=tf.uint8, Tshape=tf.int32)
    number = graph.add_op(f"{hint}/number", "Cast", [shaped], SrcT=tf.uint8, DstT=tf.float32)
    doubled = graph.add_op(f"{hint}/doubled", "Mul", [number, constant("two", 2, np.float32)], T=tf.float32)
    sign = graph.add_op(f"{hint}/sign", "Sub", [doubled, constant("one_float", 1, np.float32)], T=tf.float32)
    return graph.add_op(f"{hint}/unpacked", "Mul", [sign, constant("scale", scale, np.float32)], T=tf.float32)


PASS = Pass(
    "binarize",
    run,
    options={
        "epochs": 20,
        "batch_size": 64,
        "learning_rate": 1e-3,
        "alpha": 0.5,
        "keep_ends": True,
        "keep_float32": "",
    },
    lossless=False,
    learns=True,
)
