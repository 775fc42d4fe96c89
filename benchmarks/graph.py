"""What each tool leaves of a graph: nodes, affine nodes, bytes and error, one model a row, one tool a column.

    python -m benchmarks.graph                              every model of benchmarks.models
    python -m benchmarks.graph --models=resnet50,lstm --columns=grappler,tfopt

What --models and --columns leave out is shown as the last run measured it, so that one tool can be measured anew.
Prints Markdown and writes benchmarks/.cache/graph.json. A cell is "nodes / affine nodes left, bytes, error": nodes are
those that the signature's outputs need, function bodies included; error is the largest difference to the original,
run by its own loader, relative to the output's largest value. Each model is measured in a process of its own; if a
tool takes it down, that cell says so and a new process goes on with the next tool.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarks import children
from benchmarks.models import CACHE, all_models, parse_names

COLUMNS = ("original", "frozen", "optimize_for_inference", "graph_transform", "grappler", "tfopt")
BATCH = 2


def _reference(name: str, directory: str) -> tuple[dict, dict]:
    """Returns (batch, outputs) of a SavedModel by its own loader: a v1 session for TF1, else tf.saved_model.load."""
    import numpy as np
    import tensorflow as tf

    from benchmarks import peers, samples

    meta = peers.read_meta_graph(directory)
    signature = peers.pick_signature(meta.signature_def)
    batch = samples.draw(name, meta.signature_def[signature].inputs, BATCH)
    if meta.HasField("object_graph_def"):
        loaded = tf.saved_model.load(directory)
        results = loaded.signatures[signature](**{key: tf.constant(x) for key, x in batch.items()})
        return batch, {key: np.asarray(x) for key, x in results.items()}
    program = peers.Program(peers.serving(directory))
    results = program.run(batch)
    program.close()
    return batch, results


def _measure(name: str, directory: str, column: str) -> dict:
    from benchmarks import affine, peers

    cell: dict = {}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            candidate = peers.build(column, directory, scratch)
        except Exception as error:  # whatever a tool raises is its result
            return {"error": children.one_line(error)}
        counts = affine.count(candidate.graph, list(candidate.outputs.values()))
        cell |= {"nodes": counts.nodes, "leftovers": counts.leftovers, "bytes": candidate.bytes}
        cell |= {"notes": list(candidate.notes), "reasons": candidate.refusals}
        missing = peers.missing_functions(candidate.graph)
        if missing:
            cell["notes"].append(f"drops {len(missing)} functions that it still calls")
        try:
            batch, wanted = _reference(name, directory)
        except Exception as error:
            cell["notes"].append(f"the original cannot run: {children.one_line(error)}")
            return cell
        try:
            program = peers.Program(candidate)
            received = program.run(batch)
            cell["max_error"] = peers.relative_error(wanted, received)
            if column == "tfopt":
                reloaded = _reference(name, candidate.directory)[1]
                cell["max_error"] = max(cell["max_error"], peers.relative_error(wanted, reloaded))
        except Exception as error:
            cell["does_not_run"] = children.one_line(error)
    return cell


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _cell(cell: dict, footnotes: list[str]) -> str:
    def note(text: str) -> str:
        if text not in footnotes:
            footnotes.append(text)
        return f"[{footnotes.index(text) + 1}]"

    if not cell:
        return "not measured"
    if "error" in cell:
        return f"raises {note(cell['error'])}"
    error = f"{cell['max_error']:.1e}" if "max_error" in cell else "not run"
    if "does_not_run" in cell:
        error = f"does not run {note(cell['does_not_run'])}"
    marks = "".join(" " + note(x) for x in cell["notes"])
    return f"{cell['nodes']} / {len(cell['leftovers'])}, {_size(cell['bytes'])}, {error}{marks}"


def table(results: dict[str, dict[str, dict]], columns: list[str]) -> str:
    """Returns the Markdown table of model -> column -> cell, with footnotes, then tfopt's leftovers and reasons."""
    footnotes: list[str] = []
    lines = [f"| model | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for model, cells in results.items():
        lines.append(f"| {model} | " + " | ".join(_cell(cells.get(x, {}), footnotes) for x in columns) + " |")
    lines += ["", *(f"[{index}] {text}" for index, text in enumerate(footnotes, 1))]
    for model, cells in results.items():
        cell = cells.get("tfopt", {})
        for function, node, op in cell.get("leftovers", ()):
            reasons = "; ".join(sorted(set(cell["reasons"].get(node, ())))) or "NO REASON GIVEN"
            lines.append(f"- {model}: {op} {function and function + ':'}{node}: {reasons}")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="comma-separated names; all by default")
    parser.add_argument("--columns", default="", help=f"of {', '.join(COLUMNS)}; all by default")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--json", default=str(CACHE.parent / "graph.json"), help="where the numbers go")
    arguments = parser.parse_args()
    output = Path(arguments.json)
    if arguments.measure:
        name, directory, wanted = arguments.measure
        cells = {}
        for column in wanted.split(","):
            cells[column] = {"error": "takes the process down"}  # what remains if it does
            output.write_text(json.dumps(cells))
            cells[column] = _measure(name, directory, column)
            output.write_text(json.dumps(cells))
        return
    columns = parse_names(arguments.columns) or list(COLUMNS)
    results: dict[str, dict[str, dict]] = json.loads(output.read_text()) if output.is_file() else {}
    for name, directory in all_models(parse_names(arguments.models)).items():
        print(name, file=sys.stderr)
        rest = list(columns)
        while rest:
            found = children.run("benchmarks.graph", ["--measure", name, directory, ",".join(rest)])
            found = {rest[0]: found} if "error" in found else found
            results.setdefault(name, {}).update(found)
            rest = [x for x in rest if x not in found]
            output.write_text(json.dumps(results, indent=1))
    print(table(results, list(COLUMNS)))


if __name__ == "__main__":
    main()
