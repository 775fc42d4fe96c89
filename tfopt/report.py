"""The report of a run: what was done, what was refused and why, and what each artifact costs and gains.

Pure data (dataclasses that go to JSON and back) and its two drawings: a table for the terminal and one
HTML page that opens offline. The schema is documented in docs/report.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

SCHEMA_VERSION = 1


@dataclass
class Refusal:
    """A rewrite that matched and was declined, with the reason."""

    rule: str
    node: str
    reason: str


@dataclass
class Step:
    """The record of one pass.

    Attributes:
        weight_bytes_before, weight_bytes_after: bytes of all weights, as the model holds them.
        applied: rule -> number of times it was applied.
        max_error: largest difference of the outputs before and after, relative to the output's scale;
            None where it was not verified.
        status: "applied" | "no effect" | "undone" | "unverified".
        seconds: wall time, verification included.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    nodes_before: int = 0
    nodes_after: int = 0
    weight_bytes_before: int = 0
    weight_bytes_after: int = 0
    applied: dict[str, int] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    max_error: float | None = None
    status: str = "applied"
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Metric:
    """A measured quality: the value of metric `name` over `samples` labelled rows."""

    name: str
    value: float
    samples: int


@dataclass
class Artifact:
    """One thing on disk, with its measurements; None is "not measured".

    Attributes:
        name: "original", "serving", "float32", "int8", ...
        kind: "saved_model" | "tflite".
        bytes, gzip_bytes: all files of the artifact, raw and gzipped.
        max_abs_error: largest absolute difference to the original's outputs on the same inputs.
        max_rel_error: max|a - b| / max|original| per output; the worst output.
        agreement: share of rows with the same top class as the original, where the output is a class score.
        rejected: why it was not emitted (accuracy bar, missing kernel, crash), else None.
    """

    name: str
    kind: str
    path: str = ""
    bytes: int = 0
    gzip_bytes: int = 0
    parameters: int | None = None
    flops: int | None = None
    max_abs_error: float | None = None
    max_rel_error: float | None = None
    agreement: float | None = None
    accuracy: Metric | None = None
    latency_ms_p50: float | None = None
    latency_ms_p95: float | None = None
    peak_memory_bytes: int | None = None
    rejected: str | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """A whole run.

    Attributes:
        created: ISO 8601 time, with the zone.
        model: path, origin, signatures (list of {name, inputs: [{name, dtype, shape}], outputs: [...]}), nodes,
            parameters, state (variables), tables, assets.
        recipe: name and passes, as read.
        verify: how equivalence was checked ("on", "off", ...), in words.
        artifacts: the one called "original" is what ratios refer to.
        data: where representative and evaluation rows came from, and how many.
    """

    schema_version: int = SCHEMA_VERSION
    created: str = ""
    command: str = ""
    seed: int = 0
    environment: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    verify: str = ""
    steps: list[Step] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain dicts and lists."""
        return dataclasses.asdict(self)
