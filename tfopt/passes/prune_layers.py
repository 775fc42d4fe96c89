"""prune_layers: takes whole residual blocks out of a model, those that change little, and trains what is left.

    y = x + f(x)  becomes  y = x        for the f of least effect, one after the other

Effect is the error of the outputs without f over their size, or 1 - cos(x, y) (Men et al. 2024, ShortGPT, block
influence). Depth is what costs latency where layers are small, so a block less may be worth more than its FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tfopt.calibration import values
from tfopt.channels.blocks import Block, find
from tfopt.channels.names import short
from tfopt.channels.spread import Product, Spread
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.graph import Graph
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.recovery import OPTIONS, recover
from tfopt.rewrite import Log
from tfopt.sensitivity import sensitivity

_TARGETS = ("flops", "blocks")
_IMPORTANCE = ("outputs", "similarity")
_ROWS = 256  # that effects are measured on


def run(
    model: Model,
    log: Log,
    data: Data,
    target: str = "flops",
    share: float = 0.25,
    importance: str = "outputs",
    **training: Any,
) -> None:
    """Removes blocks, in place.

    Args:
      model: the model.
      log: gets which blocks went, what each one's effect was, and how the loss fell.
      data: with rows, which effects are measured on.
      target: what `share` is of: "flops" of the model, or "blocks" (at least one goes).
      share: how much of it is to go.
      importance: "outputs" (error of the outputs when the block is skipped, on the model as it is by then, over the
        FLOPs saved where these are the target) or "similarity" (1 - cosine of the block's input and output).
      **training: see `tfopt.recovery.OPTIONS`.

    Raises:
      TfoptError: an option out of range, no rows, or no residual block.
    """
    for name, value, known in (("target", target, _TARGETS), ("importance", importance, _IMPORTANCE)):
        if value not in known:
            raise TfoptError(f"prune_layers: {name}: choose from {', '.join(known)}; received {value!r}")
    if not 0 < share <= 1:
        raise TfoptError(f"prune_layers: share must be above 0 and at most 1, received {share}")
    rows = data.need_rows("prune_layers").take(slice(0, _ROWS))
    spread = Spread(model)
    count, blocks = _goal(spread, target, share)
    before = now = _macs(model.graph, spread.products)
    gone: list[Block] = []
    names = short([block.name for block in blocks])
    while len(gone) < count and (target == "blocks" or now > before * (1 - share)):
        offers = {block.name: _macs(_without(model.graph, block), spread.products) for block in blocks}
        blocks = [block for block in blocks if offers[block.name] < now]  # a nested one may have gone with another
        if not blocks:
            break
        effects = _effects(importance, model, data.signature, rows, blocks)
        saved = {block.name: now - offers[block.name] if target == "flops" else 1.0 for block in blocks}
        least = min(blocks, key=lambda block: effects[block.name] / saved[block.name])
        said = ", ".join(f"{names[name]} {effect:.3g}" for name, effect in effects.items())
        log.notes.append(f"without {names[least.name]}; effects ({importance}): {said}")
        least.skip(model.graph)
        model.graph.sweep()
        now = offers[least.name]
        gone.append(least)
        blocks = [block for block in find(Spread(model)) if block.name in {other.name for other in blocks}]
    log.applied["residual block"] += len(gone)
    log.notes.append(f"{2 * before:,} FLOPs became {2 * now:,}")
    if target == "flops" and now > before * (1 - share):
        log.warnings.append(
            f"prune_layers: {1 - now / before:.0%} of the flops went, not {share:.0%}: no block is left"
        )
    recover(model, log, data, "prune_layers", **training)


def _goal(spread: Spread, target: str, share: float) -> tuple[int, list[Block]]:
    """The most blocks that may go, and all there are."""
    blocks = find(spread)
    if not blocks:
        raise TfoptError(
            "prune_layers: the model has no residual block: no sum x + f(x) of equal shapes in which f has a "
            "convolution or a matrix product and depends on x alone"
        )
    return len(blocks) if target == "flops" else max(1, round(share * len(blocks))), blocks


def _without(graph: Graph, block: Block) -> Graph:
    copy = graph.copy()
    block.skip(copy)
    copy.sweep()
    return copy


def _macs(graph: Graph, products: Sequence[Product]) -> int:
    return sum(product.macs for product in products if product.node in graph.nodes)


def _effects(importance: str, model: Model, signature: str, rows: Dataset, blocks: Sequence[Block]) -> dict[str, float]:
    if importance == "outputs":
        changes = {}
        for block in blocks:  # a branch of zeros, which broadcasts over the rows
            zeros = np.zeros([1, *(size or 1 for size in block.shape[1:])], np.float32)
            changes[block.name] = {block.branch: zeros}
        return sensitivity(model, signature, rows, changes)
    refs = list(dict.fromkeys(ref for block in blocks for ref in (block.entry, block.name)))
    cosines: dict[str, list[np.ndarray]] = {block.name: [] for block in blocks}
    for _, tensors in values(model, signature, refs, rows):
        for block in blocks:
            x, y = tensors[block.entry].astype(np.float64), tensors[block.name].astype(np.float64)
            norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
            cosines[block.name].append(((x * y).sum(axis=-1) / np.maximum(norms, 1e-12)).ravel())
    return {name: float(1 - np.concatenate(parts).mean()) for name, parts in cosines.items()}


PASS = Pass(
    "prune_layers",
    run,
    options={"target": "flops", "share": 0.25, "importance": "outputs", **OPTIONS},
    needs=("prune_graph",),
    lossless=False,
    learns=True,
    keeps=("sparsity", "clusters"),
)
