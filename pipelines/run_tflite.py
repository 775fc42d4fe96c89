"""Runs a .tflite file on the machine where it will live: predict, check, time.

This one file can be copied to a Raspberry Pi: it needs Python 3.9, NumPy, and ai-edge-litert or tflite-runtime (the
latter with numpy<2), and neither TensorFlow nor tfopt.

    python run_tflite.py int8.tflite                                    # does it run, how fast, in how much memory
    python run_tflite.py int8.tflite --inputs=rows.npz --save=out.npz   # predict
    python run_tflite.py int8.tflite --inputs=rows.npz --check=out.npz --rtol=0.05

The .npz files hold one array per input or output, by name, with rows on axis 0; int8 inputs and outputs are converted
from and to the original floats. The exit code is 0 where all went well, 1 where outputs differ, 2 for bad input.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class InputError(Exception):
    """One line for the user, exit code 2."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    flags = _parse(argv)
    try:
        result = run(flags)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result, indent=2) if flags.json else table(result))
    return 0 if result.get("check", {}).get("passed", True) else 1


def run(flags: argparse.Namespace) -> dict[str, Any]:
    """Does what the flags ask for, and returns what is to be printed."""
    runtime, interpreter_class = _interpreter_class()
    if not Path(flags.model).is_file():
        raise InputError(f"{flags.model}: no such file")
    start = time.perf_counter()
    model = Model(flags.model, interpreter_class, flags.threads, flags.signature)
    result: dict[str, Any] = {
        "model": flags.model,
        "bytes": Path(flags.model).stat().st_size,
        "runtime": runtime,
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "threads": flags.threads,
        "delegate": model.delegate,
        "signature": model.signature,
        "load_ms": (time.perf_counter() - start) * 1e3,
    }
    calls, rows = model.calls(_read(flags.inputs) if flags.inputs else model.random_inputs())
    result["rows"] = rows
    if flags.inputs:
        outputs = model.predict(calls, rows)
        if flags.save:
            try:
                np.savez(flags.save, **outputs)
            except OSError as error:
                raise InputError(f"{flags.save} cannot be written: {_first_line(error)}") from error
            result["saved"] = flags.save
        if flags.check:
            result["check"] = compare(_read(flags.check), outputs, flags.rtol, flags.atol)
    if flags.runs:
        result["latency"] = model.time(calls[0], flags.runs, flags.warmup)
    result["peak_memory_bytes"] = peak_memory_bytes()
    return result


