"""Ranges from histograms, against what the definitions give on the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from tfopt.clipping import METHODS, Observed, clipped

random = np.random.default_rng(0)
SAMPLES = {
    "normal": random.normal(size=50_000),
    "relu": np.maximum(random.normal(size=50_000), 0),
    "laplace": random.laplace(1.0, 2.0, size=50_000),
    "outlier": np.append(random.normal(size=50_000), 60.0),
    "skewed": random.gamma(0.5, size=50_000) - 0.05,
    "negative": -random.gamma(2.0, size=50_000),
}


def seen(values: np.ndarray) -> Observed:
    values = np.asarray(values, np.float32)
    found = Observed(float(values.min(initial=0)), float(values.max(initial=0)))
    for part in np.array_split(values, 3):
        found.add(part)
    return found


def quantized(values: np.ndarray, low: float, high: float, bits: int) -> np.ndarray:
    levels = 2**bits - 1
    step = (high - low) / levels
    zero = np.round(-low / step)
    return step * (np.clip(np.round(values / step) + zero, 0, levels) - zero)


def mean_error(values: np.ndarray, low: float, high: float, bits: int) -> float:
    return float(np.mean((values - quantized(values, low, high, bits)) ** 2))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SAMPLES)
def test_ranges_hold_zero_and_lie_within_the_extremes(name, method):
    values = SAMPLES[name]
    low, high = clipped(seen(values), method)
    assert min(values.min(), 0) - 1e-6 <= low <= 0 <= high <= max(values.max(), 0) + 1e-6 and low < high


@pytest.mark.parametrize("name", SAMPLES)
def test_percentile_is_the_percentile(name):
    values = SAMPLES[name]
    low, high = clipped(seen(values), "percentile", percentile=99.5)
    bin_width = np.abs(values).max() / 4096
    assert abs(high - max(np.percentile(values, 99.5), 0)) <= 2 * bin_width
    assert abs(low - min(np.percentile(values, 0.5), 0)) <= 2 * bin_width


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", SAMPLES)
def test_mse_is_as_good_as_the_best_of_a_search_on_the_values(name, bits):
    values = SAMPLES[name]
    low, high = min(values.min(), 0), max(values.max(), 0)
    found = mean_error(values, *clipped(seen(values), "mse", bits), bits)
    fractions = np.linspace(0.05, 1, 39)
    least = min(mean_error(values, a * low, b * high, bits) for a in fractions for b in fractions)
    assert found <= 1.03 * least
    assert found <= mean_error(values, low, high, bits)


def test_mse_with_steps_finer_than_bins_cuts_off_nearly_nothing():
    values = SAMPLES["normal"]
    low, high = clipped(seen(values), "mse", bits=16)
    assert low <= 0.9 * values.min() and high >= 0.9 * values.max()


def test_entropy_cuts_off_an_outlier_and_keeps_what_is_uniform():
    low, high = clipped(seen(SAMPLES["outlier"]), "entropy")
    assert 2 < high < 10 and low < -2
    assert clipped(seen(random.uniform(0, 1, 50_000)), "entropy")[1] > 0.95


def test_entropy_is_that_of_the_plain_loop():
    """Migacz (2017), slide 38, over 2048 bins of |x|, 256 steps for a tensor without negative values."""
    values = np.maximum(SAMPLES["laplace"], 0).astype(np.float32)
    counts, edges = np.histogram(values[values > 0], bins=2048, range=(0, float(values.max())))
    divergences = {}
    for size in range(2048, 256, -16):
        reference = counts[:size].astype(float)
        reference[-1] += counts[size:].sum()
        candidate = np.zeros(size)
        for group in np.array_split(np.arange(size), 256):
            inside = group[reference[group] > 0]
            if len(inside):
                candidate[inside] = counts[group].sum() / len(inside)
        held = reference > 0
        p, q = reference[held] / reference.sum(), np.maximum(candidate[held], 0.5)
        divergences[float(edges[size])] = np.sum(p * np.log(p / (q / q.sum())))
    low, high = clipped(seen(values), "entropy")
    nearest = min(divergences, key=lambda threshold: abs(threshold - high))
    assert low == 0 and abs(nearest - high) < 1e-3 * high
    assert divergences[nearest] <= 1.1 * min(divergences.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.zeros(10), (0, 1)),
        (np.full(10, 3.0), (0, 3)),
        (np.full(10, -2.0), (-2, 0)),
        (np.full(10, 1e-12), None),
        (np.array([7.0]), (0, 7)),
    ],
)
def test_constant_tensors_have_a_range(values, wanted, method):
    low, high = clipped(seen(values), method)
    assert low <= 0 <= high and high - low >= 1e-9
    if wanted is not None and method == "minmax":
        assert (low, high) == wanted
    error = np.abs(quantized(values, low, high, 8) - values).max()
    assert error <= max(0.01 * np.abs(values).max(), 1e-9)


@pytest.mark.parametrize("name", SAMPLES)
def test_parts_merge_to_what_one_sees(name):
    values = SAMPLES[name].astype(np.float32)
    values[::7] = 0
    whole = Observed(float(values.min(initial=0)), float(values.max(initial=0)))
    extremes = Observed()
    parts = np.array_split(random.permutation(values), 9)
    for part in parts:
        extremes.merge(Observed(float(part.min(initial=0)), float(part.max(initial=0))))
    merged = Observed()
    for part in [np.zeros(0, np.float32), *parts]:
        found = Observed(extremes.low, extremes.high)
        found.add(part)
        merged.merge(found)
    whole.add(values)
    for field in ("low", "high", "zeros", "width"):
        assert getattr(merged, field) == getattr(whole, field)
    assert np.array_equal(merged.negative, whole.negative) and np.array_equal(merged.positive, whole.positive)
    assert extremes.width == 0 and extremes.zeros == 0


def test_bins_of_another_width_are_not_added():
    one, two = seen(np.arange(4.0)), seen(np.arange(5.0))
    with pytest.raises(ValueError, match="bins of width"):
        one.merge(two)
