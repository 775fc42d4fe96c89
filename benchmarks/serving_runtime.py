"""Latency on the stock TensorFlow runtime: tfopt against the original and against the best of its peers.

    python -m benchmarks.serving_runtime
    python -m benchmarks.serving_runtime --models=resnet50 --batches=1 --profile

All candidates of a model stand side by side in one process, each in a v1 session with 2 threads, and run in turns, in
a new random order every round. A ratio is the median over rounds of the two times in that round, so that what else the
machine does hits both; the interval is a 95% bootstrap over rounds. Above 1 means that tfopt is faster.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import children
from benchmarks.models import CACHE, SEED, all_models, parse_names

THREADS = 2
GOALS = {"mobilenet_v2": 1.4, "resnet50": 1.3, "kws-ds-cnn": 1.2}  # against the original, batch 1
NEVER_BELOW = 0.97  # against the best peer
COLUMNS = ("original", "frozen", "optimize_for_inference", "graph_transform", "grappler", "tfopt")
SHORTEST = 0.005  # seconds: a time is that of as many calls as last this long


def _programs(directory: str, scratch: str) -> tuple[dict, dict[str, str]]:
    """Returns (column -> its program, column -> why there is none)."""
    from benchmarks import peers

    programs, failures = {}, {}
    for column in COLUMNS:
        try:
            programs[column] = peers.Program(peers.build(column, directory, scratch), THREADS)
        except Exception as error:  # whatever a tool raises is its result
            failures[column] = children.one_line(error)
    return programs, failures


def _measure(name: str, directory: str, sizes: list[int], seconds: float | None) -> dict[int, dict]:
    """Returns batch size -> what `_times` gives, or what `_profile` gives where `seconds` is None."""
    from benchmarks import peers, samples

    meta = peers.read_meta_graph(directory)
    inputs = meta.signature_def[peers.pick_signature(meta.signature_def)].inputs
    with tempfile.TemporaryDirectory() as scratch:
        programs, failures = _programs(directory, scratch)
    results: dict[int, dict] = {}
    for size in sizes:
        batch = samples.draw(name, inputs, size)
        fixed = [x.shape[0] for x in batch.values() if x.ndim and x.shape[0] != size]
        running, reasons = {}, dict(failures)
        for column, program in programs.items():
            try:
                program.run(batch)
                running[column] = program
            except Exception as error:  # whatever a tool's graph raises is its result
                reasons[column] = children.one_line(error)
        if fixed:
            results[size] = {"error": f"its batch is fixed at {fixed[0]}"}
        elif "original" in reasons:
            results[size] = {"error": reasons["original"]}
        elif seconds is None:
            results[size] = _profile(running, batch)
        else:
            results[size] = {"times": _times(running, batch, seconds), "failures": reasons}
    return results


def _times(programs: dict, batch: dict, seconds: float) -> dict[str, list[float]]:
    """Returns column -> seconds per call, one number a round."""
    calls = {}
    for column, program in programs.items():
        for _ in range(3):
            start = time.perf_counter()
            program.run(batch)
            once = time.perf_counter() - start
        calls[column] = max(1, int(SHORTEST / once))
    times: dict[str, list[float]] = {column: [] for column in programs}
    order, rng = list(programs), np.random.default_rng(SEED)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["original"]) < 10:
        rng.shuffle(order)
        for column in order:
            start = time.perf_counter()
            for _ in range(calls[column]):
                programs[column].run(batch)
            times[column].append((time.perf_counter() - start) / calls[column])
    return times


def ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """Returns the median of slow/fast, paired by round, and its 95% bootstrap interval."""
    ratios = np.array(slow) / np.array(fast)
    draws = np.random.default_rng(SEED).integers(0, len(ratios), (2000, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), (2.5, 97.5))
    return float(np.median(ratios)), float(low), float(high)


def _profile(programs: dict, batch: dict) -> dict:
    """Returns column -> op -> (milliseconds per call, nodes), from a full trace, median of 15 calls."""
    import tensorflow as tf

    v1, found = tf.compat.v1, {}
    for column, program in programs.items():
        candidate = program.candidate
        feeds = {candidate.inputs[key]: value for key, value in batch.items()}
        options = v1.RunOptions(trace_level=v1.RunOptions.FULL_TRACE)
        runs: list[collections.Counter] = []
        nodes: collections.Counter = collections.Counter()
        for _ in range(15):
            metadata = v1.RunMetadata()
            program.session.run(list(candidate.outputs.values()), feeds, options, metadata)
            spent: collections.Counter = collections.Counter()
            nodes.clear()
            for device in metadata.step_stats.dev_stats:
                for stats in device.node_stats:
                    op = stats.timeline_label.split(" = ")[-1].split("(")[0] or stats.node_name
                    spent[op] += stats.op_end_rel_micros - stats.op_start_rel_micros
                    nodes[op] += 1
            runs.append(spent)
        found[column] = {op: (float(np.median([run[op] for run in runs])) / 1e3, nodes[op]) for op in nodes}
    return found


def _print_profile(name: str, batch_size: int, found: dict) -> None:
    if "error" in found:
        print(f"{name}, batch {batch_size}: {found['error']}")
        return
    ops = collections.Counter()
    for spent in found.values():
        for op, (milliseconds, _) in spent.items():
            ops[op] = max(ops[op], milliseconds)
    print(f"\n{name}, batch {batch_size}: milliseconds in kernels of each op (nodes run)\n")
    print(f"| op | {' | '.join(found)} |")
    print("|---" * (len(found) + 1) + "|")
    for op, _ in ops.most_common(14):
        cells = [f"{x[op][0]:.2f} ({x[op][1]})" if op in x else "-" for x in found.values()]
        print(f"| {op} | {' | '.join(cells)} |")
    sums = [f"{sum(t for t, _ in x.values()):.2f} ({sum(n for _, n in x.values())})" for x in found.values()]
    print(f"| all | {' | '.join(sums)} |", flush=True)


def _row(name: str, batch_size: int, found: dict) -> str:
    if "error" in found:
        return f"| {name} | {batch_size} | {found['error']} |" + " |" * (len(COLUMNS) + 1)
    times = found["times"]
    medians = {column: float(np.median(x)) for column, x in times.items()}
    cells = [f"{medians['original'] * 1e3:.2f} ms"]
    verdict = [] if "tfopt" in times else ["tfopt does not run"]
    for column in COLUMNS[1:]:
        cells.append(_interval(ratio(times["original"], times[column])) if column in times else "does not run")
    ran = [column for column in medians if column not in ("original", "tfopt")]
    if "tfopt" in times and ran:
        best = min(ran, key=medians.get)
        versus = ratio(times[best], times["tfopt"])
        cells.append(f"{_interval(versus)} {best}")
        if versus[0] < NEVER_BELOW:
            verdict.append(f"below {NEVER_BELOW} of the best peer")
    else:
        cells.append("no peer runs")
    goal = GOALS.get(name) if batch_size == 1 else None
    if goal and "tfopt" in times and ratio(times["original"], times["tfopt"])[0] < goal:
        verdict.append(f"below the goal of {goal}")
    return f"| {name} | {batch_size} | {' | '.join(cells)} | {'; '.join(verdict) or 'ok'} |"


def _interval(values: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*values)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="", help="comma-separated names; all by default")
    parser.add_argument("--batches", default="1,8", help="comma-separated batch sizes")
    parser.add_argument("--seconds", type=float, default=20, help="of measuring, for each model and batch size")
    parser.add_argument("--profile", action="store_true", help="print time by op instead of ratios")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--json", default=str(CACHE.parent / "serving_runtime.json"), help="where the numbers go")
    arguments = parser.parse_args()
    output = Path(arguments.json)
    sizes = [int(x) for x in arguments.batches.split(",")]
    seconds = None if arguments.profile else arguments.seconds
    if arguments.measure:
        output.write_text(json.dumps(_measure(*arguments.measure, sizes, seconds)))
        return
    results: dict[str, dict] = {}
    if not arguments.profile:
        titles = ["model", "batch", *COLUMNS, "tfopt against the best peer", ""]
        print(f"| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|")
    for name, directory in all_models(parse_names(arguments.models)).items():
        flags = [f"--batches={arguments.batches}", f"--seconds={arguments.seconds}"]
        flags += ["--profile"] if arguments.profile else []
        answer = children.run("benchmarks.serving_runtime", ["--measure", name, directory, *flags])
        results[name] = answer
        output.write_text(json.dumps(results))
        for size in sizes:
            found = answer if "error" in answer else answer[str(size)]
            if arguments.profile:
                _print_profile(name, size, found)
            else:
                print(_row(name, size, found), flush=True)
        print(name, file=sys.stderr)


if __name__ == "__main__":
    main()
