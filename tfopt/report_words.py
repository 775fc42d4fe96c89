"""Numbers and results in words, for both drawings of a report."""

from __future__ import annotations

import math

from tfopt.report import Artifact, Metric, Report

UNKNOWN = "-"
SHARES = ("accuracy", "top5", "f1")


def significant(value: float, digits: int = 3) -> str:
    """Returns a number with some significant digits, never in exponential form: 0.0123, 1.23, 12.3, 1234."""
    if not value:
        return "0"
    if not math.isfinite(value):
        return str(value)
    exponent = math.floor(math.log10(abs(float(f"{value:.{digits - 1}e}"))))
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def scaled(value: float, step: float, units: tuple[str, ...]) -> str:
    """Returns a number with the unit that leaves it below `step`."""
    index = 0
    while abs(value) >= step * 0.9995 and index < len(units) - 1:
        value, index = value / step, index + 1
    return (f"{value:.0f}" if index == 0 else significant(value)) + units[index]


def size(value: float | None) -> str:
    """Returns bytes as 999 B, 1.23 MB, ... (1 KB = 1000 B)."""
    return UNKNOWN if value is None else scaled(value, 1000, (" B", " KB", " MB", " GB", " TB"))


def count(value: float | None) -> str:
    """Returns a count as 999, 1.23k, 12.3M, ..."""
    return UNKNOWN if value is None else scaled(value, 1000, ("", "k", "M", "G", "T"))


def milliseconds(value: float | None) -> str:
    """Returns milliseconds without their unit."""
    return UNKNOWN if value is None else significant(value)


def error(value: float | None) -> str:
    """Returns a difference as 0 or 1.2e-07."""
    return UNKNOWN if value is None else "0" if value == 0 else f"{value:.1e}"


def share(value: float | None) -> str:
    """Returns 0.914 as 91.40%."""
    return UNKNOWN if value is None else f"{value:.2%}"


def bits(value: int) -> str:
    """Returns the width of weights in words."""
    return "float" if value == 32 else f"{value} bits"


def quality(metric: Metric | None) -> str:
    """Returns the value of a metric: a percentage where it is a share, else four digits."""
    if metric is None:
        return UNKNOWN
    return (
        share(metric.value)
        if metric.name in SHARES
        else f"{metric.value:.4g}"
        if metric.value > 1
        else f"{metric.value:.4f}"
    )


def weights(artifact: Artifact) -> str:
    """Returns what is in the weights of a sparse or clustered artifact; empty where that was not looked at."""
    if artifact.zeros is None or artifact.entropy_bytes is None:
        return ""
    return (
        f"weights: {artifact.zeros:.1%} zeros; {size(artifact.entropy_bytes)} if each tensor were coded by its entropy"
    )


def percent_of(value: float | None, reference: float | None) -> str:
    """Returns a size as a percentage of a reference."""
    if not value or not reference:
        return ""
    return f"{value / reference:.0%}" if value / reference >= 0.1 else f"{value / reference:.1%}"


def times_as_fast(value: float | None, reference: float | None) -> str:
    """Returns the speed of a latency against that of a reference, as 1.58x."""
    return f"{significant(reference / value)}x" if value and reference else ""


def headline(report: Report) -> list[str]:
    """Returns the result of a run: one sentence per kind of artifact."""
    original = report.original()
    emitted = [a for a in report.artifacts if a is not original and not a.rejected]
    if not emitted:
        rejected = any(a.rejected for a in report.artifacts)
        return ["No artifact passed: everything was rejected." if rejected else "No artifact was written."]
    sentences = [f"The {a.name} model {_against(original, a)}." for a in emitted if a.kind == "saved_model"]
    device = min((a for a in emitted if a.kind == "tflite"), key=lambda a: a.bytes, default=None)
    if device:
        sentences.append(f"The smallest device model, {device.name}, {_against(original, device)}.")
    return sentences


def _against(original: Artifact | None, artifact: Artifact) -> str:
    """Returns "is 24% smaller and 1.58 times as fast; accuracy is 91.40% as before (500 rows)"."""
    if original is None or not original.bytes or not artifact.bytes:
        return f"takes {size(artifact.bytes)}"
    parts = [_size_change(artifact.bytes / original.bytes)]
    if artifact.gzip_bytes and original.gzip_bytes:
        zipped, raw = original.gzip_bytes / artifact.gzip_bytes, original.bytes / artifact.bytes
        if zipped > 1.5 * max(raw, 1.0):  # zeros and clusters show only then
            parts[0] += f" ({significant(zipped, 2)} times once zipped)"
    if artifact.latency_ms_p50 and original.latency_ms_p50:
        speed = original.latency_ms_p50 / artifact.latency_ms_p50
        parts.append("as fast as it" if 0.98 <= speed <= 1.02 else f"{significant(speed)} times as fast")
    text = f"is {' and '.join(parts)}"
    ours, theirs = artifact.accuracy, original.accuracy
    if ours and theirs and ours.name == theirs.name:
        same = quality(ours) == quality(theirs)
        change = "as before" if same else f"instead of {quality(theirs)}"
        return f"{text}; {ours.name} is {quality(ours)} {change} ({ours.samples:,} rows)"
    if artifact.max_rel_error is not None:
        return f"{text}; on the inputs tried its outputs differ by up to {error(artifact.max_rel_error)} of their scale"
    return text


def _size_change(ratio: float) -> str:
    """Returns how a size compares with the original's."""
    if 0.995 <= ratio <= 1.005:
        return "of the original's size"
    if ratio > 1:
        return f"{ratio - 1:.0%} larger than the original"
    return (
        f"{significant(1 / ratio, 2)} times smaller than the original"
        if ratio < 0.5
        else f"{1 - ratio:.0%} smaller than the original"
    )
