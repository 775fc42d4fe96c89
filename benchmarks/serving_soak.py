"""A soak: good requests, malformed ones and clients that hang up, while the model's version is swapped again and again.

Version v of the model gives y = (v mod 2 + 1) x. An answer names the version that gave it, so a wrong answer is seen.
"""

from __future__ import annotations

import collections
import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

CLIENTS = 4
SWAP_S = 10.0
MALFORMED, HANGS_UP = 0.05, 0.05


def soak(seconds: float) -> list[dict]:
    """Runs it, and says what came of it.

    Args:
      seconds: how long.
    """
    from tfopt.serving.server.child import running

    with tempfile.TemporaryDirectory() as directory:
        models = [_model(Path(directory) / f"model{odd}", odd + 1.0) for odd in (0, 1)]
        base = Path(directory) / "served"
        _publish(models, base, 1)
        counts: collections.Counter[str] = collections.Counter()
        flags = ["--model_name=m", f"--model_base_path={base}", "--file_system_poll_wait_seconds=0.5"]
        with running([*flags, "--enable_batching"]) as server:
            end = time.monotonic() + seconds
            clients = [
                threading.Thread(target=_ask, args=(server.grpc, seed, end, counts), daemon=True)
                for seed in range(CLIENTS)
            ]
            for client in clients:
                client.start()
            memory, version, swap = [], 1, time.monotonic() + SWAP_S
            while time.monotonic() < end:
                time.sleep(0.5)
                if time.monotonic() > swap:
                    swap += SWAP_S
                    version += 1
                    memory.append(server.resident_bytes())
                    _publish(models, base, version)
            for client in clients:
                client.join(60)
                counts["clients that never ended"] += client.is_alive()
            memory.append(server.resident_bytes())
    third = max(len(memory) // 3, 1)
    first, last = (float(np.median(part)) / 2**20 for part in (memory[:third], memory[-third:]))
    for what, count in sorted(counts.items()):
        print(f"{count:>8,} {what}")
    print(f"{version} versions; resident memory {first:.0f} MiB in the first third, {last:.0f} MiB in the last")
    return [{"counts": dict(counts), "versions": version, "memory_mib": [m / 2**20 for m in memory]}]


def _model(path: Path, factor: float) -> Path:
    import tensorflow as tf

    module = tf.Module()
    module.factor = tf.Variable(tf.fill([256, 1024], factor))  # a megabyte, which a leak would multiply
    module.serve = tf.function(
        lambda x: {"y": x * module.factor[0, 0]}, input_signature=[tf.TensorSpec([None, 4], name="x")]
    )
    tf.saved_model.save(module, str(path), signatures=module.serve)
    return path


def _publish(models: list[Path], base: Path, version: int) -> None:
    """Puts a version in place at once, and takes the one before the last away."""
    base.mkdir(exist_ok=True)
    partial = base.parent / "partial"
    shutil.copytree(models[version % 2], partial)
    partial.rename(base / str(version))
    shutil.rmtree(base / str(version - 2), ignore_errors=True)


def _ask(address: str, seed: int, end: float, counts: collections.Counter[str]) -> None:
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    rng = np.random.default_rng(seed)
    with grpc.insecure_channel(address) as channel:
        stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        while time.monotonic() < end:
            x = rng.normal(size=(int(rng.integers(1, 5)), 4)).astype(np.float32)
            request = predict_pb2.PredictRequest()
            request.model_spec.name = "m"
            request.inputs["x"].CopyFrom(tf.make_tensor_proto(x))
            draw = rng.random()
            if draw < MALFORMED:
                _malformed(stub, request, rng, counts)
            elif draw < MALFORMED + HANGS_UP:
                call = stub.Predict.future(request, timeout=30)
                time.sleep(float(rng.random()) * 0.002)
                call.cancel()
                counts["clients that hung up"] += 1
            else:
                try:
                    answer = stub.Predict(request, timeout=30)
                except grpc.RpcError as error:
                    counts[f"good requests that failed: {error.code().name} {error.details()}"] += 1
                    continue
                expected = x * (answer.model_spec.version.value % 2 + 1)
                right = np.array_equal(tf.make_ndarray(answer.outputs["y"]), expected)
                counts["good requests, answered right" if right else "good requests, answered wrong"] += 1


def _malformed(stub, request, rng: np.random.Generator, counts: collections.Counter[str]) -> None:
    import grpc
    import tensorflow as tf

    kind = int(rng.integers(4))
    if kind == 0:
        request.inputs["x"].CopyFrom(tf.make_tensor_proto([[1, 2, 3, 4]]))
    elif kind == 1:
        request.model_spec.signature_name = "no_such_signature"
    elif kind == 2:
        request.inputs["x"].tensor_content = b"123"
    else:
        del request.inputs["x"]
    try:
        stub.Predict(request, timeout=30)
        counts["malformed requests that were answered"] += 1
    except grpc.RpcError as error:
        counts[f"malformed requests: {error.code().name}"] += 1
