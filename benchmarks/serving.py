"""Serving, end to end on the loopback: bytes, CPU time of the server, latency at equal load, and the knee.

    python -m benchmarks.serving                       all parts but the soak
    python -m benchmarks.serving --parts=requests,ranking
    python -m benchmarks.serving --parts=soak --seconds=180

Both forms of a model are served at the same time, each by a tfopt-serve of its own, and asked in turns, so that what
else the machine does hits both. What is compared are ratios of medians over the turns. The CPU time is that of the
server's process: it holds tfopt-serve's own Python, which tensorflow_model_server has not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import serving_soak
from benchmarks import serving_subjects as subjects
from benchmarks.serving_subjects import Side

TURNS = 5
LOADED = ("kws-ds-cnn", "mobilenet_v2", "tfx-chicago-taxi")


@contextlib.contextmanager
def served(name: str, sides: list[Side], flags: tuple[str, ...] = ()) -> Iterator[list]:
    """Serves each side in a process of its own."""
    from tfopt.serving.server.child import running

    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(running([f"--model_name={name}", f"--model_base_path={side.base}", *flags]))
            for side in sides
        ]


def requests_of(name: str, side: Side, server, rows: list[dict], protocol: str = "grpc"):
    """Makes (target, serialized requests) of rows, one request for each element."""
    from tfopt.data import Dataset
    from tfopt.serving.loadtest import requests, signature
    from tfopt.serving.loadtest.plan import Target

    target = Target(
        server.rest if protocol == "rest" else server.grpc, protocol, model_name=name, signature_name=side.signature
    )
    asked = signature.read(target)
    made = []
    for row in rows:
        inputs = side.inputs(row)
        if set(inputs) == {""}:  # a picture, whatever the model calls its input
            inputs = {next(iter(asked.inputs)): inputs[""]}
        count = max(len(array) for array in inputs.values())
        once = frozenset(key for key, array in inputs.items() if len(array) != count)
        made += requests.from_rows(target, asked, Dataset(inputs, None, name, once), count)
    return target, made


def closed(target, requests, count: int, pid: int):
    """Asks one after the other."""
    from tfopt.serving.loadtest.plan import CLOSED, Plan
    from tfopt.serving.loadtest.run import run

    plan = Plan(mode=CLOSED, concurrency=1, warmup_s=0, duration_s=600, requests=count)
    result = run(target, requests, plan, server_pid=pid)
    assert not result.errors, (result.errors, result.messages)
    return result


def cost(name: str, sides: list[Side], rows: list[dict], protocol: str, count: int, per_request: int) -> list[dict]:
    """Bytes of a request, and CPU seconds of the server for 1,000 predictions (rows), of each side."""
    with served(name, sides) as servers:
        asked = [requests_of(name, side, server, rows, protocol) for side, server in zip(sides, servers, strict=True)]
        seconds: list[list[float]] = [[] for _ in sides]
        for turn in range(TURNS + 1):
            for index, (target, requests) in enumerate(asked):
                found = closed(target, requests, count, servers[index].pid)
                if turn:  # the first one warms up
                    seconds[index].append(found.server.cpu_seconds / (count * per_request) * 1000)
    return [
        {
            "bytes": round(statistics.mean(len(r.body) for r in requests)),
            "cpu_s_per_1000": statistics.median(times),
        }
        for (_, requests), times in zip(asked, seconds, strict=True)
    ]


def equal_on_all(name: str, sides: tuple[Side, Side], records: list[bytes], key: str) -> tuple[int, float]:
    """Asks both signatures for all examples; returns their number and the largest difference, relative to the scale."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    from tfopt.verify import difference

    worst = 0.0
    with served(name, list(sides)) as servers:
        stubs = [prediction_service_pb2_grpc.PredictionServiceStub(grpc.insecure_channel(s.grpc)) for s in servers]
        last = len(records) % 100
        for page in [*subjects.pages(records, key, 100), *([{key: np.array(records[-last:], object)}] if last else [])]:
            answers = []
            for side, stub in zip(sides, stubs, strict=True):
                request = predict_pb2.PredictRequest()
                request.model_spec.name, request.model_spec.signature_name = name, side.signature
                for input_name, array in side.inputs(page).items():
                    request.inputs[input_name].CopyFrom(tf.make_tensor_proto(array))
                answer = stub.Predict(request, timeout=60)
                answers.append({k: tf.make_ndarray(v) for k, v in answer.outputs.items()})
            found = difference(*answers)
            assert found.broken is None, found.broken
            worst = max(worst, found.relative)
    return len(records), worst


