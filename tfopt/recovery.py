"""Training after a compression: the original says to the owner's rows what the compressed model is to say again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tfopt.model import Model
from tfopt.passes import Data
from tfopt.rewrite import Log
from tfopt.training import History, Settings, Transform, fine_tune
from tfopt.training_loop import Schedule

# Of every pass that recovers, with their defaults; see `Settings`.
OPTIONS: dict[str, Any] = {
    **{"epochs": 5, "min_steps": 500, "batch_size": 64, "learning_rate": 1e-3},
    **{"alpha": 0.5, "temperature": 1.0},
}


def settings_of(data: Data, options: dict[str, Any]) -> Settings:
    """How a pass with these options trains.

    Raises:
      TfoptError: an option that cannot be.
    """
    return Settings(**{**OPTIONS, "seed": data.seed, **options})


def recover(
    model: Model,
    log: Log,
    data: Data,
    title: str,
    *,
    transform: Transform | None = None,
    schedule: Schedule | None = None,
    names: Iterable[str] | None = None,
    **options: Any,
) -> History | None:
    """Trains a compressed model, in place; zeros and clusters stay (see `tfopt.invariants`).

    Args:
      model: the student.
      log: gets how the loss fell, or a warning where there are no rows to train on.
      data: the rows, and the original that teaches.
      title: of the progress bar, and of the checkpoint: a pass that trains several times gives each its own.
      transform, schedule, names: see `fine_tune`.
      **options: further fields of `Settings`, or those of OPTIONS that differ from the default.

    Returns:
      What happened; None where nothing was trained.

    Raises:
      TfoptError: the model cannot be trained.
    """
    settings = settings_of(data, options)
    if not settings.epochs:
        return None
    if data.rows is None and data.labelled is None:
        log.warnings.append(
            f"{title}: not recovered, there is nothing to train on; --representative_data (or --labels) gives rows"
        )
        return None
    history = fine_tune(
        model,
        data.signature,
        data.rows,
        data.teacher,
        data.labelled,
        settings,
        transform=transform,
        schedule=schedule,
        names=names,
        checkpoint=data.checkpoint / title.replace(" ", "_") if data.checkpoint else None,
        title=title,
    )
    log.notes.append(history.summary())
    return history
