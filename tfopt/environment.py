"""What a figure was measured with: versions and machine."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from pathlib import Path

from tfopt.errors import TfoptError

_PACKAGES = ("tensorflow", "keras", "ai-edge-litert", "litert-quantizer", "numpy")


def describe() -> dict[str, str]:
    """Versions of what does the work, and the machine, as name -> text."""
    facts = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            facts[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    facts["cpus"] = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        if names:
            facts["processor"] = names[0]
    return facts


def need_beam(flag: str) -> None:
    """Raises where Apache Beam, which an extra brings, is not installed; does not import it, which takes seconds.

    Args:
      flag: what asks for it.

    Raises:
      TfoptError: it is missing.
    """
    if importlib.util.find_spec("apache_beam") is None:
        raise TfoptError(f"{flag} needs apache-beam: pip install 'tfopt[beam]'")
