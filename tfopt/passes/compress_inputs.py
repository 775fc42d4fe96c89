"""compress_inputs: gives the first dense layers a rank-constrained topology, and trains the model to answer as before.

    topology=node      W_o ~ sum_k u_ok v_ok'    each node has k filters of its own    (Nakkiran et al. 2015)
    topology=shared    W_o ~ U_o V'              all nodes share k filters
                                                 W_o (T, F): the weights of node o, for inputs folded into a matrix

`node` stores k (T + F) numbers a node in place of T F. It multiplies k times as often, though, where the whole input is
given at each call; `shared` does so less often, and keeps less of the weights in as many bytes. With `dead_inputs`,
what never varies on the owner's rows leaves too.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import tensorflow as tf

from tfopt import recovery
from tfopt.errors import TfoptError
from tfopt.first_layer import Crop, box, constant_inputs, fewest, moments
from tfopt.graph import Graph, infer_shapes, join, split
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.rank_constrained import TOPOLOGIES, Scale, product, reshape
from tfopt.rewrite import Log, Refused
from tfopt.rules.channels import CONVOLUTIONS, LOOKUPS, PRODUCTS
from tfopt.rules.constants import attr

_LOOKUPS = (*LOOKUPS, "Gather")
_LINEAR = (*CONVOLUTIONS, *PRODUCTS, *_LOOKUPS)
_RULE = "first dense layer"


@dataclasses.dataclass(frozen=True)
class _Layer:
    """A dense layer: its node, the reference to its input, and W (inputs, nodes)."""

    node: str
    x: str
    kernel: np.ndarray


def run(
    model: Model,
    log: Log,
    data: Data,
    rank: int = 2,
    topology: str = "node",
    shape: str = "",
    dead_inputs: bool = False,
    **training: Any,
) -> None:
    """Compresses the dense layers that read inputs directly, in place.

    Args:
      model: the model.
      log: gets what became of each layer, and how the loss fell.
      data: with representative rows, labelled rows, or both; without, nothing is trained.
      rank: k; 0 leaves the topology as it is, for `dead_inputs` alone.
      topology: "node" or "shared", see above.
      shape: how the inputs of the layer fold into a matrix, "TxF"; empty takes it from the Reshape before the layer,
        or else the two factors of their number that are nearest to each other.
      dead_inputs: whether inputs that have one value on all rows leave; with a topology, whole rows and columns do.
      **training: options of `recovery.OPTIONS`.

    Raises:
      TfoptError: an option out of its range, no rows for `dead_inputs`, or no layer that can be compressed.
    """
    if rank < 0 or (rank == 0 and not dead_inputs):
        raise TfoptError(f"compress_inputs: rank={rank}: must be at least 1, or 0 with dead_inputs=true")
    if topology not in TOPOLOGIES:
        raise TfoptError(f"compress_inputs: topology={topology!r}: choose from {', '.join(TOPOLOGIES)}")
    wanted = _sizes(shape)
    if dead_inputs:
        data.need_rows("compress_inputs with dead_inputs")
    before = model.weight_bytes
    for layer in _first_layers(model.graph, log):
        try:
            found = constant_inputs(model, data, layer.x, len(layer.kernel)) if dead_inputs else None
            if rank:
                _constrain(model, log, data, layer, rank, topology, wanted, found)
            elif found is not None:
                _drop(model.graph, log, layer, found)
        except Refused as reason:
            log.refused[_RULE, layer.node] = str(reason)
    if not log.applied:
        reasons = "; ".join(f"{node}: {reason}" for (_, node), reason in log.refused.items())
        reasons = reasons or "no MatMul of 1,024 weights or more reads inputs directly"
        raise TfoptError(f"compress_inputs: no layer was compressed: {reasons}")
    recovery.recover(model, log, data, "compress_inputs", **training)
    log.notes.append(f"{before:,} bytes of weights became {model.weight_bytes:,}")


def _sizes(shape: str) -> tuple[int, int] | None:
    if not shape:
        return None
    parts = shape.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise TfoptError(f"compress_inputs: shape={shape!r}: expected two sizes, such as 28x28")
    return int(parts[0]), int(parts[1])


def _first_layers(graph: Graph, log: Log) -> list[_Layer]:
    """The dense layers before which nothing is multiplied by weights, or looked up."""
    trained = {node.name for node in graph.nodes.values() if node.op in _LINEAR and _has_weights(graph, node.name)}
    found = []
    for name in sorted(trained):
        node = graph.nodes[name]
        refs = graph.data_inputs(node)
        if node.op != "MatMul" or not graph.reachable([split(refs[0])[0]]).isdisjoint(trained):
            continue
        weight = split(refs[1])[0]
        value = graph.weights.get(weight)
        if value is None or graph.constant(refs[0]) is not None:
            continue
        try:
            if value.dtype != np.float32 or not np.isfinite(value).all():
                raise Refused(f"its weights are {value.dtype}" if value.dtype != np.float32 else "they are not finite")
            if len(graph.uses(weight)) > 1 or graph.output_labels(weight) or weight in graph.keep:
                raise Refused("its weights are used elsewhere too")
            if attr(node, "transpose_a").b:
                raise Refused("its input is transposed")
            if graph.control_inputs(node):
                raise Refused("it waits for other nodes")
        except Refused as reason:
            log.refused[_RULE, name] = str(reason)
            continue
        found.append(_Layer(name, refs[0], value.T if attr(node, "transpose_b").b else value))
    return found


def _has_weights(graph: Graph, name: str) -> bool:
    """Whether a linear op multiplies by a constant; sizes and axes are none."""
    node = graph.nodes[name]
    refs = graph.data_inputs(node)
    backward = node.op.endswith(("BackpropInput", "BackpropInputV2"))
    factors = refs[1:] if backward else refs[:1] if node.op in _LOOKUPS else refs[:2]
    return any(graph.constant(ref) is not None for ref in factors)


def _constrain(
    model: Model,
    log: Log,
    data: Data,
    layer: _Layer,
    rank: int,
    topology: str,
    wanted: tuple[int, int] | None,
    found: np.ndarray | None,
) -> None:
    """Writes the two stages of a layer; `found` has the inputs of one value, see `constant_inputs`."""
    graph, name = model.graph, layer.node
    frames, width = _fold(model, layer, wanted)
    kernel = layer.kernel.reshape(frames, width, -1)
    crop = Crop(0, frames, 0, width) if found is None else box(found, frames, width)
    kept = crop.of(kernel)
    found_moments = moments(model, data, layer.x, frames, width)
    scale = Scale.plain(*crop.shape)
    if found_moments is not None:
        rows, columns = slice(crop.top, crop.bottom), slice(crop.left, crop.right)
        scale = Scale(found_moments[0][rows, rows], found_moments[1][columns, columns])
    form = TOPOLOGIES[topology](kept, rank, scale)
    if form.nbytes >= kernel.nbytes:
        sizes = f"{crop.shape[0]} x {crop.shape[1]}"
        raise Refused(f"rank {rank} of {sizes} takes {form.nbytes:,} bytes, and its weights take {kernel.nbytes:,}")
    x, bias = layer.x, None
    if crop.shape != (frames, width):
        assert found is not None
        bias = crop.outside(kernel, found)
        image = reshape(graph, f"{name}/image", x, [-1, frames, width])
        x = _slice(graph, f"{name}/box", image, [0, crop.top, crop.left], [-1, *crop.shape])
        log.applied["input of one value"] += frames * width - math.prod(crop.shape)
        log.notes.append(f"{name}: only {crop.shape[0]} x {crop.shape[1]} of {frames} x {width} inputs vary")
    _take_over(graph, name, form.write(graph, name, x), bias)
    log.applied[_RULE] += 1
    if form.work > kernel.size:
        log.warnings.append(
            f"{name}: smaller, but {form.work / kernel.size:.1f} times the multiplications; topology=shared takes fewer"
        )
    log.notes.append(
        f"{name}: {kernel.shape[2]:,} nodes over {crop.shape[0]} x {crop.shape[1]} inputs, rank {rank} ({topology}): "
        f"{kernel.nbytes:,} bytes became {form.nbytes:,}, {kernel.size:,} multiplications a row {form.work:,}, and "
        f"{scale.lost(kept, form.kernel):.1%} of the mean square of its outputs was lost before the training"
    )


def _fold(model: Model, layer: _Layer, wanted: tuple[int, int] | None) -> tuple[int, int]:
    """T and F."""
    inputs = len(layer.kernel)
    if wanted is not None:
        if wanted[0] * wanted[1] != inputs:
            raise Refused(f"shape={wanted[0]}x{wanted[1]} does not fold its {inputs} inputs")
        return wanted
    shapes = infer_shapes(model.graph, model.library())
    node = model.graph.producer(layer.x)
    while node.op == "Reshape":
        sizes = [size for size in (shapes.get(join(*split(node.input[0]))) or ())[1:] if size != 1]
        known = [size for size in sizes if size is not None]
        if len(sizes) > 1 and len(known) == len(sizes) and math.prod(known) == inputs:
            return known[0], inputs // known[0]
        node = model.graph.producer(node.input[0])
    frames = next(size for size in range(math.isqrt(inputs), 0, -1) if inputs % size == 0)
    if frames == 1:
        raise Refused(f"its {inputs} inputs fold into no matrix: their number is prime")
    return frames, inputs // frames


def _drop(graph: Graph, log: Log, layer: _Layer, found: np.ndarray) -> None:
    """Takes out the inputs that have one value; `found` is of `constant_inputs`."""
    inputs, nodes = layer.kernel.shape
    live = fewest(found, nodes)
    gone = np.setdiff1d(np.arange(inputs), live)
    piece = len(live) == live[-1] + 1 - live[0]
    saved = 4 * len(gone) * nodes - (0 if piece else 4 * len(live))
    if saved <= 0:
        few = np.count_nonzero(~np.isnan(found))
        raise Refused(f"{few} of its {inputs} inputs have one value on the rows given: leaving saves no bytes")
    name = layer.node
    if piece:
        x = _slice(graph, f"{name}/live", layer.x, [0, int(live[0])], [-1, len(live)])
    else:
        index = graph.add_constant(f"{name}/numbers", live.astype(np.int32))
        axis = graph.add_constant(f"{name}/axis", np.array(1, np.int32))
        types = {"Tparams": tf.float32, "Tindices": tf.int32, "Taxis": tf.int32}
        x = graph.add_op(f"{name}/live", "GatherV2", [layer.x, index, axis], **types)
    bias = found[gone] @ layer.kernel[gone].astype(np.float64)
    _take_over(graph, name, product(graph, f"{name}/nodes", x, layer.kernel[live]), bias)
    log.applied["input of one value"] += len(gone)
    log.notes.append(
        f"{name}: {len(gone)} of {inputs} inputs have one value on the rows given, and left: "
        f"{4 * layer.kernel.size:,} bytes became {4 * layer.kernel.size - saved:,}"
    )


def _slice(graph: Graph, hint: str, x: str, begin: list[int], size: list[int]) -> str:
    refs = [
        graph.add_constant(f"{hint}/{role}", np.array(of, np.int32)) for role, of in (("begin", begin), ("size", size))
    ]
    return graph.add_op(hint, "Slice", [x, *refs], T=tf.float32, Index=tf.int32)


def _take_over(graph: Graph, name: str, result: str, bias: np.ndarray | None) -> None:
    """Puts what computes a layer, less the bias, in its place."""
    if bias is not None and bias.any():
        shift = graph.add_constant(f"{name}/offset", bias.astype(np.float32))
        result = graph.add_op(f"{name}/shifted", "AddV2", [result, shift], T=tf.float32)
    graph.redirect(name, result)
    graph.redirect_control(name, [split(result)[0]])
    graph.sweep()


PASS = Pass(
    "compress_inputs",
    run,
    options={"rank": 2, "topology": "node", "shape": "", "dead_inputs": False, **recovery.OPTIONS},
    needs=("fold_affine",),
    lossless=False,
    learns=True,
)
