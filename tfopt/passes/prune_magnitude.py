"""prune_magnitude: sets the smallest weights of kernels to zero, and trains the others to make up for them.

    w = m v     m = [score of v above a threshold], v trained towards what the original says   (Han et al. 2015)

The scores are in `tfopt.pruning.sparsity`, how m changes while v is trained in `tfopt.pruning.masks`.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfopt import recovery
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.passes.quantize import decibel
from tfopt.pruning.kernels import CONVOLUTION, DEPTHWISE, EMBEDDING, Kernel, kernels
from tfopt.pruning.masks import Masks, Timing
from tfopt.pruning.moments import Moments
from tfopt.pruning.sparsity import Layer, Pattern, Rule, zeros
from tfopt.rewrite import Log, Refused
from tfopt.trainable import demote, promote

_COMPARED = 128  # rows
_GAIN = 3.0  # dB
_LISTED = 60  # layers in a note
_GZIPPED = 1 << 28  # more bytes than this are not compressed to see how small they would be


def run(
    model: Model,
    log: Log,
    data: Data,
    sparsity: float = 0.8,
    scope: str = "global",
    criterion: str = "lamp",
    pattern: str = "",
    schedule: str = "polynomial",
    begin: float = 0.0,
    end: float = 0.5,
    frequency: int = 0,
    skip: str = "",
    first: float = 0.5,
    last: float = 1.0,
    depthwise: float = 0.0,
    embeddings: bool = False,
    **training: Any,
) -> None:
    """Prunes the kernels of the signature that the data are of, in place.

    Args:
      model: the model.
      log: gets the share of zeros of each layer, what is left dense and why, and how the loss fell.
      data: the rows to train on; without any the smallest weights go at once, and nothing is trained. With `epochs` 0
        they serve to restore what each layer gives on average (see `tfopt.pruning.moments`).
      sparsity: the share of zeros in all kernels that are pruned, together.
      scope: "global" takes from each layer what it has to give, "layer" the same share from each.
      criterion: by which weights of several layers are compared: "lamp" or "magnitude" (see `tfopt.pruning.sparsity`).
      pattern: "" for any weights, "2:4" (N:M), which decides the share too, or "1x4" (blocks).
      schedule: "polynomial", "constant" (all at once, chosen anew until `end`; so N:M too) or "one_shot" (all
        at once, for good).
      begin, end: from and until which share of the training the masks change.
      frequency: steps from one change to the next; 0 for some 50 changes in all.
      skip: regular expression; kernels of a node that it matches from the start, by its name, its op or the name of
        the weight, are left as they are.
      first, last: the largest share that convolutions on the inputs, and last layers, may lose.
      depthwise: the largest share that depthwise kernels may lose; 0 leaves them out.
      embeddings: whether tables that are looked up are pruned too.
      **training: see `tfopt.recovery.OPTIONS`.

    Raises:
      TfoptError: an option that cannot be, nothing that can be pruned, or a model that cannot be trained.
    """
    limits = {"first": first, "last": last, "depthwise": depthwise, "embeddings": float(embeddings)}
    for name, value in limits.items():
        if not 0 <= value <= 1:
            raise TfoptError(f"prune_magnitude: {name} must be in [0, 1], received {value}")
    if not 0 < sparsity < 1:
        raise TfoptError(f"prune_magnitude: sparsity must be more than 0 and less than 1, received {sparsity}")
    try:
        rule = Rule(scope, criterion, Pattern.parse(pattern))
        # N:M in steps is worse than at once: 98.3 and 99.1% for LeNet-5 (99.25%) after two epochs.
        at_once = rule.pattern.of and schedule == "polynomial"
        timing = Timing("constant" if at_once else schedule, begin, end, frequency)
    except TfoptError as error:
        raise TfoptError(f"prune_magnitude: {error}") from error
    if data.engine is not None:
        settings, options = (begin, end, frequency, skip, embeddings), {**recovery.OPTIONS, **training}
        data.engine.prune(model, log, data, sparsity, pattern, schedule, *settings, options)
        return
    promoted = promote(model, data.signature)
    try:
        found = kernels(model, promoted)
        layers = _layers(found, model, log, rule.pattern, skip, limits)
        if not layers:
            reasons = "; ".join(dict.fromkeys(log.refused.values())) or "it has no convolution and no matrix product"
            raise TfoptError(f"prune_magnitude: no kernel of the model can be pruned: {reasons}")
        before = {name: model.weights[name] for name in layers}
        share = 1.0 if rule.pattern.of else sparsity
        rows = data.rows or data.labelled
        if rows is not None and not training.get("epochs", recovery.OPTIONS["epochs"]):
            dense, moments = model.copy(), Moments(model, data.signature, rows)
            _cut(model, layers, rule, share)
            _restore(model, dense, moments, log, data.signature, rows)
        masks = Masks({name: model.weights[name] for name in promoted}, layers, rule, share, timing)
        trained = recovery.recover(
            model,
            log,
            data,
            "prune_magnitude",
            transform=masks.transform,
            schedule=masks.schedule,
            names=promoted,
            **training,
        )
        # Where nothing was trained, or the training ended before the schedule; otherwise this changes nothing.
        _cut(model, layers, rule, share)
        log.applied["kernel pruned"] += len(layers)
        _notes(model, log, found, before, sparsity, rule, trained is not None)
    finally:
        demote(model, promoted)


def _restore(model: Model, dense: Model, moments: Moments, log: Log, signature: str, rows: Dataset) -> None:
    """Restores means and spreads of layers, in place, where that brings the outputs much nearer to what they were."""
    few, cut = rows.take(slice(0, _COMPARED)), dict(model.weights)
    before = decibel(dense, model, signature, few)
    count = moments.restore(model)
    after = decibel(dense, model, signature, few)
    log.notes.append(
        f"outputs, signal to noise: {before:.1f} dB after pruning, {after:.1f} dB with the means and spreads of "
        "layers restored"
    )
    if after > before + _GAIN:
        log.applied["layer with its mean and spread restored"] += count
    else:  # where little of the signal is left, scaling it up is scaling up noise
        model.weights.update(cut)


def _cut(model: Model, layers: Mapping[str, Layer], rule: Rule, share: float) -> None:
    """Sets weights to zero, in place."""
    values = {name: model.weights[name] for name in layers}
    for name, stays in rule.masks(layers, values, share).items():
        model.weights[name] = np.where(stays, values[name], np.float32(0))


def _layers(
    found: list[Kernel], model: Model, log: Log, pattern: Pattern, skip: str, limits: Mapping[str, float]
) -> dict[str, Layer]:
    """Which kernels are pruned, and how far."""
    try:
        skipped = re.compile(skip) if skip else None
    except re.error as error:
        raise TfoptError(f"prune_magnitude: skip={skip!r} is no regular expression: {error}") from error
    layers = {}
    matched = False
    for kernel in found:
        value = model.weights[kernel.name]
        texts = (kernel.name, *kernel.nodes, *(model.graph.nodes[node].op for node in kernel.nodes))
        most = 1.0
        try:
            if skipped and any(skipped.match(text) for text in texts):
                matched = True
                raise Refused("left dense as skip wants it")
            if not np.isfinite(value).all():
                raise Refused("it is not finite")
            if model.graph.output_labels(kernel.name):
                raise Refused("it is a result of the graph")
            if kernel.kind == EMBEDDING and not limits["embeddings"]:
                raise Refused("a table that is looked up; embeddings prunes it too")
            if kernel.kind == DEPTHWISE:
                if not limits["depthwise"]:
                    raise Refused("a depthwise kernel: small, and each weight counts; depthwise says how far it may go")
                if pattern.of:
                    raise Refused("a depthwise kernel does not sum over input channels")
                most = limits["depthwise"]
            elif kernel.first and kernel.kind == CONVOLUTION:
                most = limits["first"]
            elif kernel.last:
                most = limits["last"]
            kernel.layout.check(pattern, value.shape)
            if pattern.of and most < 1 - pattern.keep / pattern.of:
                raise Refused(f"it may lose {most:.0%} of its weights, and {pattern.keep}:{pattern.of} takes more")
        except Refused as reason:
            log.refused["kernel pruned", kernel.nodes[0]] = str(reason)
            continue
        layers[kernel.name] = Layer(kernel.layout, most)
    if skipped and not matched:
        raise TfoptError(f"prune_magnitude: skip={skip!r} matches no kernel, no op and no node that reads one")
    return layers


def _notes(
    model: Model,
    log: Log,
    found: list[Kernel],
    before: Mapping[str, np.ndarray],
    sparsity: float,
    rule: Rule,
    trained: bool,
) -> None:
    """What a reader of the report should know."""
    after = {name: model.weights[name] for name in before}
    every = {kernel.name: model.weights[kernel.name] for kernel in found if kernel.kind != EMBEDDING} | after
    reached, all_zeros = zeros(after.values()), zeros(every.values())
    log.notes.append(
        f"{reached:.1%} of the {sum(w.size for w in after.values()):,} weights of {len(after)} kernels are zero "
        f"({zeros(before.values()):.1%} before), {all_zeros:.1%} of all {sum(w.size for w in every.values()):,} weights"
    )
    names = [kernel.nodes[0] for kernel in found if kernel.name in after]
    shared = len(os.path.commonpath(names)) if len(names) > 1 else 0
    parts = [
        f"{kernel.nodes[0][shared:].strip('/')} {zeros([after[kernel.name]]):.0%}"
        for kernel in found
        if kernel.name in after
    ]
    more = f" and {len(parts) - _LISTED} more" if len(parts) > _LISTED else ""
    log.notes.append(f"zeros by layer: {', '.join(parts[:_LISTED])}{more}")
    if not rule.pattern.of and reached < sparsity - 0.005:
        log.warnings.append(
            f"prune_magnitude: {reached:.1%} of zeros, not the {sparsity:.1%} that were asked for: the layers that may "
            "lose more are too small (first, last and depthwise say how far they may go)"
        )
    elif not rule.pattern.of and all_zeros < sparsity - 0.05:
        dense = sum(w.size for w in every.values()) - sum(w.size for w in after.values())
        log.warnings.append(
            f"prune_magnitude: {all_zeros:.1%} of all kernels is zero, not {sparsity:.1%}: layers with {dense:,} "
            "weights were left dense"
        )
    size = sum(w.nbytes for w in after.values())
    if size <= _GZIPPED:
        packed = [sum(len(zlib.compress(w.tobytes())) for w in part.values()) for part in (before, after)]
        log.notes.append(
            f"zeros are stored as numbers: these kernels still take {size:,} bytes in a file, and {packed[1]:,} once "
            f"it is zipped ({packed[0]:,} before)"
        )


PASS = Pass(
    "prune_magnitude",
    run,
    options={
        "sparsity": 0.8,
        "scope": "global",
        "criterion": "lamp",
        "pattern": "",
        "schedule": "polynomial",
        "begin": 0.0,
        "end": 0.5,
        "frequency": 0,
        "skip": "",
        "first": 0.5,
        "last": 1.0,
        "depthwise": 0.0,
        "embeddings": False,
        **recovery.OPTIONS,
    },
    needs=("fold_affine",),
    lossless=False,
    learns=True,
    makes=("sparsity",),
    keeps=("clusters", "sparsity"),
)
