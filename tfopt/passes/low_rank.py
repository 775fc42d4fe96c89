"""low_rank: writes dense layers, convolutions and embeddings as products of smaller ones, and trains what it lost.

    y = x W  ~  (x U) V        x W: k n multiplications a position, (x U) V: (k + n) r

By SVD, Tucker-2, CP or a split into rows and columns (`tfopt.low_rank.factors`), whichever costs least at the same
error. Where there are rows the factors are those that keep the outputs of the layer, not its weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np

from tfopt.cost import graph_cost
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.graph import split
from tfopt.inline import label, tensor_names
from tfopt.low_rank.choice import CP_ELEMENTS, MINIMIZE, WORST, Choice, Options, allot, interpolated, vbmf_error
from tfopt.low_rank.edit import replace
from tfopt.low_rank.factors import METHODS, decompose, error
from tfopt.low_rank.inputs import MAX_SIZE, computed, moments
from tfopt.low_rank.layers import RULE, Layer, find
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.recovery import OPTIONS, recover
from tfopt.rewrite import Log, Refused
from tfopt.rules.channels import kept
from tfopt.sensitivity import sensitivity

RANKS = ("energy", "flops", "vbmf")
_PROBES = 6  # errors of each layer at which it is tried what they do to the outputs
_PROBE_ELEMENTS = 1 << 22  # of larger layers fewer, since all that is tried is held in memory
_PROBE_ROWS = 1 << 14  # in all


def run(
    model: Model,
    log: Log,
    data: Data,
    rank: str = "energy",
    energy: float = 0.9,
    flops: float = 0.3,
    method: str = "auto",
    minimize: str = "auto",
    weighted: bool = True,
    keep_first: bool = True,
    keep: str = "",
    **training: Any,
) -> None:
    """Factors layers of at least 1,024 weights, in place.

    Args:
      model: the model.
      log: gets what was factored, what was not and why, the FLOPs before and after, and how the loss fell.
      data: rows make the factors better, and can recover what they lose; without any it is done once, by the weights.
      rank: "energy" keeps a share of each layer's energy, "flops" removes a share of the model's FLOPs where that does
        the least harm, "vbmf" finds the rank of each layer.
      energy: for "energy": the share of the squared singular values to keep; with rows, of the variance of what the
        layer gives.
      flops: for "flops": the share of the FLOPs of the signature to remove.
      method: "svd", "tucker", "cp" or "spatial" for every layer that it fits; "auto" takes the cheapest of all.
      minimize: "flops" or "bytes" lowers one of them whatever becomes of the other; "auto" lets neither grow but for
        embeddings, whose bytes fall and which need a small product.
      weighted: whether rows, where there are any, decide what is kept.
      keep_first: whether a first convolution that reads four channels or fewer stays as it is.
      keep: regular expression; the weights of a node that it matches from the start, by its op or its name, stay.
      **training: see `tfopt.recovery.OPTIONS`.

    Raises:
      TfoptError: an option that is not understood, or nothing that can be factored.
    """
    _check(rank, energy, flops, method, minimize)
    methods = _methods(method, log)
    keeping = kept(model.graph, "low_rank", keep)
    before = _flops(model, data.signature)
    if rank == "flops" and before is None:
        raise TfoptError(
            "low_rank: rank=flops needs to know the FLOPs of the model, and a shape in it is not static; "
            "use rank=energy"
        )
    layers = find(model, log, keeping, keep_first)
    rows = (data.rows or data.labelled) if weighted else None
    known = moments(model, data.signature, layers, rows, data.seed) if rows is not None else {}
    if rows is not None:
        for layer in layers:
            if layer.weight not in known and np.prod(layer.kernel.shape[:3]) > MAX_SIZE:
                log.notes.append(f"{layer.weight}: factored by its weights alone, it reads too many values")
    options = {}
    for layer in layers:
        usable = _usable(layer, methods, method)
        try:
            if not usable:
                raise Refused(f"method {method} does not fit its shape")
            options[layer.weight] = Options(layer, known.get(layer.weight), usable, minimize)
        except Refused as reason:
            log.refused[RULE, layer.weight] = str(reason)
    chosen = {}
    if rank == "flops":
        chosen = _by_flops(model, log, data, options, rows, round(flops * (before or 0) / 2))
    else:
        for weight, each in options.items():
            try:
                bound = 1 - energy if rank == "energy" else vbmf_error(each.layer, each.moment)
                if rank == "vbmf" and bound > WORST:
                    raise Refused(f"by variational Bayes {bound:.2g} of what it gives is noise, which is not believed")
                chosen[weight] = each.within(bound)
            except Refused as reason:
                log.refused[RULE, weight] = str(reason)
    if not chosen:
        reasons = "; ".join(dict.fromkeys(log.refused.values()))
        raise TfoptError(
            f"low_rank: no layer of the model can be factored: {reasons or 'it has none with 1,024 weights or more'}"
        )
    bytes_before = model.weight_bytes
    for weight, choice in chosen.items():
        _factor(model, log, options[weight], choice)
    model.graph.sweep()
    after = _flops(model, data.signature)
    log.notes.append(f"{bytes_before:,} bytes of weights became {model.weight_bytes:,}")
    if before is not None and after is not None:
        log.notes.append(f"{before:,} FLOPs became {after:,} ({1 - after / max(before, 1):.1%} fewer)")
        if rank == "flops" and after > (1 - flops) * before + 0.005 * before:
            log.warnings.append(
                f"low_rank: {flops:.0%} of the FLOPs were to be removed, {1 - after / before:.1%} could be: no layer "
                "may lose more than half of its output"
            )
    recover(model, log, data, "low_rank", **training)


def _check(rank: str, energy: float, flops: float, method: str, minimize: str) -> None:
    for name, value, choices in (
        ("rank", rank, RANKS),
        ("method", method, ("auto", *METHODS)),
        ("minimize", minimize, MINIMIZE),
    ):
        if value not in choices:
            raise TfoptError(f"low_rank: {name} must be one of {', '.join(choices)}; received {value!r}")
    for name, share in (("energy", energy), ("flops", flops)):
        if not 0 < share < 1:
            raise TfoptError(f"low_rank: {name} is a share between 0 and 1; received {share}")


def _methods(method: str, log: Log) -> tuple[str, ...]:
    """The methods that may be used; tucker and cp are tensorly's."""
    if importlib.util.find_spec("tensorly") is not None or method in ("svd", "spatial"):
        return METHODS if method == "auto" else (method,)
    if method != "auto":
        raise TfoptError(f"low_rank: method {method} needs tensorly: pip install 'tfopt[low_rank]'")
    log.warnings.append("low_rank: tucker and cp were not tried, tensorly is missing: pip install 'tfopt[low_rank]'")
    return ("svd", "spatial")


