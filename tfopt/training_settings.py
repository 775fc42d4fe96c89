"""How a training is to go, and how it went."""

from __future__ import annotations

import dataclasses
import math

from tfopt.errors import TfoptError
from tfopt.optimizers import NAMES


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
      epochs: passes over the rows.
      batch_size: rows a step; a signature with a fixed batch has its own.
      learning_rate: its highest value; it rises for a short while, then falls to 0 along a cosine.
      optimizer: "adam", "adamw" or "sgd" (with Nesterov momentum 0.9).
      weight_decay: of adamw, for weights of two axes or more.
      alpha: the share of the labels in the loss of a labelled row, the teacher's being the rest.
      temperature: by which logits are divided before they are compared with the teacher's.
      teacher_until: the share of the steps after which rows with a label learn from it alone (Cho and Hariharan 2019).
      hints: inner tensors of the teacher that are to be found in the student too, and learned: "a, b" by name, or "a=c"
        where c is the student's (FitNets, Romero et al. 2015).
      hint_weight: of their loss.
      mixup: a of Beta(a, a), from which the share of each row in a mix of two is drawn: x' = l x + (1 - l) y, to which
        the teacher gives its own answer; for float inputs, and rows without a label. 0 is none.
      validation: the share of the rows that is not trained on but decides which weights are best; where that is less
        than one row, or 0, all rows do both.
      patience: epochs without a better validation loss after which the training stops; 0 never does.
      min_steps: where the epochs make fewer steps, as few rows do, there are more epochs, and more patience.
      max_steps: the most steps; 0 is no bound.
      gradient_clip: the largest norm of all gradients together; 0 is no bound.
      checkpoint_steps: how many steps a killed run loses at most, where it has a checkpoint directory; the state is
        saved after each epoch too.
      seed: of the order of the rows.
    """

    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 1e-4
    optimizer: str = "adam"
    weight_decay: float = 1e-4
    alpha: float = 0.5
    temperature: float = 1.0
    teacher_until: float = 1.0
    hints: str = ""
    hint_weight: float = 1.0
    mixup: float = 0.0
    validation: float = 0.1
    patience: int = 3
    min_steps: int = 0
    max_steps: int = 0
    gradient_clip: float = 1.0
    checkpoint_steps: int = 500
    seed: int = 0

    def __post_init__(self):
        if self.optimizer not in NAMES:
            raise TfoptError(f"optimizer: choose from {', '.join(NAMES)}; received {self.optimizer!r}")
        least = {"epochs": 0, "batch_size": 1, "patience": 0, "min_steps": 0, "max_steps": 0, "checkpoint_steps": 1}
        least |= {"learning_rate": 0, "weight_decay": 0, "gradient_clip": 0, "alpha": 0, "validation": 0, "seed": 0}
        least |= {"teacher_until": 0, "hint_weight": 0, "mixup": 0}
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise TfoptError(f"{name}: must be at least {bound}, received {getattr(self, name)}")
        if max(self.alpha, self.teacher_until) > 1 or self.validation >= 1 or not 0 < self.temperature < math.inf:
            raise TfoptError(
                "alpha and teacher_until must be at most 1, validation below 1 and temperature above 0; received "
                f"{self.alpha}, {self.teacher_until}, {self.validation} and {self.temperature}"
            )


@dataclasses.dataclass
class History:
    """What a training did.

    Attributes:
      losses: the mean loss of each epoch's steps.
      validation: the loss on the validation rows, before the first step and after each epoch.
      steps: how many steps were taken.
      best_loss: the lowest of these that counts.
      best_step: after which the weights are those that were kept; 0 for the initial ones.
      stopped: why it ended: "all epochs done", or what came before.
      rows: how many were trained on.
      validation_rows: how many decided which weights are best.
      apart: whether those were held back; otherwise, as there were too few, they are the rows trained on.
      trained: names of the variables that have a gradient.
      seconds: of this process; a run that was resumed took longer.
    """

    losses: list[float] = dataclasses.field(default_factory=list)
    validation: list[float] = dataclasses.field(default_factory=list)
    best_loss: float = math.inf
    steps: int = 0
    best_step: int = 0
    stopped: str = ""
    rows: int = 0
    validation_rows: int = 0
    apart: bool = True
    trained: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def summary(self) -> str:
        """What happened in one line, for a report."""
        before, after = max(self.validation[0], 0.0), max(self.best_loss, 0.0)  # rounding makes a divergence negative
        return (
            f"loss on {self.validation_rows:,} rows {'held back' if self.apart else 'trained on'}: "
            f"{before:.4g} before training, {after:.4g} after {self.best_step:,} of "
            f"{self.steps:,} steps on {self.rows:,} rows ({self.stopped})"
        )
