"""How the channels of a model are weighed and chosen: what `prune_channels` is told, put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from tfopt import importance as worths
from tfopt.channels.choose import by_worth, uniform
from tfopt.channels.compensate import Moments, redundancy
from tfopt.channels.groups import Channels, masked
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.model import Model
from tfopt.passes import Data
from tfopt.sensitivity import sensitivity

SCOPES = ("global", "uniform", "sensitivity")
_ROWS = 256  # that sensitivity is measured on

Cost = Callable[[np.ndarray], float]


@dataclasses.dataclass(frozen=True)
class Rules:
    """By what channels go; see `tfopt.passes.prune_channels.run`."""

    importance: str
    scope: str
    round_to: int
    max_share: float

    def __post_init__(self):
        for name, value, known in (
            ("importance", self.importance, worths.BY),
            ("scope", self.scope, SCOPES),
        ):
            if value not in known:
                raise TfoptError(f"prune_channels: {name}: choose from {', '.join(known)}; received {value!r}")
        if not 0 < self.max_share < 1:
            raise TfoptError(f"prune_channels: max_share must be above 0 and below 1, received {self.max_share}")
        if self.round_to < 1:
            raise TfoptError(f"prune_channels: round_to must be at least 1, received {self.round_to}")


def chooser(
    channels: Channels, model: Model, data: Data, rules: Rules, moments: Moments
) -> Callable[[Cost, float], np.ndarray]:
    """Weighs the channels of a model once.

    Args:
      channels: the model's.
      model: stays as it is.
      data: rows, where the rules want any.
      rules: by what channels go.
      moments: what layers read, where kernels will be compensated; empty otherwise.

    Returns:
      (cost of a mask over the classes, the most that it may be) -> the mask.
    """
    worth = _worth(rules.importance, channels, model, data)
    if rules.scope == "uniform":
        return lambda cost, most: channels.spare(
            uniform(channels, worth, lambda kept: cost(kept) <= most, rules.round_to, rules.max_share), worth
        )
    if moments:
        worth = redundancy(channels, moments, worth)
    scale = None
    if rules.scope == "sensitivity":
        rows = data.need_rows("prune_channels: scope=sensitivity")
        scale = _errors(channels, model, data.signature, rows.take(slice(0, _ROWS)), worth)
    return lambda cost, most: channels.spare(
        by_worth(channels, worth, cost, most, rules.round_to, rules.max_share, scale), worth
    )


def _worth(importance: str, channels: Channels, model: Model, data: Data) -> np.ndarray:
    if importance == "taylor":
        rows = data.need_rows("prune_channels: importance=taylor")
        return worths.taylor(channels, model, data.signature, rows, data.seed)
    if importance == "bn_scale":
        return worths.batch_norm_scale(channels, model)
    return worths.magnitude(channels, model, 1 if importance == "l1" else 2)


def _errors(channels: Channels, model: Model, signature: str, rows: Dataset, worth: np.ndarray) -> dict[str, float]:
    """Group -> the error that halving it alone brings, over the worth of that half."""
    halves = {}
    for group in channels.groups:
        halves[group.name] = channels.everything()
        halves[group.name][group.classes[np.argsort(worth[group.classes])[: len(group.classes) // 2]]] = False
    changes = {name: masked(channels, model, kept) for name, kept in halves.items()}
    errors = sensitivity(model, signature, rows, changes)
    return {name: error / max(float(worth[~halves[name]].sum()), 1e-30) for name, error in errors.items()}
