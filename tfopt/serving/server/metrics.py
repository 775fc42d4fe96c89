"""What is counted, for Prometheus: under TensorFlow Serving's names where it counts the same, else `tfopt_*`."""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Iterator

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

disable_created_metrics()
REGISTRY = CollectorRegistry()  # without Python's own: their names are not those of a model server

_MICROSECONDS = tuple(10 * 1.8**n for n in range(33))  # TensorFlow Serving's buckets, to about 20 minutes
_ROWS = tuple(2**n for n in range(14))
_BY_SIGNATURE = ("model_name", "signature")

_requests = Counter(":tensorflow:serving:request_count", "Requests.", ("model_name", "status"), registry=REGISTRY)
_latency = Histogram(
    ":tensorflow:serving:request_latency", "Wall time of a request in the server, in microseconds.",
    ("model_name", "API", "entrypoint"), buckets=_MICROSECONDS, registry=REGISTRY,
)  # fmt: skip
_processed = Histogram(
    ":tensorflow:serving:batching:processed_batch_size", "Rows of the batches that ran, with their padding.",
    _BY_SIGNATURE, buckets=_ROWS, registry=REGISTRY,
)  # fmt: skip
_rows = Counter("tfopt_batching_rows", "Rows of requests that were batched.", _BY_SIGNATURE, registry=REGISTRY)
_padding = Gauge("tfopt_batching_padding_rows", "Rows that batches were padded with.", _BY_SIGNATURE, registry=REGISTRY)
_waiting = Gauge(
    "tfopt_batching_requests", "Requests that wait for a batch or are in one.", _BY_SIGNATURE, registry=REGISTRY
)


class _Batches:
    """Tells batches apart by when they ran: each row of an answer names its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seen: collections.OrderedDict[float, None] = collections.OrderedDict()

    def new(self, times: np.ndarray) -> list[float]:
        """Those of the times that were not seen before; a batch's requests are answered at about the same time."""
        with self._lock:
            fresh = [time for time in dict.fromkeys(times.tolist()) if time not in self._seen]
            for time in fresh:
                self._seen[time] = None
            while len(self._seen) > 4096:
                self._seen.popitem(last=False)
        return fresh


_seen: collections.defaultdict[tuple[str, str], _Batches] = collections.defaultdict(_Batches)


def answered(model: str, api: str, entrypoint: str, status: str, seconds: float) -> None:
    """Counts a request.

    Args:
      model: its name; "" where the request named none.
      api: Predict, Classify, ...
      entrypoint: GRPC or REST.
      status: OK, or the name of the error's code.
      seconds: that it took.
    """
    _requests.labels(model, status).inc()
    if status == "OK":
        _latency.labels(model, api, entrypoint).observe(seconds * 1e6)


@contextlib.contextmanager
def waiting(model: str, signature: str) -> Iterator[None]:
    """Counts a request for as long as the block takes."""
    gauge = _waiting.labels(model, signature)
    gauge.inc()
    try:
        yield
    finally:
        gauge.dec()


def batched(model: str, signature: str, report: np.ndarray) -> None:
    """Counts the batches that a request was in.

    Args:
      model: its name.
      signature: its name.
      report: (rows, 2) float64: the size of each row's batch, and when that batch ran.
    """
    labels = (model, signature)
    _rows.labels(*labels).inc(len(report))
    _padding.labels(*labels).dec(len(report))
    for time in _seen[labels].new(report[:, 1]):
        size = float(report[report[:, 1] == time, 0][0])
        _processed.labels(*labels).observe(size)
        _padding.labels(*labels).inc(size)


def page() -> bytes:
    """The metrics in Prometheus' text format."""
    # The client puts _total behind every counter; TensorFlow Serving does not.
    return generate_latest(REGISTRY).replace(b":request_count_total", b":request_count")
