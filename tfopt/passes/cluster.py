"""cluster: lets each kernel hold no more than a few distinct values, found by k-means, and trains these.

    w_i = c[a_i]      min over c, a of  sum_i h_i (w_i - c[a_i])^2, then min over c of  loss(f(c[a]), teacher)
                      (Han, Mao and Dally 2016, "Deep Compression", section 3; h: Choi et al. 2017)

The kernel keeps its shape and its type, so nothing is smaller until it is stored by a coder: gzip finds the few values,
and 16 of them need 4 bits each at most. In a sparse kernel 0 is a value of its own, and no other weight becomes 0.
Int8 files keep the clusters by one scale for a whole kernel (`tfopt.fake_quant`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tfopt.errors import TfoptError
from tfopt.fisher import fisher
from tfopt.graph import Graph
from tfopt.invariants import is_sparse
from tfopt.kmeans import STARTS, Codebook, kmeans
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.recovery import OPTIONS, recover
from tfopt.rewrite import Log, Refused
from tfopt.rules.channels import CALLS, CONVOLUTIONS, LOOKUPS, PRODUCTS, summed_axes
from tfopt.trainable import demote, promote
from tfopt.weight_statistics import statistics

GRANULARITIES = ("tensor", "channel")
WEIGHTINGS = ("none", "fisher")

Book = Callable[..., Codebook]

_LEAST = 8  # weights for each centroid: with fewer there is little to gain, and much to lose
_SAMPLE = 1 << 22  # of a larger table the centroids come from so many elements, evenly spaced
_RULE = "weight clustering"
_LISTED = 40  # kernels that the notes list


def run(
    model: Model,
    log: Log,
    data: Data,
    clusters: int = 16,
    init: str = "optimal",
    granularity: str = "tensor",
    weighting: str = "none",
    entropy: float = 0.0,
    skip: str = "",
    depthwise: int = 64,
    embeddings: bool = False,
    **training: Any,
) -> None:
    """Clusters the kernels of convolutions and products, in place, and trains the centroids.

    Args:
      model: the model.
      log: gets what was clustered, what was not and why, distinct values and entropy of each, how the loss fell.
      data: with rows to train on, if there are any.
      clusters: how many values a kernel has at most, 0 among them where it is sparse; 2 to 256.
      init: how k-means begins, of `tfopt.kmeans.STARTS`.
      granularity: "tensor", or "channel": each output channel has values of its own.
      weighting: "fisher" makes the error of a weight count by how much the outputs change with it.
      entropy: what a bit of a weight's code is worth, as a share of the error that k-means leaves (l of
        `tfopt.kmeans`): with 1, the code is 3 to 9% shorter, and the error 7 to 15% larger.
      skip: regular expression; a kernel stays as it is where it matches, from the start, its name or that of a node
        that reads it.
      depthwise: how many values a kernel of a depthwise convolution has at most, where `clusters` is not more: it is
        small, and each weight counts. There are 8 weights for each value at least. 0 leaves these kernels as they are.
      embeddings: whether tables of lookups are clustered too.
      **training: see `tfopt.recovery.OPTIONS`.

    Raises:
      TfoptError: an option out of range, `skip` matches nothing, nothing can be clustered.
    """
    _check(clusters, init, granularity, weighting, entropy, depthwise)
    if data.engine is not None:
        data.engine.cluster(model, log, data, clusters, init, granularity, skip, embeddings, {**OPTIONS, **training})
        return
    graph = model.graph
    before = set(model.weights)
    trainable = {name for signature in model.signatures for name in promote(model, signature)}
    try:
        chosen = _choose(
            graph, log, sorted(trainable), clusters, granularity, _skipped(graph, skip), depthwise, embeddings
        )
        if not chosen:
            reasons = "; ".join(dict.fromkeys(log.refused.values())) or "it has no trainable kernel of float32"
            raise TfoptError(f"cluster: no weight of the model can be clustered: {reasons}")
        importance = fisher(model, data, list(chosen)) if weighting == "fisher" else {}
        for name, (count, axes) in chosen.items():
            shared = () if granularity == "tensor" else axes
            book = functools.partial(kmeans, start=init, rate=entropy, seed=data.seed)
            model.weights[name] = _clustered(model.weights[name], shared, count, book, importance.get(name))
            log.applied["kernel clustered" if granularity == "tensor" else "kernel clustered by channel"] += 1
    finally:
        demote(model, set(model.weights) - before)
    recover(model, log, data, "cluster", **training)
    _note(graph, list(chosen), log)


def _check(clusters: int, init: str, granularity: str, weighting: str, entropy: float, depthwise: int) -> None:
    if not 2 <= clusters <= 256:
        raise TfoptError(f"cluster: option 'clusters' must be from 2 to 256, received {clusters}")
    if not 0 <= depthwise <= 256:
        raise TfoptError(f"cluster: option 'depthwise' must be from 0 to 256, received {depthwise}")
    if not 0 <= entropy <= 100:
        raise TfoptError(f"cluster: option 'entropy' must be from 0 to 100, received {entropy}")
    for option, value, known in (
        ("init", init, STARTS),
        ("granularity", granularity, GRANULARITIES),
        ("weighting", weighting, WEIGHTINGS),
    ):
        if value not in known:
            raise TfoptError(f"cluster: option '{option}' is one of {', '.join(known)}; received {value!r}")


def _skipped(graph: Graph, pattern: str) -> set[str]:
    if not pattern:
        return set()
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise TfoptError(f"cluster: skip={pattern!r} is no regular expression: {error}") from error
    found = {name for name in graph.nodes if wanted.match(name)}
    if not found:
        raise TfoptError(f"cluster: skip={pattern!r} matches no node")
    return found


def _choose(
    graph: Graph,
    log: Log,
    names: list[str],
    clusters: int,
    granularity: str,
    skipped: set[str],
    depthwise: int,
    embeddings: bool,
) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Weight -> how many values it gets, and the axes that hold its output channels."""
    linear = (*CONVOLUTIONS, *PRODUCTS, *CALLS, *LOOKUPS)
    chosen = {}
    for name in names:
        weight = graph.weights[name]
        uses = [(graph.nodes[user], index) for user, index in _uses(graph, name)]
        if weight.ndim < 2 or not any(node.op in linear for node, _ in uses):
            continue
        try:
            found = set()
            for node, index in uses:
                if node.op not in linear:
                    raise Refused(f"{node.op} {node.name!r} reads it too")
                if node.op in LOOKUPS and not embeddings:
                    raise Refused("it is a table of lookups, which is clustered only with embeddings=true")
                if node.op == "DepthwiseConv2dNative" and not depthwise:
                    raise Refused("it is a depthwise kernel, which depthwise=0 leaves as it is")
                if node.name in skipped or name in skipped:
                    raise Refused("it stays as it is, as skip wants it")
                found.add(tuple(sorted({*range(weight.ndim)} - {*summed_axes(graph, node, index, weight.ndim)})))
            if granularity == "channel" and len(found) > 1:
                raise Refused("its readers sum over different axes, so it has no channels of its own")
            axes = found.pop()
            count = weight.size
            if granularity == "channel":
                count //= int(np.prod([weight.shape[axis] for axis in axes]))
            wanted = clusters
            if any(node.op == "DepthwiseConv2dNative" for node, _ in uses):
                wanted = max(2, min(max(clusters, depthwise), count // _LEAST))
            if count < _LEAST * wanted:
                whole = "a channel of it" if granularity == "channel" else "it"
                raise Refused(f"{whole} has {count} weights, fewer than {_LEAST} for each of {wanted} centroids")
            if not np.isfinite(weight).all():
                raise Refused("it is not finite")
        except Refused as reason:
            log.refused[_RULE, name] = str(reason)
            continue
        chosen[name] = (wanted, axes)
    return chosen


def _uses(graph: Graph, name: str) -> Iterator[tuple[str, int]]:
    """The nodes that read a weight, past those that hand it on."""
    for user, index, port in graph.uses(name):
        if port == 0 and graph.nodes[user].op == "Identity":
            yield from _uses(graph, user)
        elif port == 0:
            yield user, index


def _clustered(
    weight: np.ndarray, axes: tuple[int, ...], clusters: int, book: Book, importance: np.ndarray | None
) -> np.ndarray:
    """A weight with few values: in all, or along `axes` in each place."""
    order = [*axes, *(axis for axis in range(weight.ndim) if axis not in axes)]
    rows = int(np.prod([weight.shape[axis] for axis in axes]))
    table = weight.transpose(order).reshape(rows, -1)
    marks = [None] * rows if importance is None else list(importance.transpose(order).reshape(rows, -1))
    count = clusters - 1 if is_sparse(weight) else clusters
    made = np.stack(
        [_quantized(row, count, book, mark, count < clusters) for row, mark in zip(table, marks, strict=True)]
    )
    moved = made.reshape([weight.shape[axis] for axis in order])
    return np.ascontiguousarray(moved.transpose(np.argsort(order)))


def _quantized(values: np.ndarray, count: int, book: Book, importance: np.ndarray | None, sparse: bool) -> np.ndarray:
    """Numbers (n,) as their centroids; where `sparse`, zeros and they alone are 0."""
    kept = values != 0 if sparse else np.ones(len(values), bool)
    result = np.zeros_like(values)
    if not kept.any():
        return result
    numbers, marks = values[kept], None if importance is None else importance[kept]
    stride = -(-len(numbers) // _SAMPLE)
    found = book(numbers[::stride], count, importance=None if marks is None else marks[::stride])
    if sparse:  # a centroid of 0 would make further zeros
        tiny = np.abs(numbers).min()
        near = np.abs(found.centroids) < tiny
        found = Codebook(np.where(near, np.copysign(tiny, found.centroids), found.centroids), found.borders)
    result[kept] = found.assign(numbers)
    return result


def _note(graph: Graph, names: list[str], log: Log) -> None:
    """Distinct values and entropy of each kernel."""
    lines, values = [], [graph.constant(name) for name in names]
    for name, value in zip(names, values, strict=True):
        assert value is not None
        found = statistics([value])
        zeros = f", {found.zeros / found.elements:.0%} zeros" if found.zeros else ""
        lines.append(f"{name} {found.distinct} and {found.bits / found.elements:.2f} bits{zeros}")
    more = f"; and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    log.notes.append("distinct values and entropy of each kernel: " + "; ".join(lines[:_LISTED]) + more)
    total = statistics(value for value in values if value is not None)
    log.notes.append(
        f"{4 * total.elements:,} bytes of clustered kernels hold {total.bits / 8:,.0f} bytes of information "
        f"(zero-order entropy), {total.bits / total.elements:.2f} bits a weight; a file is smaller once it is zipped"
    )


PASS = Pass(
    "cluster",
    run,
    options={
        "clusters": 16,
        "init": "optimal",
        "granularity": "tensor",
        "weighting": "none",
        "entropy": 0.0,
        "skip": "",
        "depthwise": 64,
        "embeddings": False,
        **OPTIONS,
    },
    needs=("fold_affine",),
    lossless=False,
    learns=True,
    makes=("clusters",),
    keeps=("sparsity", "clusters"),
)
