"""prune_channels: takes whole channels out of layers, those that matter least, and trains what is left.

    min sum_c worth(c)   over the channels c that go,   FLOPs <= (1 - share) FLOPs before

Which channels go together is in `tfopt.channels`, what they are worth in `tfopt.importance`. Tensors and files shrink
for real, and every runtime is faster with them: there is no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tfopt import importance as worths
from tfopt.channels.choose import by_worth, uniform
from tfopt.channels.compensate import compensate
from tfopt.channels.groups import Channels, masked
from tfopt.channels.names import short
from tfopt.channels.unshare import unshare
from tfopt.errors import TfoptError
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.recovery import OPTIONS, recover
from tfopt.rewrite import Log
from tfopt.sensitivity import sensitivity

_TARGETS = ("flops", "params")
_SCOPES = ("global", "uniform", "sensitivity")
_RULE = "channels"
_ROWS = 256  # that sensitivity is measured on


def run(
    model: Model,
    log: Log,
    data: Data,
    target: str = "flops",
    share: float = 0.5,
    importance: str = "auto",
    scope: str = "global",
    round_to: int = 8,
    max_share: float = 0.8,
    compensation: bool = True,
    steps: int = 1,
    step_epochs: int = 1,
    **training: Any,
) -> None:
    """Prunes channels, in place.

    Args:
      model: the model.
      log: gets what went, what cannot and why, and how the loss fell.
      data: rows to weigh channels by and to recover on; without any, weights alone decide and nothing is trained.
      target: what `share` is of: "flops" or "params".
      share: how much of it is to go.
      importance: "taylor" (wants rows), "l1", "l2", "bn_scale" (before fold_affine alone), or "auto": "taylor" where
        there are rows, else "l2".
      scope: "global" (worth against what is saved, over all layers), "uniform" (the same share of each layer), or
        "sensitivity" (global, with the worth of each layer scaled to the error that halving it alone brings).
      round_to: numbers of channels are multiples of this; smaller layers have smaller steps.
      max_share: the most of a layer that goes.
      compensation: whether kernels that read channels that go are changed so that those that stay stand in for them,
        where there are rows.
      steps: in how many rounds the target is reached, with training after each.
      step_epochs: of the training after every round but the last.
      **training: see `tfopt.recovery.OPTIONS`; the epochs are those of the last training.

    Raises:
      TfoptError: an option out of range, nothing that can go, or a target that cannot be reached.
    """
    rows = data.rows or data.labelled
    _check(target, share, importance, scope, round_to, max_share, steps)
    if importance == "auto":
        importance = "l2" if rows is None else "taylor"
    if (importance == "taylor" or scope == "sensitivity") and rows is None:
        data.need_rows(f"prune_channels: {'importance=taylor' if importance == 'taylor' else 'scope=sensitivity'}")
    unshare(model.graph)
    channels = Channels(model, log, _RULE)
    if not channels.groups:
        reasons = "; ".join(dict.fromkeys(log.refused.values())) or "it has no convolution or matrix product"
        raise TfoptError(f"prune_channels: no channel of the model can go: {reasons}")
    start, parameters = _cost(channels, target), channels.parameters(channels.everything())
    before = start(channels.everything())
    flops = 2 * channels.macs(channels.everything())
    sizes = {group.name: len(group.classes) for group in channels.groups}
    for step in range(1, steps + 1):
        wanted = before * (1 - share) ** (step / steps)
        if step > 1:
            channels = Channels(model)
        kept = _stored(data, step, channels)
        if kept is None:
            worth = _worth(importance, channels, model, data)
            kept = _choose(channels, model, data, worth, scope, _cost(channels, target), wanted, round_to, max_share)
            _store(data, step, kept)
        if compensation and rows is not None:
            log.applied["kernel compensated"] += compensate(channels, model, data.signature, rows, kept)
        log.applied["channel"] += int(np.count_nonzero(~kept))
        channels.cut(model, kept)
        model.graph.sweep()
        last = step == steps
        title = "prune_channels" if last else f"prune_channels {step}"
        recover(model, log, data, title, **(training if last else {**training, "epochs": step_epochs}))
    channels = Channels(model)
    left = {group.name: len(group.classes) for group in channels.groups}
    _report(log, sizes, left)
    after = _cost(channels, target)(channels.everything())
    log.notes.append(f"{flops:,.0f} FLOPs became {2 * channels.macs(channels.everything()):,.0f}")
    log.notes.append(f"{parameters:,} parameters became {channels.parameters(channels.everything()):,}")
    if after > before * (1 - share) * 1.001:
        log.warnings.append(
            f"prune_channels: {1 - after / before:.0%} of the {target} went, not {share:.0%}: no more can go with "
            f"max_share={max_share}"
        )


def _check(target: str, share: float, importance: str, scope: str, round_to: int, max_share: float, steps: int) -> None:
    for name, value, known in (
        ("target", target, _TARGETS),
        ("importance", importance, ("auto", *worths.BY)),
        ("scope", scope, _SCOPES),
    ):
        if value not in known:
            raise TfoptError(f"prune_channels: {name}: choose from {', '.join(known)}; received {value!r}")
    for name, share_of in (("share", share), ("max_share", max_share)):
        if not 0 < share_of < 1:
            raise TfoptError(f"prune_channels: {name} must be above 0 and below 1, received {share_of}")
    for name, count in (("round_to", round_to), ("steps", steps)):
        if count < 1:
            raise TfoptError(f"prune_channels: {name} must be at least 1, received {count}")


def _cost(channels: Channels, target: str) -> Callable[[np.ndarray], float]:
    return channels.macs if target == "flops" else lambda kept: float(channels.parameters(kept))


def _worth(importance: str, channels: Channels, model: Model, data: Data) -> np.ndarray:
    if importance == "taylor":
        return worths.taylor(channels, model, data.signature, data.need_rows("prune_channels"), data.seed)
    if importance == "bn_scale":
        return worths.batch_norm_scale(channels, model)
    return worths.magnitude(channels, model, 1 if importance == "l1" else 2)


def _choose(
    channels: Channels,
    model: Model,
    data: Data,
    worth: np.ndarray,
    scope: str,
    cost: Callable[[np.ndarray], float],
    wanted: float,
    round_to: int,
    max_share: float,
) -> np.ndarray:
    if scope == "uniform":
        kept = uniform(channels, worth, lambda kept: cost(kept) <= wanted, round_to, max_share)
        return channels.spare(kept, worth)
    scale = None
    if scope == "sensitivity":
        halves = {}
        for group in channels.groups:
            halves[group.name] = channels.everything()
            halves[group.name][group.classes[np.argsort(worth[group.classes])[: len(group.classes) // 2]]] = False
        rows = data.need_rows("prune_channels").take(slice(0, _ROWS))
        changes = {name: masked(channels, model, kept) for name, kept in halves.items()}
        errors = sensitivity(model, data.signature, rows, changes)
        scale = {name: error / max(float(worth[~halves[name]].sum()), 1e-30) for name, error in errors.items()}
    return channels.spare(by_worth(channels, worth, cost, wanted, round_to, max_share, scale), worth)


def _stored(data: Data, step: int, channels: Channels) -> np.ndarray | None:
    """What a run that was killed had chosen: a gradient summed in another order may choose otherwise."""
    file = data.checkpoint / f"channels_{step}.npy" if data.checkpoint else None
    if file is None or not file.exists():
        return None
    kept = np.load(file)
    return kept if kept.shape == (channels.classes.total,) else None


def _store(data: Data, step: int, kept: np.ndarray) -> None:
    if data.checkpoint:
        data.checkpoint.mkdir(parents=True, exist_ok=True)
        np.save(data.checkpoint / f"channels_{step}.npy", kept)


def _report(log: Log, sizes: dict[str, int], left: dict[str, int]) -> None:
    names = short(list(sizes))
    changed = [f"{names[name]} {size} -> {left.get(name, 1)}" for name, size in sizes.items()]
    log.notes.append(f"channels of each layer: {', '.join(changed)}")


PASS = Pass(
    "prune_channels",
    run,
    options={
        **{"target": "flops", "share": 0.5, "importance": "auto", "scope": "global", "round_to": 8, "max_share": 0.8},
        **{"compensation": True, "steps": 1, "step_epochs": 1},
        **OPTIONS,
    },
    needs=("prune_graph",),
    lossless=False,
    learns=True,
    keeps=("sparsity", "clusters"),
)
