"""What the last run of a pipeline did, read from ML Metadata."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ml_metadata.proto import metadata_store_pb2 as mlmd

from tfopt.errors import TfoptError
from tfopt.tfx import lineage


def last_run(metadata: str | Path, pipeline: str) -> lineage.Lineage:
    """Reads the executions of the last run of a pipeline, and their inputs and outputs, which are the roots.

    Raises:
      TfoptError: as `trace`, or the pipeline never ran.
    """
    store = lineage.open_store(metadata)
    runs = [
        context
        for context in store.get_contexts_by_type("pipeline_run")
        if pipeline in [parent.name for parent in store.get_parent_contexts_by_context(context.id)]
    ]
    if not runs:
        raise TfoptError(f"{metadata}: no run of a pipeline {pipeline!r}")
    last = max(runs, key=lambda context: context.id)
    executions = [execution.id for execution in store.get_executions_by_context(last.id)]
    if not executions:
        return lineage.Lineage(str(metadata), (), {}, {})
    query = mlmd.LineageSubgraphQueryOptions(max_num_hops=1, direction=mlmd.LineageSubgraphQueryOptions.BIDIRECTIONAL)
    query.starting_executions.filter_query = lineage.among(executions)
    found = lineage.graph(store, str(metadata), query, [])
    roots = tuple(number for each in found.executions.values() for _, number in each.outputs)
    return dataclasses.replace(found, roots=roots)


def outputs(run: lineage.Lineage, kind: str) -> dict[str, Any]:
    """The artifacts of a type that a run gave, by component and name of the output."""
    return {
        f"{each.component}.{name}": run.artifacts[number]
        for each in run.executions.values()
        for name, number in each.outputs
        if run.artifacts[number].type == kind
    }


def summary(run: lineage.Lineage) -> str:
    """What ran and what came from the cache, the blessings with their reasons, and where models were pushed.

    A blessing that no component of the run looks at is left out.
    """
    lines = []
    used = {number for each in run.executions.values() for _, number in each.inputs}
    for each in run.executions.values():
        how = "from the cache" if each.state == "CACHED" else f"ran {each.seconds:.1f} s"
        lines.append(f"{each.component:<24}{how:<16}execution {each.id}")
    for name, artifact in outputs(run, "ModelBlessing").items():
        if artifact.id not in used:
            continue
        facts = artifact.properties
        lines += ["", f"{name}: {'blessed' if facts.get('blessed') else 'NOT BLESSED'}"]
        lines += [f"  {reason}" for reason in facts.get("reasons", "").split("; ") if reason]
        lines += [f"  {key} = {value:g}" for key, value in facts.items() if isinstance(value, float)]
    lines.append("")
    for name, artifact in outputs(run, "PushedModel").items():
        facts = artifact.properties
        lines.append(f"{name}: {facts['pushed_destination'] if facts.get('pushed') else 'nothing was pushed'}")
    return "\n".join(lines) + "\n"
