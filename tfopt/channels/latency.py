"""How much has to go for a latency: found by building TFLite files and timing them in LiteRT.

What goes is chosen by an estimate of time (`Channels.time`); how far it holds on this machine is what is measured.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tfopt import measure
from tfopt.channels.groups import Channels
from tfopt.data import Dataset, probes
from tfopt.errors import TfoptError
from tfopt.export import saved_model, tflite
from tfopt.export.fixed_batch import fix_batch
from tfopt.model import Model
from tfopt.verify import features, input_specs

_ROUNDS = 4
_MOST = 0.95  # of the estimated time


def share_for(
    model: Model,
    signature: str,
    rows: Dataset | None,
    seed: int,
    share: float,
    choose: Callable[[float], np.ndarray],
) -> tuple[float, list[str]]:
    """The smallest share of the estimated time, of those tried, with which latency falls by a share.

    Args:
      model: whole.
      signature: that is timed, at batch 1.
      rows: of which one is the input; None draws one.
      seed: of what is drawn.
      share: of the median latency of the model's float32 file that has to go.
      choose: share of the estimated time -> mask over the classes of the model's channels.

    Returns:
      The share of the estimated time, and what was measured in words.

    Raises:
      TfoptError: the model cannot be converted or run, or gets no faster than asked for.
    """
    if rows is not None:
        inputs = rows.take(slice(0, 1)).inputs
    else:
        inputs = probes(input_specs(model, signature), seed, 1, features(model, signature)).inputs
    low, high, reached, notes = 0.0, _MOST, None, []
    tried = share
    for _ in range(_ROUNDS):
        cut = model.copy()
        Channels(cut).cut(cut, choose(tried))
        cut.graph.sweep()
        times = _times({"whole": model, "cut": cut}, signature, inputs)
        faster = 1 - times["cut"] / times["whole"]
        notes.append(f"estimated to take {tried:.0%} less: {times['cut']:.3g} ms of {times['whole']:.3g} ms")
        if faster >= share:
            high = reached = tried
        else:
            low = tried
        tried = (low + high) / 2
    if reached is None:
        raise TfoptError(f"prune_channels: latency falls by less than {share:.0%}, whatever goes: {'; '.join(notes)}")
    return reached, notes


def _times(models: Mapping[str, Model], signature: str, inputs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Median milliseconds of a call of each model's float32 file, measured in turn."""
    paths: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="tfopt-latency-") as work:
        for name, model in models.items():
            folder = Path(work) / name
            saved_model.save(fix_batch(model, 1), folder / "model", max_constant_bytes=1 << 31)
            (made,) = tflite.convert(folder / "model", ["float32"], folder)
            if made.path is None:
                raise TfoptError(f"prune_channels: target=latency: {made.error}")
            paths[name] = made.path
        times = measure.latency(paths, signature, inputs)
    for each in times.values():
        if each.p50_ms is None:
            raise TfoptError(f"prune_channels: target=latency: {each.error}")
    return {name: float(each.p50_ms or 0) for name, each in times.items()}