def part_requests() -> list[dict]:
    """The compact signature against tf.Examples."""
    lines = []
    for name in ("tfx-chicago-taxi", "tfx-penguin"):
        before, after, records, key = subjects.example_model(name)
        count, error = equal_on_all(name, (before, after), records, key)
        print(f"{name}: {count} examples answered alike, largest difference {error:.1e} of the scale", flush=True)
        for protocol in ("grpc", "rest"):
            for per_request in (1, 32):
                rows = subjects.pages(records[: 20 * per_request], key, per_request)
                a, b = cost(name, [before, after], rows, protocol, 200, per_request)
                lines.append(_compared(f"{name}, {protocol}, {per_request} rows", a, b))
    return lines


def part_ranking() -> list[dict]:
    """One user, 200 candidates."""
    rows = list(subjects.ranking_requests(20))
    data = subjects.records_file("ranking", list(rows[0]["examples"]))
    signature = "serving_default"
    before = subjects.original("ranking", signature)
    lines = []
    # TensorFlow Serving reads neither float16 nor uint16 from JSON.
    for protocol, floats in (("grpc", "float16"), ("rest", "float32")):
        after = subjects.optimized(
            f"ranking_{floats}",
            signature,
            "compact_signature",
            data,
            broadcast_inputs="user_*",
            set=(f"narrow_inputs.floats={floats}", f"narrow_inputs.rest={json.dumps(protocol == 'rest')}"),
        )
        a, b = cost("ranking", [before, after], rows, protocol, 200, 1)
        lines.append(_compared(f"ranking, {protocol}, 200 candidates", a, b))
    return lines


def _compared(what: str, before: dict, after: dict) -> dict:
    line = {"what": what, "before": before, "after": after}
    print(
        f"{what:42} {before['bytes']:>9,} -> {after['bytes']:>7,} bytes  "
        f"{before['cpu_s_per_1000']:8.3f} -> {after['cpu_s_per_1000']:7.3f} s CPU per 1,000  "
        f"{before['cpu_s_per_1000'] / after['cpu_s_per_1000']:.2f}x",
        flush=True,
    )
    return line


def _load_cases(models: list[str]) -> Iterator[tuple[str, Side, Side, list[dict]]]:
    for name in [name for name in LOADED if name in models and name != "tfx-chicago-taxi"]:
        yield (
            name,
            subjects.original(name, "serving_default"),
            subjects.optimized(name, "serving_default"),
            subjects.pictures(name, 16),
        )
    if "tfx-chicago-taxi" in models:
        before, after, records, key = subjects.example_model("tfx-chicago-taxi")
        yield "tfx-chicago-taxi", before, after, subjects.pages(records[:640], key, 32)