def _usable(layer: Layer, methods: tuple[str, ...], method: str) -> list[str]:
    found = [each for each in methods if each in layer.methods()]
    if method == "auto" and layer.kernel.size > CP_ELEMENTS:
        found = [each for each in found if each != "cp"]
    if not found and layer.methods() == ("svd",):
        found = ["svd"]  # for a matrix there is no other
    return found


def _flops(model: Model, signature: str) -> int | None:
    graph = model.graph
    labels = [
        label(signature, name, part)
        for name, info in model.signatures[signature].outputs.items()
        for part, _ in tensor_names(info)
    ]
    outputs = [split(graph.outputs[each])[0] for each in labels]
    return graph_cost(graph.to_graph_def(model.library()), outputs=outputs, weights=graph.weights).flops


def _by_flops(
    model: Model, log: Log, data: Data, options: dict[str, Options], rows: Dataset | None, wanted: int
) -> dict[str, Choice]:
    """The choices that together remove `wanted` multiply-accumulates."""
    live = computed(model, data.signature)
    points, whole = {}, {}
    for weight, each in options.items():
        layer = each.layer
        if layer.kind == "lookup":
            log.refused[RULE, weight] = "a lookup has no FLOPs to lower (rank=energy factors it)"
        elif not set(layer.nodes) <= live:
            log.refused[RULE, weight] = f"signature {data.signature!r} does not compute it"
        else:
            points[weight] = each.spread()
            whole[weight] = layer.macs()
            if not points[weight]:
                log.refused[RULE, weight] = each.nothing(WORST)
    points = {weight: found for weight, found in points.items() if found}
    chosen = allot(points, whole, _harms(model, data, options, points, rows), wanted)
    for weight in points:
        if weight not in chosen:
            log.refused[RULE, weight] = "the FLOPs go with less harm elsewhere"
    return chosen


def _harms(
    model: Model,
    data: Data,
    options: dict[str, Options],
    points: dict[str, list[Choice]],
    rows: Dataset | None,
) -> dict[str, Callable[[float], float]]:
    """Weight -> what an error of the layer does to the outputs, by trying some; the error itself without rows."""
    if rows is None:
        return dict.fromkeys(points, float)
    errors: dict[str, list[float]] = {}
    changes: dict[str, dict[str, np.ndarray]] = {}
    for weight, found in points.items():
        layer = options[weight].layer
        ordered = sorted(found, key=lambda choice: choice.error)
        count = min(len(ordered), max(2, min(_PROBES, _PROBE_ELEMENTS // layer.kernel.size)))
        errors[weight] = []
        for place in np.linspace(0, len(ordered) - 1, count):
            choice = ordered[round(place)]
            made = decompose(layer.kernel, choice.method, choice.ranks, options[weight].moment, quick=True)
            changes[f"{weight} {len(errors[weight])}"] = {weight: layer.restored(made.kernel(layer.kernel.shape))}
            errors[weight].append(max(choice.error, 1e-9))
    few = max(_PROBE_ROWS // len(changes), 32)
    measured = sensitivity(model, data.signature, rows.take(slice(0, None, -(-len(rows) // few))), changes)
    return {
        weight: interpolated(found, [measured[f"{weight} {number}"] for number in range(len(found))])
        for weight, found in errors.items()
    }


def _factor(model: Model, log: Log, options: Options, choice: Choice) -> None:
    layer = options.layer
    made = options.built(choice)
    ranks = " and ".join(map(str, choice.ranks))
    lost = error(layer.kernel, made, options.moment)
    before, after = layer.macs(), choice.macs
    what = f"{before:,} multiplications became {after:,}" if before else f"{layer.elements():,} weights became "
    what += "" if before else f"{choice.elements:,}"
    replace(model.graph, layer, made)
    log.applied[f"{layer.kind} factored by {choice.method}"] += 1
    log.notes.append(f"{layer.weight}: {choice.method} of rank {ranks}, {what}, error {lost:.2g} of its output")


PASS = Pass(
    "low_rank",
    run,
    options={
        "rank": "energy",
        "energy": 0.9,
        "flops": 0.3,
        "method": "auto",
        "minimize": "auto",
        "weighted": True,
        "keep_first": True,
        "keep": "",
        **OPTIONS,
    },
    needs=("fold_affine",),
    lossless=False,
    learns=True,
)
