"""The report of a run: what was done, what was refused and why, and what each artifact costs and gains.

Pure data (dataclasses that go to JSON and back) and its two drawings: a table for the terminal and one
HTML page that opens offline. The schema is documented in docs/report.md.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple

from tfopt.errors import TfoptError

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
        name: of the pass, with its options as the recipe gives them.
        weight_bytes_before, weight_bytes_after: bytes of all weights, as the model holds them.
        applied: rule -> number of times it was applied.
        max_error: largest difference of the outputs before and after, relative to the output's scale;
            None where it was not verified.
        status: "applied" | "no effect" | "undone" | "unverified" | "left out".
        notes: what else a reader should know, a sentence each.
        seconds: wall time, verification included.
        summary: what the pass is for, in one sentence for someone who never saw it.
        warnings: those of the notes that the owner of the model should look at first.
        sensitivity: what each layer brings to the outputs, of a pass that looks at that: {node, error, bits, bytes},
            error being the root of noise over signal when this layer alone is quantized to 4 bits, bits (32: float) and
            bytes what was chosen for it.
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
    summary: str = ""
    warnings: list[str] = field(default_factory=list)
    sensitivity: list[dict[str, Any]] = field(default_factory=list)


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
        zeros: share of the weights that are 0; of runs with a sparse or clustered model.
        entropy_bytes: what its weights would take, each tensor coded by its zero-order entropy; of such runs as well.
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
    zeros: float | None = None
    entropy_bytes: int | None = None


@dataclass
class Report:
    """A whole run.

    Attributes:
        created: ISO 8601 time, with the zone.
        model: path, origin, signatures (list of {name, inputs: [{name, dtype, shape}], outputs: [...]}),
            nodes, parameters, state (variables), tables, assets.
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

    def original(self) -> Artifact | None:
        """Returns the artifact that the others are compared with."""
        return next((artifact for artifact in self.artifacts if artifact.name == "original"), None)

    def to_json(self) -> str:
        """Returns the report as JSON; numbers that JSON has not are the strings "NaN", "Infinity", "-Infinity"."""
        return json.dumps(_plain(dataclasses.asdict(self)), indent=2, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, source: str = "report") -> Report:
        """Reads what `to_json` wrote.

        Args:
            text: the JSON.
            source: what to call it in errors, such as the name of the file.

        Raises:
            TfoptError: not a report, or one of a schema version that this version of tfopt does not know.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise TfoptError(f"{source}: not JSON: {error}") from error
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version is None:
            raise TfoptError(f"{source}: not a report of tfopt: it has no schema_version")
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise TfoptError(
                f"{source}: schema version {SCHEMA_VERSION} is the one that this tfopt reads, received {version!r}: "
                "use the version of tfopt that wrote it"
            )
        steps = [
            _build(source, Step, s, refused=[_build(source, Refusal, r) for r in _list(source, s, "refused")])
            for s in _list(source, values, "steps")
        ]
        artifacts = [
            _build(source, Artifact, a, accuracy=a.get("accuracy") and _build(source, Metric, a["accuracy"]))
            for a in _list(source, values, "artifacts")
        ]
        return _build(source, Report, values, steps=steps, artifacts=artifacts)

    def table(self) -> str:
        """Returns the run as text for a terminal, at most 120 columns wide."""
        from tfopt import report_table  # which draws the classes above

        return report_table.draw(self)

    def html(self) -> str:
        """Returns the run as one HTML page that needs nothing else."""
        from tfopt import report_page  # which draws the classes above

        return report_page.draw(self)


class RefusalGroup(NamedTuple):
    """Refusals of one rule for one reason."""

    rule: str
    reason: str
    nodes: list[str]


def group_refusals(refused: Iterable[Refusal]) -> list[RefusalGroup]:
    """Groups refusals by rule and reason, the most frequent first."""
    nodes: dict[tuple[str, str], list[str]] = {}
    for refusal in refused:
        nodes.setdefault((refusal.rule, refusal.reason), []).append(refusal.node)
    groups = [RefusalGroup(rule, reason, names) for (rule, reason), names in nodes.items()]
    return sorted(groups, key=lambda group: -len(group.nodes))


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    """Returns the value in JSON's types; NumPy's scalars and paths become numbers and strings."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, PurePath):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _build(source: str, cls: type, values: Any, **built: Any) -> Any:
    """Returns a dataclass from its JSON object, with the fields that are dataclasses themselves already built."""
    if not isinstance(values, dict):
        raise TfoptError(f"{source}: wants {cls.__name__} to be an object, received {type(values).__name__}")
    fields = {f.name: f.type for f in dataclasses.fields(cls)}
    if unknown := values.keys() - fields.keys():
        raise TfoptError(f"{source}: {cls.__name__} has no field {', '.join(sorted(unknown))}")
    floats = {name for name, kind in fields.items() if "float" in str(kind)}
    restored = {
        name: _NOT_FINITE.get(value, value) if name in floats and isinstance(value, str) else value
        for name, value in values.items()
    }
    try:
        return cls(**{**restored, **built})
    except TypeError as error:
        raise TfoptError(f"{source}: {cls.__name__}: {error}") from error


def _list(source: str, values: Any, name: str) -> list[dict[str, Any]]:
    items = values.get(name, []) if isinstance(values, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise TfoptError(f"{source}: wants '{name}' to be a list of objects")
    return items
