"""Quantization: tfopt's recipes beside other quantizers, by accuracy, bytes and latency.

    python -m benchmarks.quantization                              runs what has no result yet; prints the table
    python -m benchmarks.quantization --only=tfopt --again         tfopt's rows anew, the peers' as they were
    python -m benchmarks.quantization --only=latency --again       times the files that lie there
    python -m benchmarks.quantization --models=kws-ds-cnn --only=tfopt_int8,tflite_int8
    python -m benchmarks.quantization --only=                      prints the table from the results so far
    python -m benchmarks.quantization --serving                    the bfloat16 row (quantization_serving.py)

Every file is made and scored in child processes; what fails is a cell with its reason. Accuracy is of one-row calls
on rows that neither training, calibration nor a search has seen. A latency ratio is the median time of LiteRT's
float32 file (the plain converter's) over the row's, all files of a model running in turns with one thread: above 1 is
faster. Files and results stay in benchmarks/.cache/quantization.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import children
from benchmarks.models import CACHE, REPOSITORY, parse_names
from benchmarks.quantization_cases import CASES, Case, case
from benchmarks.quantization_peers import PEERS
from benchmarks.quantization_time import latencies

FILES = CACHE.parent / "quantization"
LATENCY = "latency"

# Row -> (recipe, its flags beside the common ones, the file that it emits).
# A search may look at `validation`, and training at `train`; `test` is for the score alone.
TFOPT_ROWS: dict[str, tuple[str, list[str], str]] = {
    "tfopt_float32": ("lossless", ["--tflite=float32"], "device/float32.tflite"),
    "tfopt_int8": ("device_int8", ["--tflite=int8"], "device/int8.tflite"),
    "tfopt_int4": ("device_int4", ["--tflite=int4"], "device/int4.tflite"),
    "tfopt_mixed": ("device_mixed", ["--eval_data={validation}", "--max_accuracy_drop=0.005"], "device/mixed.tflite"),
    "tfopt_qat_int8": ("qat_int8", ["--labels={train}", "--tflite=int8"], "device/int8.tflite"),
    "tfopt_qat_int4": ("qat_int4", ["--labels={train}", "--tflite=int4"], "device/int4.tflite"),
}
ROWS = (*PEERS, *TFOPT_ROWS)


def _optimize(found: Case, row: str, directory: Path) -> dict:
    """Runs tfopt's command line; returns {"path", "note"} or {"error"}."""
    recipe, flags, emitted = TFOPT_ROWS[row]
    flags = [flag.format(validation=found.validation, train=found.train) for flag in flags]
    output = directory / row
    if any(flag.startswith("--labels") for flag in flags):
        recipe = _with_epochs(recipe, found.epochs, directory / f"{row}.json")
    command = [sys.executable, "-m", "pipelines.optimize", f"--model={found.saved_model}", f"--output_dir={output}"]
    command += [f"--recipe={recipe}", f"--representative_data={found.representative}", *flags]
    command += ["--overwrite", "--measure_latency=false"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    (directory / f"{row}.log").write_text(" ".join(map(str, command)) + "\n" + done.stdout + done.stderr)
    if not (output / emitted).is_file():
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit code {done.returncode}"
        return {"error": (_rejected(output / "report.json", Path(emitted).stem) or reason)[:300]}
    return {"path": str(output / emitted), "note": ""}


def _rejected(report: Path, name: str) -> str:
    """Returns why the report says that an artifact was not emitted; "" where it does not say so."""
    artifacts = json.loads(report.read_text())["artifacts"] if report.is_file() else []
    return next((x["rejected"] for x in artifacts if x["name"] == name and x["rejected"]), "")


def _with_epochs(recipe: str, epochs: int, path: Path) -> str:
    """Writes a recipe that ships with tfopt with as many epochs of training as the peers get; returns the file."""
    from tfopt.recipe import NAMED

    steps = [step if isinstance(step, dict) else {"pass": step} for step in NAMED[recipe]["passes"]]
    steps = [step | {"epochs": epochs} if step["pass"] == "train_quantized" else step for step in steps]
    path.write_text(json.dumps(NAMED[recipe] | {"name": recipe, "passes": steps}))
    return str(path)


def _make(found: Case, row: str) -> dict:
    """Makes and scores one row's file.

    Returns:
        path, accuracy, samples, bytes, gzip, seconds (of making it), note; or error.
    """
    directory = FILES / found.name
    directory.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if row in PEERS:
        flags = [f"--model={found.name}", f"--peer={row}", f"--directory={directory}"]
        made = children.run("benchmarks.quantization_peers", flags, timeout=3600)
    else:
        made = _optimize(found, row, directory)
    if "error" in made:
        return made
    made["seconds"] = time.perf_counter() - start
    path = Path(made["path"])
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    made["bytes"] = sum(len(x.read_bytes()) for x in files)
    made["gzip"] = sum(len(gzip.compress(x.read_bytes(), 6)) for x in files)
    if path.suffix == ".xml":  # it has scored itself
        top, labels = np.load(path.with_suffix(".top.npy")), np.load(found.test)["label"]
        return made | {"accuracy": float((top == labels).mean()), "samples": len(top)}
    scored = children.run("benchmarks.quantization_cases", [f"--path={path}", f"--model={found.name}"])
    note = "; ".join(filter(None, [made["note"], scored.pop("note", "")]))
    return made | scored | {"note": note}


def _results_file(name: str) -> Path:
    return FILES / f"{name}.json"


def _read(name: str) -> dict[str, dict]:
    file = _results_file(name)
    return json.loads(file.read_text()) if file.is_file() else {}


def _run(name: str, wanted: list[str], again: bool) -> None:
    """Runs the wanted rows of one model that have no result yet, then times all its files against each other."""
    found, results = case(name), _read(name)
    for row in ROWS:
        if row in wanted and (again or row not in results):
            print(f"{name}: {row}", file=sys.stderr, flush=True)
            if row in TFOPT_ROWS:
                shutil.rmtree(FILES / name / row, ignore_errors=True)
            results[row] = _make(found, row)
            _results_file(name).write_text(json.dumps(results, indent=1))
    files = {row: cell["path"] for row, cell in results.items() if "path" in cell}
    if LATENCY in wanted and "float32" in files:
        print(f"{name}: latency", file=sys.stderr, flush=True)
        for row, timed in latencies(files, found).items():
            kept = {key: value for key, value in results[row].items() if key != "latency_error"}
            results[row] = kept | timed
        _results_file(name).write_text(json.dumps(results, indent=1))


def table(names: list[str], floats: str = "float32") -> str:
    """Returns the results in Markdown, a model after another; reasons and notes as numbered lines below."""
    titles = ["model", "row", "accuracy", "to float", "samples", "bytes", "gzip", "float32 time / time", "notes"]
    lines, notes = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"], []
    for name in names:
        results = _read(name)
        base = results.get(floats, {}).get("accuracy")
        for row, cell in ((row, results[row]) for row in ROWS if row in results):
            marks = []
            for text in filter(None, [cell.get("error"), cell.get("note"), cell.get("latency_error")]):
                if text not in notes:
                    notes.append(text)
                marks.append(f"[{notes.index(text) + 1}]")
            if "bytes" not in cell:
                lines.append(f"| {name} | {row} | none |" + " |" * 5 + f" {' '.join(marks)} |")
                continue
            accuracy = cell.get("accuracy")
            columns = [
                "does not run" if accuracy is None else f"{accuracy:.2%}",
                "" if None in (accuracy, base) else f"{100 * (accuracy - base):+.2f}",
                f"{cell.get('samples', 0):,}",
                f"{cell['bytes']:,}",
                f"{cell['gzip']:,}",
                f"{cell['ratio']:.2f}" if "ratio" in cell else "",
                " ".join(marks),
            ]
            lines.append(f"| {name} | {row} | {' | '.join(columns)} |")
    return "\n".join([*lines, "", *(f"[{i}] {text}" for i, text in enumerate(notes, 1))])


def _wanted(text: str) -> list[str]:
    """Returns the rows (and "latency") that --only names; "tfopt" and "peers" stand for all of theirs.

    Raises:
        SystemExit: a name is unknown.
    """
    groups = {"tfopt": [*TFOPT_ROWS], "peers": [*PEERS], "all": [*ROWS, LATENCY]}
    wanted = [row for name in text.split(",") if name for row in groups.get(name, [name])]
    if unknown := sorted(set(wanted) - {*ROWS, LATENCY}):
        raise SystemExit(f"unknown row {', '.join(unknown)}; known: {', '.join([*groups, *ROWS, LATENCY])}")
    return wanted


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="", help="comma-separated names; all by default")
    parser.add_argument("--only", default="all", help="comma-separated rows, peers, tfopt, latency; all by default")
    parser.add_argument("--again", action="store_true", help="also what has a result already")
    parser.add_argument("--serving", action="store_true", help="bfloat16 on the stock TensorFlow runtime instead")
    arguments = parser.parse_args()
    if arguments.serving:
        from benchmarks import quantization_serving

        print(quantization_serving.row())
        return
    names = parse_names(arguments.models) or list(CASES)
    if unknown := sorted(set(names) - set(CASES)):
        raise SystemExit(f"unknown model {', '.join(unknown)}; known: {', '.join(CASES)}")
    for name in names:
        _run(name, _wanted(arguments.only), arguments.again)
    print(table(names))


if __name__ == "__main__":
    main()
