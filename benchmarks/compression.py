"""Compression: what tfopt's recipes make of trained models, and TFMOT's of the same, by accuracy, bytes and latency.

    python -m benchmarks.compression                        runs what has no result yet; prints the tables
    python -m benchmarks.compression --cases=deep,mobilenet_slim --again
    python -m benchmarks.compression --cases=               prints the tables from the results so far

Every file is made, scored and timed in child processes; what fails is a cell with its reason. Accuracy is of one-row
calls of LiteRT on test rows that nothing was trained on, calibrated on or chosen by. gzip is of level 9. The
last column is the median time of the uncompressed file of the same type (recipe lossless) over that of the row, all
files of a model running in turns with one thread: above 1 is faster. Files and results stay in
benchmarks/.cache/compression.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import children
from benchmarks.compression_cases import BESIDE_TFMOT, BESIDE_TFMOT_SUBJECT, RUNS, Run
from benchmarks.compression_subjects import Subject, subject
from benchmarks.compression_tables import tables
from benchmarks.models import CACHE, REPOSITORY, parse_names

FILES = CACHE.parent / "compression"


def recipe(run: Run, path: Path) -> str:
    """Writes the recipe of a run to a file where it is none that ships; returns what --recipe takes."""
    if isinstance(run.passes, str):
        return run.passes
    from tfopt.recipe import NAMED

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": path.stem, "passes": [*NAMED["lossless"]["passes"], *run.passes]}, indent=1))
    return str(path)


def _optimize(run: Run, found: Subject, output: Path) -> dict:
    """Runs tfopt's command line; returns {"seconds", "command"}, with "error" where it failed."""
    rows = found.unlabelled if run.rows == "unlabelled" else found.representative
    command = [sys.executable, "-m", "pipelines.optimize", f"--model={found.saved_model}", f"--output_dir={output}"]
    command += [f"--recipe={recipe(run, output.with_suffix('.recipe.json'))}", f"--representative_data={rows}"]
    command += [f"--labels={found.train}"] if run.rows == "train" else []
    command += [f"--set={option}" for option in run.options]
    command += [f"--tflite={','.join(run.tflite)}", "--overwrite", "--measure_latency=false"]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    output.with_suffix(".log").write_text(" ".join(command) + "\n" + done.stdout + done.stderr)
    made = {"seconds": time.perf_counter() - start, "command": " ".join(command[1:])}
    if done.returncode == 2 or not (output / "report.json").is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        made["error"] = (lines[-1] if lines else f"exit code {done.returncode}")[:300]
    return made


def _scored(name: str, files: dict[str, Path]) -> dict[str, dict]:
    """Returns row -> score of the files that are there."""
    scores = {}
    for row, path in files.items():
        flags = [f"--path={path}", f"--subject={name}"]
        scores[row] = children.run("benchmarks.compression_score", flags) if path.is_file() else {"error": "no file"}
    return scores


def _baseline(found: Subject, again: bool) -> dict:
    """Scores the model as the recipe `lossless` leaves it, and float32 of the same, once for all runs of a subject."""
    output, result = FILES / found.name / "lossless", FILES / f"{found.name}.baseline.json"
    if result.is_file() and not again:
        return json.loads(result.read_text())
    made = _optimize(Run(found.name, "lossless", ""), found, output)
    made["files"] = _scored(found.name, {kind: output / "device" / f"{kind}.tflite" for kind in ("float32", "int8")})
    result.write_text(json.dumps(made, indent=1))
    return made


def _times(found: Subject, baseline: dict, made: dict) -> None:
    """Adds `ratio`: the time of the uncompressed file of the same type over that of each file."""
    from benchmarks.quantization_time import latencies

    before = {kind: cell["path"] for kind, cell in baseline["files"].items() if "path" in cell}
    files = {f"{kind} compressed": cell["path"] for kind, cell in made["files"].items() if "path" in cell}
    if "float32" not in before or not files:
        return
    times = latencies({**before, **files}, found)
    for kind, cell in made["files"].items():
        timed = times.get(f"{kind} compressed", {})
        if kind in before and "p50_ms" in timed and "p50_ms" in times[kind]:
            cell["ratio"], cell["p50_ms"] = times[kind]["p50_ms"] / timed["p50_ms"], timed["p50_ms"]


def _run(name: str, again: bool) -> None:
    """Runs one case, and writes its result."""
    run, result = RUNS[name], FILES / f"{name}.json"
    FILES.mkdir(parents=True, exist_ok=True)
    if result.is_file() and not again:
        return
    print(f"{name}: tfopt", file=sys.stderr, flush=True)
    found = subject(run.subject)
    output = FILES / found.name / name
    baseline = _baseline(found, False)
    made = _optimize(run, found, output)
    made["files"] = {}
    if "error" not in made:
        made["files"] = _scored(found.name, {kind: output / "device" / f"{kind}.tflite" for kind in run.tflite})
        _times(found, baseline, made)
    result.write_text(json.dumps(made, indent=1))


def _run_tfmot(again: bool) -> None:
    """Runs TFMOT's side of the comparison."""
    for name in BESIDE_TFMOT:
        result = FILES / f"tfmot_{name}.peer.json"
        if result.is_file() and not again:
            continue
        print(f"{name}: TFMOT", file=sys.stderr, flush=True)
        path = FILES / BESIDE_TFMOT_SUBJECT / f"tfmot_{name}.tflite"
        start = time.perf_counter()
        made = children.run("benchmarks.compression_peers", [f"--recipe={name}", f"--path={path}"], timeout=3600)
        made["seconds"] = time.perf_counter() - start
        if "error" not in made:
            made |= _scored(BESIDE_TFMOT_SUBJECT, {"file": path})["file"]
        result.write_text(json.dumps(made, indent=1))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = list(dict.fromkeys(run.group for run in RUNS.values()))
    known = f"of {', '.join(groups)} and {', '.join(RUNS)}"
    parser.add_argument("--cases", default=",".join(groups), help=f"comma-separated, {known}; all by default")
    parser.add_argument("--only", default="tfopt,tfmot", help="tfopt, tfmot; both by default")
    parser.add_argument("--again", action="store_true", help="also what has a result already")
    arguments = parser.parse_args()
    wanted = set(parse_names(arguments.cases) or ())
    if unknown := sorted(wanted - {*groups, *RUNS}):
        raise SystemExit(f"unknown case {', '.join(unknown)}; known: {known}")
    chosen = [name for name, run in RUNS.items() if {name, run.group} & wanted]
    if "tfmot" in arguments.only and any(RUNS[name].group == "tfmot" for name in chosen):
        _run_tfmot(arguments.again)
    for name in chosen if "tfopt" in arguments.only else []:
        _run(name, arguments.again)
    print(tables(FILES))


if __name__ == "__main__":
    main()
