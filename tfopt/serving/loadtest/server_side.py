"""What the server says of itself: Prometheus counters and CPU time, before and after."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from tfopt.errors import TfoptError
from tfopt.serving.loadtest.result import ServerSide

PATH = "monitoring/prometheus/metrics"  # where TensorFlow Serving's monitoring config is documented to put them


@dataclass(frozen=True)
class Reading:
    """What was read at one moment."""

    cpu_seconds: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


def read(metrics: str | None, pid: int | None) -> Reading:
    """Reads what can be read.

    Args:
      metrics: "host:port/path" or a URL, or None.
      pid: a process of this machine, or None.

    Raises:
      TfoptError: there is nothing there.
    """
    return Reading(None if pid is None else cpu_seconds(pid), {} if metrics is None else scrape(metrics))


def cpu_seconds(pid: int) -> float:
    """User and system time of a process so far (fields 14 and 15 of /proc/PID/stat)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError as error:
        raise TfoptError(f"--server_pid={pid}: no such process on this machine") from error
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def scrape(address: str) -> dict[str, float]:
    """Reads the counters of a Prometheus page: name with labels -> value; buckets of histograms are left out."""
    from prometheus_client.parser import text_string_to_metric_families

    url = address if address.startswith("http") else f"http://{address}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as answer:
            text = answer.read().decode()
        families = list(text_string_to_metric_families(text))
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise TfoptError(f"--metrics={address}: no Prometheus metrics there: {error}") from error
    found = {}
    for family in families:
        for sample in family.samples:
            if family.type not in ("counter", "histogram", "summary") or sample.name.endswith(("_bucket", "_created")):
                continue
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            found[sample.name + (f"{{{labels}}}" if labels else "")] = sample.value
    return found


def difference(before: Reading, after: Reading) -> ServerSide:
    """What the run added; counters that did not move are left out."""
    grown = {name: value - before.metrics.get(name, 0.0) for name, value in after.metrics.items()}
    cpu = None
    if before.cpu_seconds is not None and after.cpu_seconds is not None:
        cpu = after.cpu_seconds - before.cpu_seconds
    return ServerSide(cpu, {name: value for name, value in sorted(grown.items()) if value})
