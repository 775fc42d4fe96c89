"""What a load test is asked to do: whom it asks, with which requests, how often, and what counts as good."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tfopt.errors import TfoptError

GRPC, REST = "grpc", "rest"
OPEN, CLOSED = "open", "closed"
POISSON, CONSTANT = "poisson", "constant"


@dataclass(frozen=True)
class Target:
    """Whom to ask.

    Attributes:
      server: "host:port".
      protocol: GRPC or REST.
      model_name: as the server knows it.
      signature_name: which signature.
      model_version: None: the latest.
      timeout_s: deadline of a request, in seconds after it was sent.
    """

    server: str
    protocol: str = GRPC
    model_name: str = "default"
    signature_name: str = "serving_default"
    model_version: int | None = None
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        host, _, port = self.server.rpartition(":")
        if not host or not port.isdigit() or "/" in host:
            raise TfoptError(f"--server={self.server}: wants host:port, such as localhost:8500")
        if self.protocol not in (GRPC, REST):
            raise TfoptError(f"--protocol={self.protocol}: wants {GRPC} or {REST}")
        if self.timeout_s <= 0:
            raise TfoptError(f"--timeout_s={self.timeout_s:g}: wants more than 0")


@dataclass(frozen=True)
class Request:
    """One request, serialized.

    Attributes:
      method: the gRPC method ("Predict", "Classify", "Regress"), or the REST verb ("predict", ...).
      body: the bytes that are sent.
      rows: examples in it.
    """

    method: str
    body: bytes
    rows: int = 1


@dataclass(frozen=True)
class Plan:
    """How to ask.

    Attributes:
      mode: OPEN: requests are sent at times fixed beforehand, whatever the server does. CLOSED: `concurrency` clients
        send the next one when the last was answered, so a stalled server is asked less.
      rate: requests per second of an open loop.
      arrivals: POISSON (independent clients) or CONSTANT.
      concurrency: clients of a closed loop.
      warmup_s: seconds at the start that are sent and not measured.
      duration_s: measured seconds.
      requests: no more than this many, those of the warmup included.
      max_outstanding: requests that may wait for their answers; what is due beyond that is counted as NOT_SENT.
      seed: of the arrivals.
      slo_ms: the latency that `slo_percentile` must not exceed.
    """

    mode: str = OPEN
    rate: float = 100.0
    arrivals: str = POISSON
    concurrency: int = 1
    warmup_s: float = 2.0
    duration_s: float = 10.0
    requests: int | None = None
    max_outstanding: int = 10_000
    seed: int = 0
    slo_ms: float | None = None
    slo_percentile: float = 99.0

    def __post_init__(self) -> None:
        if self.mode not in (OPEN, CLOSED):
            raise TfoptError(f"--loop={self.mode}: wants {OPEN} or {CLOSED}")
        if self.arrivals not in (POISSON, CONSTANT):
            raise TfoptError(f"--arrivals={self.arrivals}: wants {POISSON} or {CONSTANT}")
        for name in ("rate", "duration_s", "concurrency", "max_outstanding", "requests", "slo_ms"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise TfoptError(f"--{name}={value:g}: wants more than 0")
        if self.warmup_s < 0:
            raise TfoptError(f"--warmup_s={self.warmup_s:g}: wants 0 or more")
        if not 0 < self.slo_percentile < 100:
            raise TfoptError(f"--slo_percentile={self.slo_percentile:g}: wants a percentile between 0 and 100")
        if self.mode == OPEN and self.rate * (self.warmup_s + self.duration_s) > 20e6 and not self.requests:
            raise TfoptError(f"--rate={self.rate:g}: more than 20 million requests; cap them with --requests")

    def at(self, rate: float, attempt: int = 0) -> Plan:
        """The same, as an open loop at another rate; another attempt has other arrivals."""
        return dataclasses.replace(self, mode=OPEN, rate=rate, seed=self.seed + attempt)
