"""Weights as constants or as variables: what each costs to load, and what it gains per call.

    python -m benchmarks.constants
    python -m benchmarks.constants --models=resnet50 --wide=256

For each model the lossless recipe's result is emitted both ways. A child process per way loads it in a v1 session with
2 threads, as TensorFlow Serving does; then both run in turns. The default of --max_constant_bytes rests on it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import children
from benchmarks.models import CACHE, all_models, parse_names

WAYS = {"constants": 1 << 31, "variables": 0}
MODELS = ("kws-ds-cnn", "mobilenet_v2", "resnet50", "convnext_tiny")


def _emit(model: str, directory: Path) -> dict[str, int]:
    """Emits a model both ways; returns the bytes of its weights."""
    from tfopt import model as models
    from tfopt import passes, recipe
    from tfopt.export import saved_model
    from tfopt.rewrite import Log

    loaded = models.load(model)
    for name, options in recipe.read("lossless").steps:
        passes.get(name).run(loaded, Log(), **options)
    for way, limit in WAYS.items():
        saved_model.save(loaded, directory / way, max_constant_bytes=limit)
    return {"weight_bytes": loaded.weight_bytes}


def _wide(megabytes: int, directory: str) -> None:
    """Writes a model of four square dense layers that hold `megabytes` in all."""
    import tensorflow as tf

    size = int((megabytes * 2**20 / 16) ** 0.5)

    class Wide(tf.Module):
        def __init__(self) -> None:
            super().__init__()
            random = np.random.default_rng(0)
            self.w = [tf.Variable(random.standard_normal((size, size), np.float32) / size**0.5) for _ in range(4)]

        @tf.function(input_signature=[tf.TensorSpec([None, size], name="x")])
        def serve(self, x):  # type: ignore[no-untyped-def]
            for w in self.w:
                x = tf.nn.relu(x @ w)
            return {"y": x}

    module = Wide()
    tf.saved_model.save(module, directory, signatures=module.serve)


def _load(directory: str, calls: int) -> dict[str, float]:
    """Loads one way and times it: seconds to load, to the first answer, milliseconds per call, peak resident bytes."""
    from tfopt import runtime
    from tfopt.data import probes
    from tfopt.measure import peak_memory_bytes

    begun = time.perf_counter()
    with runtime.open(directory, threads=2, loader=runtime.SESSION) as program:
        loaded = time.perf_counter()
        signature = "serving_default" if "serving_default" in program.signatures else next(iter(program.signatures))
        data = probes(program.signatures[signature].inputs, seed=0, rows=1)
        call = program.prepare(signature, data.inputs)
        call()
        first = time.perf_counter()
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return {
        "load_s": loaded - begun,
        "first_s": first - begun,
        "call_ms": 1e3 * float(np.median(times)),
        "peak_bytes": peak_memory_bytes(),
    }


def main() -> None:
    """Prints the table, or answers for one child."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--wide", default="256,512,1024", help="megabytes of the dense models")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--emit", nargs=2)
    parser.add_argument("--make", nargs=2)
    parser.add_argument("--load")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.emit or args.load or args.make:
        if args.make:
            _wide(int(args.make[0]), args.make[1])
        answer = _emit(args.emit[0], Path(args.emit[1])) if args.emit else {}
        answer = _load(args.load, args.calls) if args.load else answer
        Path(args.json).write_text(json.dumps(answer))
        return
    print("| model | weights | load + first answer, s | peak memory | ms per call | constants gain |")
    print("|---|---|---|---|---|---|")
    known = all_models()
    jobs = [(name, known[name]) for name in parse_names(args.models)]
    jobs += [(f"dense, {size} MiB", size) for size in args.wide.split(",") if size]
    for name, source in jobs:
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            if name.startswith("dense"):
                made = children.run("benchmarks.constants", ["--make", source, f"{scratch}/model"])
                source = f"{scratch}/model"
            made = children.run("benchmarks.constants", ["--emit", source, scratch])
            results: dict[str, list[dict]] = {way: [] for way in WAYS}
            for _ in range(args.rounds):
                for way in WAYS:
                    found = children.run("benchmarks.constants", [f"--load={scratch}/{way}", f"--calls={args.calls}"])
                    results[way].append(found)
        errors = {way: r["error"] for way, found in results.items() for r in found if "error" in r}
        if errors:
            print(f"| {name} | {errors} |")
            continue
        cells = []
        for key, scale, form in (
            ("first_s", 1, "{:.2f}"),
            ("peak_bytes", 2**-20, "{:.0f} MiB"),
            ("call_ms", 1, "{:.2f}"),
        ):
            middle = [float(np.median([r[key] for r in results[way]])) * scale for way in WAYS]
            cells.append(" / ".join(form.format(value) for value in middle))
        ratio = np.median([v["call_ms"] / c["call_ms"] for c, v in zip(*results.values(), strict=True)])
        print(f"| {name} | {made['weight_bytes'] / 2**20:.1f} MiB | {' | '.join(cells)} | {ratio:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
