"""Time and peak memory of the lossless recipe on synthetic graphs of 2k to 128k nodes: does it stay near linear?

    python -m benchmarks.scale
    python -m benchmarks.scale --sizes=2000,8000

The graphs are towers of residual blocks with small tensors: convolutions, some with shared kernels, batch norms as one
op or as Keras 3's four, identities, what dropout leaves at inference, and values computed twice. Each size runs in a
process of its own; the time is that of load, passes (each verified) and emission, without importing TensorFlow; ratios
are to a quarter of the size. Beside it: what TensorFlow itself takes to load the SavedModel in a v1 session and run it
once, before and after.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import children
from benchmarks.models import CACHE, SEED

SIZES = (2_000, 8_000, 32_000, 128_000)
CHANNELS, SIDE, BLOCKS_IN_TOWER, SHARED_KERNELS = 4, 4, 40, 32


class _Nodes:
    """Writes NodeDefs by hand: the Python graph API is slow at this size."""

    def __init__(self):
        import tensorflow as tf

        self.tf, self.graph, self.rng = tf, tf.compat.v1.GraphDef(), np.random.default_rng(SEED)

    def add(self, op: str, *inputs: str, T: bool = True, **attributes) -> str:  # noqa: N803  (an attribute's name)
        node = self.graph.node.add(op=op, name=f"n{len(self.graph.node)}_{op}", input=inputs)
        if T:
            node.attr["T"].type = self.tf.float32.as_datatype_enum
        for key, value in attributes.items():
            if isinstance(value, bool):
                node.attr[key].b = value
            elif isinstance(value, float):
                node.attr[key].f = value
            elif isinstance(value, str):
                node.attr[key].s = value.encode()
            elif isinstance(value, int):
                node.attr[key].type = value
            else:
                node.attr[key].list.i.extend(value)
        return node.name

    def constant(self, value) -> str:
        name = self.add("Const", T=False, dtype=self.tf.float32.as_datatype_enum)
        tensor = self.tf.make_tensor_proto(np.asarray(value, np.float32))
        self.graph.node[-1].attr["value"].tensor.CopyFrom(tensor)
        return name

    def per_channel(self, low: float, high: float) -> str:
        return self.constant(self.rng.uniform(low, high, CHANNELS))

    def batch_norm(self, x: str) -> str:
        gamma, beta = self.per_channel(0.8, 1.2), self.per_channel(-0.1, 0.1)
        mean, variance = self.per_channel(-0.1, 0.1), self.per_channel(0.8, 1.2)
        if self.rng.random() < 0.5:
            operands = [self.add("Identity", p) for p in (gamma, beta, mean, variance)]
            return self.add(
                "FusedBatchNormV3",
                x,
                *operands,
                U=self.tf.float32.as_datatype_enum,
                epsilon=1e-3,
                is_training=False,
            )
        scale = self.add("Rsqrt", self.add("AddV2", variance, self.constant(1e-3)))
        scale = self.add("Mul", scale, gamma)
        shift = self.add("Sub", beta, self.add("Mul", mean, scale))
        return self.add("AddV2", self.add("Mul", x, scale), shift)

    def block(self, x: str, shared: list[str]) -> str:
        if self.rng.random() < 0.2:
            kernel = shared[self.rng.integers(len(shared))]
        else:
            kernel = self.constant(self.rng.normal(0, 0.2, (3, 3, CHANNELS, CHANNELS)))
        kernel = self.add("Identity", kernel)
        y = self.add("Conv2D", x, kernel, strides=[1, 1, 1, 1], padding="SAME", data_format="NHWC")
        y = self.batch_norm(y)
        y = self.add("Identity", y)
        if self.rng.random() < 0.3:  # a value computed twice
            y = self.add("Mul", self.add("Relu", y), self.add("Sigmoid", self.add("Relu", y)))
        else:
            y = self.add("Relu", y)
        if self.rng.random() < 0.3:  # dropout with its rate at 0
            y = self.add("Mul", self.add("RealDiv", y, self.constant(1.0)), self.constant(1.0))
            y = self.add("StopGradient", self.add("Identity", y))
        return self.add("Tanh", self.add("AddV2", x, y)) if self.rng.random() < 0.4 else y


def write(size: int, directory: str) -> int:
    """Writes a SavedModel whose graph has about `size` nodes besides its variables; returns how many."""
    import tensorflow as tf

    v1 = tf.compat.v1
    with v1.Session(graph=tf.Graph()) as session:
        x = v1.placeholder(tf.float32, [None, SIDE, SIDE, CHANNELS], name="x")
        rng = np.random.default_rng(SEED)
        shape = (3, 3, CHANNELS, CHANNELS)
        kernels = [
            v1.get_variable(f"kernel_{i}", use_resource=True, initializer=rng.normal(0, 0.2, shape).astype("f4"))
            for i in range(SHARED_KERNELS)
        ]
        nodes, towers, top = _Nodes(), [], ""
        inputs = {kernel.op.name: kernel.read_value() for kernel in kernels} | {"x": x}
        for key in inputs:
            nodes.graph.node.add(op="Placeholder", name=key).attr["dtype"].type = tf.float32.as_datatype_enum
        while len(nodes.graph.node) < size:
            top = "x"
            for _ in range(BLOCKS_IN_TOWER):
                if len(nodes.graph.node) < size:
                    top = nodes.block(top, [kernel.op.name for kernel in kernels])
            towers.append(top)
        total = towers[0]
        for tower in towers[1:]:
            total = nodes.add("AddV2", total, tower)
        (y,) = tf.import_graph_def(nodes.graph, input_map=inputs, return_elements=[f"{total}:0"], name="")
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, directory, {"x": x}, {"y": y})
        return len(nodes.graph.node)


def recipe_steps(source: str, directory: str) -> dict[str, float]:
    """Loads a model, runs the lossless recipe with verification, and emits it; returns the seconds of each step."""
    from tfopt import recipe
    from tfopt.export import saved_model
    from tfopt.model import load
    from tfopt.optimize import run_pass
    from tfopt.verify import Verifier

    marks = [("", time.perf_counter())]
    model = load(source)
    marks.append(("load", time.perf_counter()))
    verifier = Verifier(model, None, SEED)
    marks.append(("reference outputs", time.perf_counter()))
    for index, (name, options) in enumerate(recipe.read("lossless").steps, 1):
        model, step = run_pass(model, name, options, verifier)
        marks.append((f"{index} {name}, {step.status}", time.perf_counter()))
    saved_model.save(model, Path(directory))
    marks.append(("save", time.perf_counter()))
    return {name: end - start for (_, start), (name, end) in itertools.pairwise(marks)}


def _measure(size: int) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        source = str(Path(scratch) / "source")
        if size:
            children.run("benchmarks.scale", ["--write", str(size), source])  # its memory is not the recipe's
        from benchmarks import affine, peers

        before = peers.serving(source)
        start, start_cpu = time.perf_counter(), time.process_time()
        steps = recipe_steps(source, str(Path(scratch) / "out"))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        after = peers.serving(str(Path(scratch) / "out"))
        counts = [affine.count(x.graph, list(x.outputs.values())) for x in (before, after)]
        batch = {"x": np.random.default_rng(SEED).normal(size=(2, SIDE, SIDE, CHANNELS)).astype("f4")}
        results, runs = [], []
        for candidate in (before, after):
            start = time.perf_counter()
            results.append(peers.Program(candidate).run(batch))
            runs.append(time.perf_counter() - start)
    return {
        "nodes": counts[0].nodes,
        "nodes_after": counts[1].nodes,
        "leftovers": [len(x.leftovers) for x in counts],
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_bytes": peak,
        "session_seconds": runs,
        "max_error": peers.relative_error(*results),
        "steps": steps,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="comma-separated node counts")
    parser.add_argument("--repeats", type=int, default=1, help="processes of each size; the fastest is shown")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", default=str(CACHE.parent / "scale.json"), help="where the numbers go")
    arguments = parser.parse_args()
    output = Path(arguments.json)
    if arguments.write:
        output.write_text(json.dumps({"nodes": write(int(arguments.write[0]), arguments.write[1])}))
        return
    if arguments.measure is not None:
        output.write_text(json.dumps(_measure(arguments.measure)))
        return
    titles = ["nodes", "nodes after", "affine nodes before, after", "error", "time", "time ratio", "CPU time"]
    titles += ["CPU ratio", "peak memory", "memory ratio", "TensorFlow's load and first run, before, after"]
    print(f"| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|")
    results: dict[str, dict] = json.loads(output.read_text()) if output.is_file() else {}
    for size in (int(x) for x in arguments.sizes.split(",")):
        previous = results.get(str(size // 4), {})
        runs = [
            children.run("benchmarks.scale", ["--measure", str(size)], timeout=7200) for _ in range(arguments.repeats)
        ]
        found = results[str(size)] = min(runs, key=lambda run: run.get("seconds", float("inf")))
        output.write_text(json.dumps(results, indent=1))
        if "error" in found:
            print(f"| {size} | {found['error']} |")
            continue
        ratios = [
            f"{found[x] / previous[x]:.2f}x" if x in previous else "-" for x in ("seconds", "cpu_seconds", "peak_bytes")
        ]
        print(
            f"| {found['nodes']} | {found['nodes_after']} | {found['leftovers'][0]}, {found['leftovers'][1]} "
            f"| {found['max_error']:.1e} | {found['seconds']:.1f} s | {ratios[0]} "
            f"| {found['cpu_seconds']:.1f} s | {ratios[1]} | {found['peak_bytes'] / 1e6:.0f} MB | {ratios[2]} "
            f"| {found['session_seconds'][0]:.1f}, {found['session_seconds'][1]:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
