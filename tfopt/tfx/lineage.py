"""Where an artifact comes from: the executions and artifacts behind it, read from ML Metadata.

Executions and artifacts are the two kinds of nodes of one directed graph without cycles, and events are its edges. A
cached execution has the same outputs as the one that made them; an artifact's producer here is the one that made it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from ml_metadata.metadata_store import MetadataStore
from ml_metadata.proto import metadata_store_pb2 as mlmd

from tfopt.errors import TfoptError, one_line, printable

PUSHED = "PushedModel"
_INPUTS = (mlmd.Event.INPUT, mlmd.Event.DECLARED_INPUT)
_OUTPUTS = (mlmd.Event.OUTPUT, mlmd.Event.DECLARED_OUTPUT)
_UPSTREAM = mlmd.LineageSubgraphQueryOptions.UPSTREAM
_MAX_HOPS = 100  # of which an execution and its output are two
# What TFX writes beside what a person asks for.
_NOISE = ("tfx_version", "is_external", "name", "state", "stats_dashboard_link", "sample_rate_by_split")
_FORMATS = ("output_data_format", "output_file_format")  # numbers of enums


@dataclasses.dataclass(frozen=True)
class Artifact:
    """One artifact.

    Attributes:
      properties: those of its type and custom ones, but for TFX's own notes and empty ones.
      producer: the id of the execution that made it; None for one that was imported.
    """

    id: int
    type: str
    uri: str
    properties: dict[str, Any]
    producer: int | None = None


@dataclasses.dataclass(frozen=True)
class Execution:
    """One execution.

    Attributes:
      component: its id in the pipeline.
      state: COMPLETE, CACHED, FAILED, ...
      parameters: of the component, but for empty ones.
      seconds: from its begin to its end.
      inputs: (name, id of the artifact).
      outputs: the same; those of a cached execution are an earlier one's.
      cached: ids of the executions that took its outputs from the cache.
    """

    id: int
    component: str
    type: str
    state: str
    parameters: dict[str, Any]
    seconds: float = 0.0
    inputs: tuple[tuple[str, int], ...] = ()
    outputs: tuple[tuple[str, int], ...] = ()
    cached: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Lineage:
    """A part of the graph.

    Attributes:
      metadata: the file.
      roots: ids of the artifacts that were asked for.
    """

    metadata: str
    roots: tuple[int, ...]
    artifacts: dict[int, Artifact]
    executions: dict[int, Execution]

    def to_json(self) -> str:
        """The same as JSON, with lists of artifacts and executions in the order of their ids."""
        lists = {name: list(getattr(self, name).values()) for name in ("artifacts", "executions")}
        whole = {"metadata": self.metadata, "roots": self.roots, **lists}
        return json.dumps(whole, indent=1, default=dataclasses.asdict) + "\n"


def trace(metadata: str | Path, artifact_id: int | None = None, pushed: str | None = None) -> Lineage:
    """Reads everything that an artifact was made from.

    Args:
      metadata: the SQLite file of ML Metadata; it is only read.
      artifact_id: of any artifact.
      pushed: the directory that a Pusher or DevicePusher wrote to, or a version in it: the latest one there. Without
        either it is the last PushedModel of each component, pushed or not.

    Raises:
      TfoptError: the file is not there or none of ML Metadata, or there is no such artifact.
    """
    store = open_store(metadata)
    if artifact_id is not None:
        roots = [artifact.id for artifact in store.get_artifacts_by_id([artifact_id])]
        if not roots:
            raise TfoptError(f"{metadata}: no artifact has the id {artifact_id}")
    else:
        roots = _pushed(store, str(metadata), pushed)
    query = mlmd.LineageSubgraphQueryOptions(max_num_hops=_MAX_HOPS, direction=_UPSTREAM)
    query.starting_artifacts.filter_query = among(roots)
    return graph(store, str(metadata), query, roots)


def draw(lineage: Lineage) -> str:
    """Draws the way back from each root as a tree; what was drawn before is only named."""
    lines: list[str] = []
    seen: set[int] = set()
    drawn: set[int] = set()

    def artifact(number: int, label: str, first: str, rest: str) -> None:
        this = lineage.artifacts[number]
        if number in seen:
            lines.append(f"{first}{label}{this.type} {this.id} (see above)")
            return
        lines.append(f"{first}{label}{this.type} {this.id}  {this.uri}")
        seen.add(number)
        producer = lineage.executions.get(this.producer or 0)
        lines.extend(_facts(this.properties, rest + ("│    " if producer else "     ")))
        if producer is not None:
            execution(producer, rest)

    def execution(this: Execution, prefix: str) -> None:
        if this.id in drawn:
            lines.append(f"{prefix}└─ {this.component}, execution {this.id} (see above)")
            return
        drawn.add(this.id)
        cached = f", cached in execution {', '.join(map(str, this.cached))}" if this.cached else ""
        lines.append(f"{prefix}└─ {this.component}, execution {this.id}, {this.state}{cached}")
        below = prefix + "   "
        lines.extend(_facts(this.parameters, below + ("│    " if this.inputs else "     ")))
        for name, number in this.inputs:
            last = (name, number) == this.inputs[-1]
            artifact(number, f"{name}: ", below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))

    for root in lineage.roots:
        if lines:
            lines.append("")
        artifact(root, "", "", "")
    return printable("\n".join(lines) + "\n")


def _facts(values: dict[str, Any], prefix: str, longest: int = 160) -> list[str]:
    lines = []
    for name, value in values.items():
        text = value if isinstance(value, str) else json.dumps(value)
        text = " ".join(text.split())
        lines.append(f"{prefix}{name} = {text if len(text) <= longest else text[: longest - 3] + '...'}")
    return lines


def open_store(metadata: str | Path) -> Any:
    """Opens the SQLite file of ML Metadata for reading; see `trace` for what it raises."""
    if not Path(metadata).is_file():
        raise TfoptError(f"{metadata}: no such file; it is what the pipeline calls its metadata (SQLite)")
    config = mlmd.ConnectionConfig()
    config.sqlite.filename_uri = str(metadata)
    config.sqlite.connection_mode = mlmd.SqliteMetadataSourceConfig.READONLY  # any other mode makes tables
    try:
        return MetadataStore(config)
    except Exception as error:  # what it raises depends on its version
        why = one_line(error).partition(" query: ")[0]
        raise TfoptError(f"{metadata}: not a database of ML Metadata: {why}") from error


def _pushed(store: Any, metadata: str, pushed: str | None) -> list[int]:
    """The ids of the models that were asked for."""
    latest: dict[str, int] = {}
    places = set()
    artifacts = sorted(store.get_artifacts_by_type(PUSHED), key=lambda artifact: artifact.id)
    for artifact in artifacts:
        place = artifact.custom_properties["pushed_destination"].string_value
        places.add(place)
        if pushed is None:
            latest[str(Path(artifact.uri).parent)] = artifact.id
        elif place and _absolute(pushed) in (_absolute(place), str(Path(_absolute(place)).parent)):
            latest[""] = artifact.id
    if not latest and pushed is not None:
        known = ", ".join(sorted(places - {""})[-3:]) or "nothing"
        raise TfoptError(f"{metadata}: no model was pushed to {pushed}; what was pushed last: {known}")
    if not latest:
        raise TfoptError(f"{metadata}: holds no {PUSHED}; name an artifact by --artifact_id")
    return sorted(latest.values())


def _absolute(path: str) -> str:
    return path.rstrip("/") if "://" in path else str(Path(path).resolve())


def among(ids: Iterable[int]) -> str:
    """A filter of MLMD for these ids."""
    return f"id IN ({', '.join(map(str, ids))})"


def graph(store: Any, metadata: str, query: Any, roots: Iterable[int]) -> Lineage:
    """Reads a part of the graph.

    Args:
      store: an open store.
      metadata: its file.
      query: LineageSubgraphQueryOptions.
      roots: see `Lineage`.
    """
    found = store.get_lineage_subgraph(query)
    types = {each.id: each.name for each in (*found.artifact_types, *found.execution_types)}
    nodes = {context.id: context.name for context in found.contexts if context.type == "node"}
    component = {
        each.execution_id: nodes[each.context_id].partition(".")[2]
        for each in found.associations
        if each.context_id in nodes
    }
    states = {each.id: each.last_known_state for each in found.executions}
    makers: dict[int, list[int]] = {}
    links: dict[tuple[int, bool], list[tuple[str, int]]] = {}
    for event in found.events:
        output = event.type in _OUTPUTS
        if not output and event.type not in _INPUTS:
            continue
        name = next((step.key for step in event.path.steps if step.key), "")
        links.setdefault((event.execution_id, output), []).append((name, event.artifact_id))
        if output:
            makers.setdefault(event.artifact_id, []).append(event.execution_id)
    for each in makers.values():  # the one that made it comes first
        each.sort(key=lambda number: (states.get(number) == mlmd.Execution.CACHED, number))
    artifacts = {
        each.id: Artifact(
            each.id,
            types.get(each.type_id, each.type),
            each.uri,
            _values(each.properties) | _values(each.custom_properties),
            makers.get(each.id, [None])[0],
        )
        for each in sorted(found.artifacts, key=lambda artifact: artifact.id)
    }
    executions = {
        each.id: Execution(
            each.id,
            component.get(each.id) or types.get(each.type_id, each.type).rpartition(".")[2],
            types.get(each.type_id, each.type),
            mlmd.Execution.State.Name(each.last_known_state),
            _values(each.properties) | _values(each.custom_properties),
            (each.last_update_time_since_epoch - each.create_time_since_epoch) / 1000,
            tuple(sorted(links.get((each.id, False), []))),
            tuple(sorted(links.get((each.id, True), []))),
            tuple(sorted({n for others in makers.values() if others[0] == each.id for n in others[1:]})),
        )
        for each in sorted(found.executions, key=lambda execution: execution.id)
    }
    return Lineage(metadata, tuple(roots), artifacts, executions)


def _values(properties: Any) -> dict[str, Any]:
    """Properties as Python values, in the order of their names; JSON texts, which TFX indents, on one line."""
    found = {}
    for name in sorted(properties):
        kind = properties[name].WhichOneof("value")
        value: Any = getattr(properties[name], kind) if kind else None
        if kind == "struct_value":
            value = json_format.MessageToDict(value)
            value = value.get("__value__", value)
        elif kind == "proto_value":
            value = value.type_url
        if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            with contextlib.suppress(ValueError):  # where it only looks like JSON
                value = json.dumps(json.loads(value))
        if name not in (*_NOISE, *_FORMATS) and value not in (None, "", "{}", "[]", "null"):
            found[name] = value
    return found