class Model:
    """One signature of a .tflite file."""

    def __init__(self, path: str, interpreter_class: Any, threads: int, signature: str | None):
        self.path = path
        try:
            self.delegate, self._interpreter = _load(path, interpreter_class, threads)
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{path} does not load: {_first_line(error)}") from error
        have = sorted(self._interpreter.get_signature_list())
        self.signature = signature or ("serving_default" if "serving_default" in have or not have else have[0])
        self._runner = None
        if have:
            if self.signature not in have:
                raise InputError(f"{path} has no signature '{self.signature}'; it has: {', '.join(have)}")
            self._runner = self._interpreter.get_signature_runner(self.signature)
            self._inputs = self._runner.get_input_details()
            self._outputs = self._runner.get_output_details()
        else:  # converted by an old TensorFlow
            self._inputs = {detail["name"]: detail for detail in self._interpreter.get_input_details()}
            self._outputs = {detail["name"]: detail for detail in self._interpreter.get_output_details()}

    def random_inputs(self) -> dict[str, np.ndarray]:
        """Returns one row of random numbers, for timing without data."""
        random = np.random.default_rng(0)
        arrays = {}
        for name, detail in self._inputs.items():
            shape = [1 if size < 0 else int(size) for size in detail["shape_signature"]]
            text = np.dtype(detail["dtype"]).kind in "SUO"
            arrays[name] = np.full(shape, b"", object) if text else random.uniform(0, 1, shape).astype(np.float32)
        return arrays

    def calls(self, arrays: dict[str, np.ndarray]) -> tuple[list[dict[str, np.ndarray]], int]:
        """Cuts rows into calls of the batch that the file takes; the last call is filled up with the last row.

        Returns:
            The calls, quantized where the file wants it, and the number of rows.
        """
        if arrays.keys() != self._inputs.keys():
            raise InputError(f"{self.path} takes the inputs {sorted(self._inputs)}, received {sorted(arrays)}")
        rows, batch = {}, 1
        for name, detail in self._inputs.items():
            shape = [int(size) for size in detail["shape_signature"]]
            fits = arrays[name].ndim == len(shape) and all(
                want < 0 or want == size
                for want, size in zip(shape[1:], arrays[name].shape[1:])  # noqa: B905
            )
            if not fits or (shape and len(arrays[name]) == 0):
                wanted = ["rows", *("?" if size < 0 else size for size in shape[1:])] if shape else []
                raise InputError(f"{self.path} takes '{name}' of shape {wanted}, received {list(arrays[name].shape)}")
            if shape:
                rows[name] = len(arrays[name])
                batch = max(batch, shape[0])
        total = max(rows.values(), default=1)
        calls = []
        for start in range(0, total, batch):
            pick = np.minimum(np.arange(start, start + batch), total - 1)
            call = {n: array[pick] if rows.get(n) == total else array for n, array in arrays.items()}
            calls.append({name: _quantize(array, self._inputs[name]) for name, array in call.items()})
        return calls, total

    def predict(self, calls: list[dict[str, np.ndarray]], rows: int) -> dict[str, np.ndarray]:
        """Returns the outputs of all calls, as the original floats."""
        parts = [{n: _dequantize(a, self._outputs[n]) for n, a in self._call(call).items()} for call in calls]
        if len(parts) == 1:
            return {name: array[:rows] if array.ndim else array for name, array in parts[0].items()}
        return {name: np.concatenate([np.atleast_1d(part[name]) for part in parts])[:rows] for name in parts[0]}

    def time(self, call: dict[str, np.ndarray], runs: int, warmup: int) -> dict[str, float]:
        """Returns milliseconds of one call."""
        for _ in range(warmup):
            self._call(call)
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            self._call(call)
            times.append((time.perf_counter() - start) * 1e3)
        p50, p95 = np.percentile(times, [50, 95])
        return {"p50_ms": float(p50), "p95_ms": float(p95), "min_ms": min(times), "runs": runs, "warmup": warmup}

    def _call(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            if self._runner:
                return dict(sorted(self._runner(**arrays).items()))
            for name, array in arrays.items():
                self._interpreter.resize_tensor_input(self._inputs[name]["index"], array.shape)
            self._interpreter.allocate_tensors()
            for name, array in arrays.items():
                self._interpreter.set_tensor(self._inputs[name]["index"], array)
            self._interpreter.invoke()
            return {n: self._interpreter.get_tensor(d["index"]) for n, d in sorted(self._outputs.items())}
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{self.path} does not run: {_first_line(error)}") from error


def compare(
    expected: dict[str, np.ndarray], received: dict[str, np.ndarray], rtol: float, atol: float
) -> dict[str, Any]:
    """Compares outputs; what is not a float must be equal.

    Returns:
        `passed`, and by output the largest difference, absolute and relative to the largest expected value.
    """
    if missing := sorted(expected.keys() - received.keys()):
        raise InputError(f"the file has no output '{missing[0]}'; it has {sorted(received)}")
    outputs: dict[str, dict[str, Any]] = {}
    for name, want in expected.items():
        got = received[name]
        if want.shape != got.shape:
            raise InputError(f"output '{name}' has the shape {list(got.shape)}, expected {list(want.shape)}")
        if want.dtype.kind != "f":
            outputs[name] = {"passed": bool(np.array_equal(want, got))}
            continue
        error = float(np.max(np.abs(want - got), initial=0))
        scale = float(np.max(np.abs(want), initial=0))
        outputs[name] = {
            "passed": bool(np.isfinite(error)) and error <= atol + rtol * scale,
            "max_abs_error": error,
            "max_rel_error": error / scale if scale else None,
        }
        if want.ndim == 2 and want.shape[1] > 1:
            outputs[name]["agreement"] = float(np.mean(want.argmax(axis=1) == got.argmax(axis=1)))
    passed = all(output["passed"] for output in outputs.values())
    return {"passed": passed, "rtol": rtol, "atol": atol, "outputs": outputs}


def table(result: dict[str, Any], indent: str = "") -> str:
    """Returns the result as lines for a terminal."""
    lines = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", table(value, indent + "  ")]
        else:
            text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
            lines.append(f"{indent}{key:<{22 - len(indent)}}{f'{value:.4g}' if isinstance(value, float) else text}")
    return "\n".join(lines)


def peak_memory_bytes() -> int:
    """Returns the largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():  # there, ru_maxrss begins with the size of the parent
        peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return peak if sys.platform == "darwin" else peak * 1024


def _interpreter_class() -> tuple[str, Any]:
    for module in ("ai_edge_litert", "tflite_runtime"):
        try:
            found = __import__(f"{module}.interpreter", fromlist=["Interpreter"])
        except ModuleNotFoundError:
            continue
        except (ImportError, AttributeError) as error:  # a tflite_runtime that was built for numpy<2
            raise InputError(f"{module} does not work with numpy {np.__version__}: {_first_line(error)}") from error
        from importlib.metadata import PackageNotFoundError, version

        try:
            return f"{module} {version(module.replace('_', '-'))}", found.Interpreter
        except PackageNotFoundError:
            return module, found.Interpreter
    raise InputError("install ai-edge-litert, or tflite-runtime with 'numpy<2'")


def _load(path: str, interpreter_class: Any, threads: int) -> tuple[str, Any]:
    interpreter = interpreter_class(model_path=path, num_threads=threads)
    try:
        interpreter.allocate_tensors()
        return "default", interpreter
    except RuntimeError as error:
        if "XNNPack" not in str(error):
            raise
    # The delegate cannot prepare this file; the interpreter's own kernels can, more slowly.
    resolver = sys.modules[interpreter_class.__module__].OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = interpreter_class(model_path=path, num_threads=threads, experimental_op_resolver_type=resolver)
    interpreter.allocate_tensors()
    return "none: XNNPACK cannot prepare the file", interpreter


def _read(path: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in arrays.files if name != "label"}
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} is not a readable .npz file of plain arrays: {_first_line(error)}") from error


def _quantize(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    scale, zero_point = detail["quantization"]
    dtype = np.dtype(detail["dtype"])
    if dtype.kind in "SUO":
        return array.astype(object)
    if not scale or array.dtype == dtype:
        return array.astype(dtype)
    limits = np.iinfo(dtype)
    return np.clip(np.rint(array / scale) + zero_point, limits.min, limits.max).astype(dtype)


def _dequantize(array: np.ndarray, detail: dict[str, Any]) -> np.ndarray:
    scale, zero_point = detail["quantization"]
    return (array.astype(np.float32) - np.float32(zero_point)) * np.float32(scale) if scale else array


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the .tflite file")
    parser.add_argument("--inputs", help=".npz with one array per input, rows on axis 0 ('label' is ignored)")
    parser.add_argument("--signature", help="which to run; default: serving_default, or the first")
    parser.add_argument("--save", help=".npz to write the outputs to")
    parser.add_argument("--check", help=".npz with the expected outputs")
    parser.add_argument(
        "--rtol", type=float, default=1e-3, help="allowed error, relative to the output's largest value"
    )
    parser.add_argument("--atol", type=float, default=1e-5, help="allowed absolute error, added to that")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=50, help="timed calls; 0 for no timing")
    parser.add_argument("--warmup", type=int, default=5, help="untimed calls before them")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    flags = parser.parse_args(argv)
    if (flags.save or flags.check) and not flags.inputs:
        parser.error("--save and --check need --inputs")
    return flags


if __name__ == "__main__":
    sys.exit(main())