def part_load(models: list[str], seconds: float = 5.0) -> list[dict]:
    """P50 and p99 at equal offered load, and the knees."""
    from tfopt.serving.loadtest.plan import Plan
    from tfopt.serving.loadtest.run import run
    from tfopt.serving.loadtest.sweep import sweep

    lines = []
    for name, before, after, rows in _load_cases(models):
        with served(name, [before, after]) as servers:
            asked = [requests_of(name, s, server, rows) for s, server in zip((before, after), servers, strict=True)]
            single = []
            for (target, requests), server in zip(asked, servers, strict=True):
                closed(target, requests, 30, server.pid)
                single.append(closed(target, requests, 60, server.pid).latency.p50 / 1e3)
            plan = Plan(warmup_s=0.5, duration_s=2.5)
            knees = []
            for (target, requests), alone in zip(asked, single, strict=True):
                found = sweep(
                    lambda p, t=target, r=requests: run(t, r, p), plan, start=0.5 / alone, factor=1.5, resolution=0.15
                )
                knees.append(found.knee.plan.rate if found.knee else float("nan"))
            rate = 0.5 * knees[0]
            p50: list[list[float]] = [[], []]
            p99: list[list[float]] = [[], []]
            for turn in range(TURNS):
                for index in (0, 1) if turn % 2 else (1, 0):
                    target, requests = asked[index]
                    found = run(target, requests, Plan(rate=rate, warmup_s=0.5, duration_s=seconds, seed=turn))
                    assert not found.errors, found.errors
                    p50[index].append(found.latency.p50)
                    p99[index].append(found.latency.p99)
        medians = [[statistics.median(side) for side in figures] for figures in (p50, p99)]
        line = {"what": name, "rate": rate, "p50": medians[0], "p99": medians[1], "knees": knees}
        lines.append(line)
        print(
            f"{name:18} at {rate:7.1f}/s: p50 {_ratio(medians[0])}, p99 {_ratio(medians[1])}, "
            f"knee {knees[0]:.1f} -> {knees[1]:.1f}/s ({knees[1] / knees[0]:.2f}x)",
            flush=True,
        )
    return lines


def _ratio(pair: list[float]) -> str:
    return f"{pair[0]:.2f} -> {pair[1]:.2f} ms ({pair[0] / pair[1]:.2f}x)"


def part_stall() -> list[dict]:
    """A server that stands still for a second, and the generator's own limit."""
    from tfopt.serving.loadtest import self_test
    from tfopt.serving.loadtest.plan import CLOSED, Plan
    from tfopt.serving.loadtest.run import run

    side = subjects.original("kws-ds-cnn", "serving_default")
    lines = []
    with served("kws-ds-cnn", [side]) as (server,):
        target, requests = requests_of("kws-ds-cnn", side, server, subjects.pictures("kws-ds-cnn", 16))
        for mode in ("open", CLOSED):
            plan = Plan(mode=mode, rate=50, concurrency=1, warmup_s=1, duration_s=15)
            timers = [threading.Timer(5, os.kill, (server.pid, signal.SIGSTOP))]
            timers.append(threading.Timer(6, os.kill, (server.pid, signal.SIGCONT)))
            for timer in timers:
                timer.start()
            found = run(target, requests, plan)
            lines.append({"what": f"{mode} loop, 1 s stall", "p50": found.latency.p50, "p99": found.latency.p99})
            print(f"{mode} loop, server paused for 1 s: p50 {found.latency.p50:.1f} ms, p99 {found.latency.p99:.1f} ms")
    limit = self_test.measure()
    lines.append({"what": "limit of one generator", "limit": repr(limit)})
    print(f"limit of one generator process: {limit}", flush=True)
    return lines


def part_batching() -> list[dict]:
    """Tuned batching of MobileNetV2; what tfopt-tune-batching prints."""
    side = subjects.original("mobilenet_v2", "serving_default")
    tune = ["--rate=45", "--slo_ms=300", "--check_s=6", "--max_batch_size=16"]
    command = [sys.executable, "-m", "pipelines.tune_batching", f"--model={side.base / '1'}", *tune]
    print(" ".join(command[2:]), flush=True)
    subprocess.run(command, check=False)
    return []


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="requests,ranking,load,stall,batching", help="of these, and soak")
    parser.add_argument("--models", default=",".join(LOADED), help="of the part load")
    parser.add_argument("--seconds", type=float, default=180, help="of the soak")
    parser.add_argument("--json", help="where to write the figures")
    arguments = parser.parse_args()
    parts: dict[str, Callable[[], list[dict]]] = {
        **{"requests": part_requests, "ranking": part_ranking, "stall": part_stall, "batching": part_batching},
        "load": lambda: part_load(arguments.models.split(",")),
        "soak": lambda: serving_soak.soak(arguments.seconds),
    }
    found = {}
    for part in arguments.parts.split(","):
        begun = time.monotonic()
        print(f"== {part}", flush=True)
        found[part] = parts[part]()
        print(f"   ({time.monotonic() - begun:.0f} s)", flush=True)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
