"""Which of several files of one kind is kept.

The highest signal-to-noise ratio; among those within 1 dB of it, the smallest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfopt.export.tflite_kinds import Engine

_SIMILAR = 1.0  # dB


class Candidate(NamedTuple):
    """A file of one engine, with what the worker found out about it (tflite_examine)."""

    engine: Engine
    path: Path
    facts: dict[str, Any]

    @property
    def snr(self) -> float:
        """In dB; minus infinity where nothing was compared."""
        return -np.inf if self.facts["snr"] is None else self.facts["snr"]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size

    def __str__(self) -> str:
        floats = self.facts["float_ops"]
        left = f" with {sum(floats.values())} float ops" if floats and self.facts["static"] else ""
        return f"{decibel(self.facts)} in {self.size:,} bytes{left}"


def choose(found: list[Candidate]) -> Candidate:
    """Returns the best of several files of one kind."""
    top = max(each.snr for each in found)
    similar = [each for each in found if each.snr == top or each.snr >= top - _SIMILAR]
    return min(similar, key=lambda each: (each.size, -each.snr))


def left(facts: Mapping[str, Any]) -> str:
    """Returns the ops that compute in float, in words."""
    return ", ".join(f"{count} x {op}" for op, count in facts["float_ops"].items())


def decibel(facts: Mapping[str, Any]) -> str:
    """Returns the signal-to-noise ratio in words."""
    if facts["snr"] is None:
        return "not compared"
    return f"{facts['snr']:.1f} dB" if np.isfinite(facts["snr"]) else "no error"


def grouped(reasons: Mapping[str, str], colon: str) -> str:
    """Returns who failed and why, each reason once."""
    return "; ".join(
        " and ".join(by for by, why in reasons.items() if why == reason) + colon + reason
        for reason in dict.fromkeys(reasons.values())
    )
