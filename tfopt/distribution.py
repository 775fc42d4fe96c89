"""Trainings on several devices or machines: `--strategy=mirrored|multiworker` (tf.distribute).

Every replica has the same weights and a slice of each batch; gradients are summed before they are applied:

    g = sum over replicas r of  d/dW (1 / rows) sum over x in slice r of loss(f(W, x))

which is the gradient of the whole batch, so that N replicas end where one does, up to rounding.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tfopt.errors import TfoptError, one_line

NAMES = ("", "mirrored", "multiworker")

_current: list[tf.distribute.Strategy] = []


@contextlib.contextmanager
def using(name: str) -> Iterator[None]:
    """Has all trainings inside run by a strategy.

    Args:
      name: "" one device; "mirrored" all GPUs of this machine, or where it has none all logical CPU devices;
        "multiworker" all processes that the environment variable TF_CONFIG names, started with the same flags. The last
        must come before TensorFlow computes anything in the process.

    Raises:
      TfoptError: an unknown name, no second device, or TF_CONFIG is missing or damaged.
    """
    if name not in NAMES:
        raise TfoptError(f"--strategy: choose from {', '.join(NAMES[1:])}; received {name!r}")
    if not name:
        yield
        return
    _current.append(_mirrored() if name == "mirrored" else _multiworker())
    try:
        yield
    finally:
        _current.pop()


def _mirrored() -> tf.distribute.Strategy:
    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if len(devices) < 2:
        raise TfoptError(f"--strategy=mirrored: this machine has one device to train on, {devices[0].name}")
    return tf.distribute.MirroredStrategy([device.name for device in devices])


def _multiworker() -> tf.distribute.Strategy:
    try:
        config = json.loads(os.environ.get("TF_CONFIG", ""))
        workers = [address for kind in ("chief", "worker") for address in config["cluster"].get(kind, [])]
        kind, index = config["task"]["type"], int(config["task"]["index"])
        known = index < len(config["cluster"].get(kind, []))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TfoptError(
            "--strategy=multiworker: the environment variable TF_CONFIG must name all workers and this one, such as "
            '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}; '
            f"received {os.environ.get('TF_CONFIG', 'nothing')!r}"
        ) from error
    if len(workers) < 2 or not known:
        raise TfoptError(f"--strategy=multiworker: TF_CONFIG names {len(workers)} workers; this is {kind} {index}")
    try:
        return tf.distribute.MultiWorkerMirroredStrategy()
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise TfoptError(f"--strategy=multiworker: {one_line(error)}") from error


def current() -> tf.distribute.Strategy | None:
    """The strategy of trainings now; None for one device."""
    return _current[-1] if _current else None


def replicas() -> int:
    """How many slices a batch has."""
    return _current[-1].num_replicas_in_sync if _current else 1


def scope() -> contextlib.AbstractContextManager[Any]:
    """Variables made inside are mirrored to all replicas."""
    return _current[-1].scope() if _current else contextlib.nullcontext()


def several_workers() -> bool:
    """Whether other processes train along."""
    return bool(_current) and isinstance(_current[-1], tf.distribute.MultiWorkerMirroredStrategy)


def is_chief() -> bool:
    """Whether this process is the one that writes: artifacts, reports, checkpoints."""
    if not several_workers():
        return True
    resolver = _current[-1].cluster_resolver
    if resolver.task_type == "chief":
        return True
    return "chief" not in resolver.cluster_spec().as_dict() and resolver.task_id == 0


@contextlib.contextmanager
def place(output: str | Path) -> Iterator[Path]:
    """Where this process writes: the chief to `output`, the others to a directory that is removed at the end."""
    if is_chief():
        yield Path(output)
        return
    with tempfile.TemporaryDirectory(prefix="tfopt-worker-") as scratch:
        yield Path(scratch) / "output"


def sliced(make: Callable[[slice], Any], rows: int) -> Any:
    """Values of all replicas of this process.

    Args:
      make: from the rows of a slice of the batch to its (nested) tensors.
      rows: of the whole batch; at least as many as replicas.

    Returns:
      What `Strategy.run` takes.
    """
    count = replicas()
    ends = [rows * index // count for index in range(count + 1)]

    def value(context: Any) -> Any:
        index = context.replica_id_in_sync_group
        return make(slice(ends[index], ends[index + 1]))

    return _current[-1].experimental_distribute_values_from_function(value)


State = tuple[dict[str, Any], list[np.ndarray]]


def shared(read: Callable[[], State | None] | None) -> State | None:
    """The state of a training as the chief reads it, in all processes; every one must call it.

    Args:
      read: gives the state, or None; only the chief's is called.
    """
    state = read() if read else None
    if not several_workers():
        return state
    given = b"" if state is None else _packed(*state)
    length = int(_summed(np.array([len(given)], np.int64))[0])
    words = np.zeros(-(-length // 4), np.int32)
    words.view(np.uint8)[: len(given)] = np.frombuffer(given, np.uint8)
    return _unpacked(_summed(words).tobytes()[:length]) if length else None


def wait() -> None:
    """Comes back when every process has come here."""
    if several_workers():
        _summed(np.ones(1, np.int64))


def _summed(values: np.ndarray) -> np.ndarray:
    """The sum of integers over all processes."""
    strategy = _current[-1]

    @tf.function(autograph=False)
    def total(mine: tf.Tensor) -> tf.Tensor:
        def replica(value: tf.Tensor) -> tf.Tensor:
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(value))  # which has a device

        return strategy.experimental_local_results(strategy.run(replica, args=(mine,)))[0]

    first = True  # of several replicas in one process, one brings the value

    def mine(_: Any) -> tf.Tensor:
        nonlocal first
        brought, first = (values if first else np.zeros_like(values)), False
        return tf.constant(brought)

    return total(strategy.experimental_distribute_values_from_function(mine)).numpy()


def _packed(progress: Mapping[str, Any], arrays: list[np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.array(json.dumps(progress)), *arrays)
    return buffer.getvalue()


def _unpacked(data: bytes) -> State:
    with np.load(io.BytesIO(data)) as saved:
        return json.loads(str(saved["arr_0"])), [saved[f"arr_{i}"] for i in range(1, len(saved.files))]
