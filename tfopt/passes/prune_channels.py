"""prune_channels: takes whole channels out of layers, those that matter least, and trains what is left.

    min sum_c worth(c)   over the channels c that go,   FLOPs <= (1 - share) FLOPs before

Which channels go together is in `tfopt.channels`, what they are worth in `tfopt.importance`. Tensors and files shrink
for real, and every runtime is faster with them: there is no mask.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.channels.compensate import compensate, second_moments
from tfopt.channels.decide import Cost, Rules, chooser
from tfopt.channels.groups import Channels
from tfopt.channels.latency import share_for
from tfopt.channels.names import short
from tfopt.channels.unshare import unshare
from tfopt.errors import TfoptError
from tfopt.model import Model
from tfopt.passes import Data, Pass
from tfopt.recovery import OPTIONS, recover
from tfopt.rewrite import Log

_TARGETS = ("flops", "params", "latency")
_RULE = "channels"
_REASONS = 3  # that an error names


def run(
    model: Model,
    log: Log,
    data: Data,
    target: str = "flops",
    share: float = 0.5,
    importance: str = "auto",
    scope: str = "auto",
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
      target: what `share` is of: "flops", "params", or "latency" (of the float32 file in LiteRT on this machine, which
        takes some conversions and measurements).
      share: how much of it is to go.
      importance: "taylor" (wants rows), "l1", "l2", "bn_scale" (before fold_affine alone), or "auto": "taylor" where
        there are rows, else "l2".
      scope: "global" (worth against what is saved, over all layers), "uniform" (the same share of each layer),
        "sensitivity" (global, with the worth of each layer scaled to the error that halving it alone brings), or
        "auto": "global", but "uniform" for l1 and l2, which say nothing across layers.
      round_to: numbers of channels are multiples of this; smaller layers have smaller steps.
      max_share: the most of a layer that goes.
      compensation: whether kernels are fitted to the rows, where there are any, so that channels that stay stand in for
        those that go.
      steps: in how many rounds the target is reached, with training after each.
      step_epochs: of the training after every round but the last.
      **training: see `tfopt.recovery.OPTIONS`; the epochs are those of the last training.

    Raises:
      TfoptError: an option out of range, nothing that can go, or a latency that cannot be reached.
    """
    rows = data.rows or data.labelled
    if importance == "auto":
        importance = "l2" if rows is None else "taylor"
    if scope == "auto":
        scope = "global" if importance in ("taylor", "bn_scale") else "uniform"
    rules = Rules(importance, scope, round_to, max_share)
    _check(target, share, steps)
    unshare(model.graph)
    channels = Channels(model, log, _RULE)
    if not channels.groups:
        reasons = list(dict.fromkeys(log.refused.values())) or ["it has no convolution or matrix product"]
        more = f"; and {len(reasons) - _REASONS} more reasons" if len(reasons) > _REASONS else ""
        raise TfoptError(f"prune_channels: no channel of the model can go: {'; '.join(reasons[:_REASONS])}{more}")
    start = _Size.of(channels)
    sizes = {group.name: len(group.classes) for group in channels.groups}
    for step in range(1, steps + 1):
        if step > 1:
            channels = Channels(model)
        store = data.checkpoint / f"channels_{step}.npz" if data.checkpoint else None
        restored = _restored(channels, store)
        if restored is None:
            moments = second_moments(channels, model, data.signature, rows) if compensation and rows is not None else {}
            choose = chooser(channels, model, data, rules, moments)
            if target == "latency" and step == 1:  # from here on it is a share of the estimated time
                tried = _at(choose, channels.time, start.time)
                share, notes = share_for(model, data.signature, rows, data.seed, share, tried)
                log.notes += notes
            kept = choose(_cost(channels, target), start.of_target(target) * (1 - share) ** (step / steps))
            whole = model.copy()
            channels.cut(model, kept)
            changed = []
            if moments and rows is not None:
                changed = compensate(channels, whole, model, moments, data.signature, rows, kept)
                log.applied["kernel compensated"] += len(changed)
            _save(model, store, kept, share, changed)
        else:
            kept, share, kernels = restored
            channels.cut(model, kept)
            for name, kernel in kernels.items():
                model.graph.set_constant(name, kernel)
        log.applied["channel"] += int(np.count_nonzero(~kept))
        model.graph.sweep()
        _recover(model, log, data, step, steps, step_epochs, training)
    channels = Channels(model)
    _report(log, sizes, {group.name: len(group.classes) for group in channels.groups}, start, _Size.of(channels))
    left = _Size.of(channels).of_target(target) / start.of_target(target)
    if left > (1 - share) * 1.001:
        log.warnings.append(
            f"prune_channels: {1 - left:.0%} of the {target} went, not {share:.0%}: no more can go with "
            f"max_share={max_share} and round_to={round_to}"
        )


