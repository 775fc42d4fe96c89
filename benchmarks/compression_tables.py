"""The tables of the compression benchmark, in Markdown, from the results in the cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import mnist
from benchmarks.compression_cases import BESIDE_TFMOT, BESIDE_TFMOT_SUBJECT, RUNS


def tables(files: Path) -> str:
    """Returns all tables, of the cases that have a result."""
    results = {name: json.loads((files / f"{name}.json").read_text()) for name in RUNS if _is(files / f"{name}.json")}
    before = {}
    for run in RUNS.values():
        if _is(file := files / f"{run.subject}.baseline.json"):
            before[run.subject] = json.loads(file.read_text())["files"]
    peers = {name: json.loads(f.read_text()) for name in BESIDE_TFMOT if _is(f := files / f"tfmot_{name}.peer.json")}
    return "\n\n".join([_deep(results, before), _rows(results, before), _beside(results, before, peers)])


def _is(file: Path) -> bool:
    return file.is_file()


def _lines(titles: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [titles, ["---"] * len(titles), *rows])


def _deep(results: dict[str, Any], before: dict[str, Any]) -> str:
    """Deep Compression's table: error and gzip bytes against the float32 weights, per seed and their mean."""
    titles = ["net, seed", "error before", "error after", "published", "bytes", "gzip", "float32 weights / gzip"]
    rows: list[list[str]] = []
    for net in mnist.NETS:
        found = []
        for seed in mnist.SEEDS:
            name = f"{net}_{seed}"
            cell = results.get(name, {}).get("files", {}).get("int8", {})
            if "accuracy" not in cell:
                if name in results:
                    rows.append([f"{net}, {seed}", "", results[name].get("error") or cell.get("error", "?")])
                continue
            original = before[name]["float32"]
            error = 1 - original["accuracy"], 1 - cell["accuracy"]
            ratio = 4 * original["parameters"] / cell["gzip"]
            found.append((*error, cell["bytes"], cell["gzip"], ratio))
            rows.append(_deep_row(f"{net}, {seed}", net, found[-1]))
        if found:
            rows.append(_deep_row(f"**{net}, mean of {len(found)}**", net, tuple(np.mean(found, 0))))
    return _lines(titles, rows)


def _deep_row(name: str, net: str, cell: tuple) -> list[str]:
    first, second, size, zipped, ratio = cell
    return [
        name,
        f"{first:.2%}",
        f"{second:.2%}",
        f"{mnist.PUBLISHED[net]:.2%}",
        f"{size:,.0f}",
        f"{zipped:,.0f}",
        f"{ratio:.1f}",
    ]


def _rows(results: dict[str, Any], before: dict[str, Any]) -> str:
    """The other runs: an uncompressed file and the compressed one of the same type in two lines."""
    titles = ["case", "file", "accuracy", "lost", "FLOPs", "parameters", "bytes", "gzip", "time / time", "seconds"]
    rows = []
    for name, result in results.items():
        run = RUNS[name]
        if run.group in ("deep", "tfmot"):
            continue
        if "error" in result:
            rows.append([name, "none", result["error"], *[""] * 7])
        base = before.get(run.subject, {})
        for kind, cell in result.get("files", {}).items():
            first = base.get(kind, {})
            if "accuracy" in first:
                rows.append([run.subject, f"{kind}, lossless", *_cells(first), "1.00", ""])
            if "accuracy" not in cell:
                rows.append([name, kind, cell.get("error", "?"), *[""] * 7])
                continue
            columns = _cells(cell, base.get("float32"))
            rows.append([f"**{name}**", kind, *columns, f"{cell.get('ratio', 0):.2f}", f"{result['seconds']:.0f}"])
    return _lines(titles, rows)


def _cells(cell: dict[str, Any], first: dict[str, Any] | None = None) -> list[str]:
    """Accuracy, points lost to the float32 original, FLOPs, parameters, bytes, gzip; with shares where there is one."""
    lost = f"{100 * (first['accuracy'] - cell['accuracy']):+.2f}" if first else ""
    flops = f"{cell['flops']:,}" + (f" ({cell['flops'] / first['flops'] - 1:+.0%})" if first else "")
    parameters = f"{cell['parameters']:,}" + (
        f" ({cell['parameters'] / first['parameters'] - 1:+.0%})" if first else ""
    )
    return [f"{cell['accuracy']:.2%}", lost, flops, parameters, f"{cell['bytes']:,}", f"{cell['gzip']:,}"]


def _beside(results: dict[str, Any], before: dict[str, Any], peers: dict[str, Any]) -> str:
    """TFMOT and tfopt on the same net, each as a line."""
    titles = ["recipe", "tool", "accuracy", "to TFMOT", "bytes", "gzip", "to TFMOT's", "seconds"]
    rows = []
    if original := before.get(BESIDE_TFMOT_SUBJECT, {}).get("float32"):
        rows.append(["none", "float32", f"{original['accuracy']:.2%}", "", f"{original['bytes']:,}"])
        rows[-1] += [f"{original['gzip']:,}", "", ""]
    for name, (_, kind) in BESIDE_TFMOT.items():
        peer = peers.get(name, {})
        own = results.get(f"tfmot_{name}", {})
        own = {**own, **own.get("files", {}).get(kind, {})}
        for tool, cell in (("TFMOT", peer), ("**tfopt**", own)):
            if "accuracy" not in cell:
                if cell:
                    rows.append([name, tool, cell.get("error", "?"), *[""] * 5])
                continue
            differs = tool != "TFMOT" and "accuracy" in peer
            accuracy = f"{100 * (cell['accuracy'] - peer['accuracy']):+.2f}" if differs else ""
            zipped = f"{cell['gzip'] / peer['gzip'] - 1:+.1%}" if differs else ""
            values = [f"{cell['accuracy']:.2%}", accuracy, f"{cell['bytes']:,}", f"{cell['gzip']:,}", zipped]
            rows.append([name, tool, *values, f"{cell['seconds']:.0f}"])
    return _lines(titles, rows)
