"""Which of several files of one kind is kept.

Where the model is sparse or clustered, a file that is so too, where one is within 12 dB of the best: that is what makes
it small once it is zipped. Then the highest signal-to-noise ratio, but not of a file that takes three times as long as
another within 12 dB of it, as kernels that a delegate has not do; of those within 1 dB of it, or beyond 65 dB, where no
answer changes any more, and within 5% of the bytes (the gzip bytes of a sparse or clustered model) of the smallest of
these, that of the engine that comes first.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfopt.export.tflite_kinds import Engine

_SIMILAR = 1.0  # dB
_ENOUGH = 65.0  # dB
_SAME_SIZE = 1.05
_NEAR = 12.0  # dB
_SLOW = 3.0  # so much that no measurement is unsure of it


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
    def loses(self) -> list[str]:
        """What the model had, and the file has not: "zeros", "clusters"."""
        return self.facts.get("loses") or []

    @property
    def stored(self) -> int:
        """The bytes that count: gzipped ones, where the model is sparse or clustered."""
        return self.size if self.facts.get("loses") is None else len(gzip.compress(self.path.read_bytes(), 6))

    @property
    def size(self) -> int:
        """In bytes."""
        return self.path.stat().st_size

    def __str__(self) -> str:
        floats = self.facts["float_ops"]
        left = f" with {sum(floats.values())} float ops" if floats and self.facts["static"] else ""
        lost = f", without the model's {' and '.join(self.loses)}" if self.loses else ""
        return f"{decibel(self.facts)} in {self.size:,} bytes{left}{lost}"


def choose(found: list[Candidate]) -> Candidate:
    """Returns the best of several files of one kind."""
    top = max(each.snr for each in found)
    near = [each for each in found if each.snr == top or each.snr >= top - _NEAR]
    least = min(len(each.loses) for each in near)
    near = [each for each in near if len(each.loses) == least]
    fastest = min(each.facts.get("seconds", 0.0) for each in near)
    found = [each for each in near if each.facts.get("seconds", 0.0) <= _SLOW * fastest]
    top = max(each.snr for each in found)
    similar = [each for each in found if each.snr == top or each.snr >= min(top - _SIMILAR, _ENOUGH)]
    smallest = min(each.stored for each in similar)
    return next(each for each in similar if each.stored <= _SAME_SIZE * smallest)


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