@dataclasses.dataclass(frozen=True)
class _Size:
    """What a model costs: multiply-accumulates at batch 1, elements of float constants, and an estimate of time."""

    macs: float
    parameters: int
    time: float

    @classmethod
    def of(cls, channels: Channels) -> _Size:
        whole = channels.everything()
        return cls(channels.macs(whole), channels.parameters(whole), channels.time(whole))

    def of_target(self, target: str) -> float:
        return {"flops": self.macs, "params": self.parameters, "latency": self.time}[target]


def _check(target: str, share: float, steps: int) -> None:
    if target not in _TARGETS:
        raise TfoptError(f"prune_channels: target: choose from {', '.join(_TARGETS)}; received {target!r}")
    if not 0 < share < 1:
        raise TfoptError(f"prune_channels: share must be above 0 and below 1, received {share}")
    if steps < 1:
        raise TfoptError(f"prune_channels: steps must be at least 1, received {steps}")


def _cost(channels: Channels, target: str) -> Cost:
    costs: dict[str, Cost] = {"flops": channels.macs, "params": channels.parameters, "latency": channels.time}
    return costs[target]


def _at(choose: Callable[[Cost, float], np.ndarray], cost: Cost, whole: float) -> Callable[[float], np.ndarray]:
    return lambda share: choose(cost, whole * (1 - share))


def _recover(
    model: Model, log: Log, data: Data, step: int, steps: int, step_epochs: int, training: dict[str, Any]
) -> None:
    if step == steps:
        recover(model, log, data, "prune_channels", **training)
    elif training.get("epochs", OPTIONS["epochs"]):
        short_training = {"epochs": step_epochs, "min_steps": training.get("min_steps", OPTIONS["min_steps"]) // steps}
        recover(model, log, data, f"prune_channels {step}", **{**training, **short_training})


def _save(model: Model, file: Path | None, kept: np.ndarray, share: float, changed: list[str]) -> None:
    """Keeps what was chosen for a run that goes on after a kill: sums in another order might choose otherwise."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        kernels = {f"kernel {name}": model.graph.constant(name) for name in changed}
        np.savez(file.with_suffix(".tmp.npz"), kept=kept, share=share, **kernels)  # type: ignore[arg-type]
        file.with_suffix(".tmp.npz").replace(file)


def _restored(channels: Channels, file: Path | None) -> tuple[np.ndarray, float, dict[str, np.ndarray]] | None:
    if file is None or not file.exists():
        return None
    with np.load(file) as found:
        if found["kept"].shape != (channels.classes.total,):
            return None
        names = [name for name in found.files if name.startswith("kernel ")]
        kernels = {name.removeprefix("kernel "): found[name] for name in names}
        return found["kept"], float(found["share"]), kernels


def _report(log: Log, sizes: dict[str, int], left: dict[str, int], start: _Size, end: _Size) -> None:
    names = short(list(sizes))
    changed = [f"{names[name]} {size} -> {left.get(name, 1)}" for name, size in sizes.items()]
    log.notes.append(f"channels of each layer: {', '.join(changed)}")
    log.notes.append(f"{2 * start.macs:,.0f} FLOPs became {2 * end.macs:,.0f}")
    log.notes.append(f"{start.parameters:,} parameters became {end.parameters:,}")


PASS = Pass(
    "prune_channels",
    run,
    options={
        **{"target": "flops", "share": 0.5, "importance": "auto", "scope": "auto", "round_to": 8, "max_share": 0.8},
        **{"compensation": True, "steps": 1, "step_epochs": 1},
        **OPTIONS,
    },
    needs=("prune_graph",),
    lossless=False,
    learns=True,
    keeps=("sparsity", "clusters"),
)
