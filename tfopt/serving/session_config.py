"""Session options that travel with a model: `assets.extra/saved_model_config.pb`, where they gain.

TensorFlow Serving reads a tensorflow.serving.SavedModelConfig there. Of its session overrides, those for remote ops and
batch ops concern models that have such ops; the one left is `disable_meta_optimizer`, which turns grappler off. That is
worth it where the graph is optimized already and grappler's rewrites cost more than they give; it is measured.

Source: tensorflow_serving/servables/tensorflow/saved_model_config.proto (field numbers), saved_model_config_util.cc.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tqdm import tqdm

from tfopt.serving.warmup import Session, target
from tfopt.verify import difference

FILE = Path("assets.extra", "saved_model_config.pb")
_ROUNDS = 20
_ROUND_S = 0.05  # a round of one session is about this long
_WORTH = 1.05  # what nine of ten rounds must gain


@dataclasses.dataclass(frozen=True)
class Gain:
    """What `disable_meta_optimizer` does to requests.

    Attributes:
      ratio: time of a request without the override over the time with it; the median of rounds.
      least: the same in the tenth of the rounds that gained least.
      load_ratio: the same for loading and first answers, once.
      moved: the first output that moved beyond its bound, or None.
    """

    ratio: float
    least: float
    load_ratio: float
    moved: str | None

    @property
    def worth(self) -> bool:
        """Whether it gains beyond the noise, and answers stay."""
        return self.least >= _WORTH and self.moved is None

    def line(self) -> str:
        """For people."""
        figures = f"requests {self.ratio:.2f}x ({self.least:.2f}x in the worst tenth), first answers "
        figures += f"{self.load_ratio:.2f}x as fast without grappler"
        if self.moved:
            return f"no {FILE.name}: without grappler {self.moved}"
        return f"{FILE.name} turns grappler off: {figures}" if self.worth else f"no {FILE.name}: no gain: {figures}"


def serialized() -> bytes:
    """A SavedModelConfig {session_overrides {disable_meta_optimizer: true}}."""
    overrides = bytes([3 << 3 | 0, 1])  # field 3, a varint: true
    return bytes([1 << 3 | 2, len(overrides)]) + overrides  # field 1, a message


def of_others(directory: str | Path) -> bool:
    """Whether a model brought a file of its own, which must stay."""
    path = Path(directory) / FILE
    return path.is_file() and path.read_bytes() != serialized()


def measure(directory: str | Path, logs: Sequence[Any]) -> Gain:
    """Times requests in two sessions that take turns, with grappler and without.

    Args:
      directory: the version directory.
      logs: warmup requests; one of each signature is enough.

    Raises:
      TfoptError: the model cannot be run.
    """
    off = tf.compat.v1.ConfigProto()
    off.graph_options.rewrite_options.disable_meta_optimizer = True
    last = list({target(log)[1]: log for log in logs}.values())
    answers, loads = [], []
    with Session(directory) as warm:  # what a process does once is no matter of either
        warm(last[0])
    with Session(directory) as plain, Session(directory, off) as without:
        for session, config in ((plain, None), (without, off)):
            start = time.perf_counter()
            with Session(directory, config) as fresh:
                for log in last:
                    fresh(log)
            loads.append(time.perf_counter() - start)
            answers.append([session(log) for log in last])
        start = time.perf_counter()
        _run(plain, last, 1)
        count = max(1, int(_ROUND_S / (time.perf_counter() - start)))
        ratios = []
        for turn in tqdm(range(_ROUNDS), desc="session overrides", leave=False):
            order = (plain, without) if turn % 2 else (without, plain)
            times = {session is plain: _run(session, last, count) for session in order}
            ratios.append(times[True] / times[False])
    moved = next((d.broken for a, b in zip(*answers, strict=True) if (d := difference(a, b)).broken), None)
    median, least = np.quantile(ratios, [0.5, 0.1])
    return Gain(float(median), float(least), loads[0] / loads[1], moved)


def _run(session: Session, logs: Sequence[Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        for log in logs:
            session(log)
    return time.perf_counter() - start
