"""The search finds what is cheap where errors add up, and ends well where they do not, or where nothing is enough."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tfopt.bit_search import FLOAT, Layer, search


def random_layers(count: int, seed: int) -> list[Layer]:
    random = np.random.default_rng(seed)
    sizes, errors = random.integers(10, 1000, count), random.gamma(0.5, size=count)
    return [
        Layer(f"l{i}", int(n), {4: float(e), 8: float(e / 256)})
        for i, (n, e) in enumerate(zip(sizes, errors, strict=True))
    ]


def added(layers: list[Layer]):
    return lambda bits: sum(layer.errors.get(bits[layer.name], 0.0) for layer in layers)


def cost(layers: list[Layer], bits: dict[str, int]) -> float:
    return sum(layer.bytes(bits[layer.name]) for layer in layers)


@pytest.mark.parametrize("seed", range(8))
def test_nearly_the_least_bytes_within_the_bar(seed):
    layers = random_layers(8, seed)
    drop = added(layers)
    bar = 0.3 * drop(dict.fromkeys([layer.name for layer in layers], 4))
    found = search(layers, drop, bar)
    assert found.met and found.drop <= bar and found.drop == pytest.approx(drop(found.bits))
    names = [layer.name for layer in layers]
    choices = (dict(zip(names, bits, strict=True)) for bits in itertools.product((4, 8), repeat=8))
    least = min(cost(layers, bits) for bits in choices if drop(bits) <= bar)
    assert cost(layers, found.bits) <= 1.15 * least
    assert found.evaluations <= 2 + 3 + 8


@pytest.mark.parametrize(("bar", "bits"), [(1e9, 4), (0.0, FLOAT)])
def test_the_ends(bar, bits):
    layers = random_layers(5, 1)
    found = search(layers, added(layers), bar, (4, 8, FLOAT))
    assert found.met and set(found.bits.values()) == {bits}
    assert bits != 4 or found.evaluations == 1


def test_float_only_where_it_is_needed():
    layers = random_layers(6, 2)
    drop = added(layers)
    found = search(layers, drop, 0.2 * drop(dict.fromkeys([layer.name for layer in layers], 8)), (4, 8, FLOAT))
    assert found.met and set(found.bits.values()) == {8, FLOAT}
    assert found.uniform[4] > found.uniform[8] > found.drop


def test_a_bar_that_cannot_be_met_gives_the_nearest_miss():
    layers = random_layers(4, 3)
    drop = added(layers)
    found = search(layers, lambda bits: 0.1 + drop(bits), 0.05, (4, 8, FLOAT))
    assert not found.met and found.drop == pytest.approx(0.1) and set(found.bits.values()) == {FLOAT}


def test_the_nearest_miss_is_the_cheapest_of_those_that_are_as_near():
    layers = random_layers(4, 3)
    found = search(layers, lambda _: 1.0, 0.5)
    assert not found.met and set(found.bits.values()) == {4}


def test_nan_is_too_much():
    layers = random_layers(3, 4)
    found = search(layers, lambda bits: float("nan") if 4 in bits.values() else 0.0, 0.5)
    assert found.met and set(found.bits.values()) == {8}


@pytest.mark.parametrize("seed", range(4))
def test_a_noisy_drop_is_within_the_bar_all_the_same(seed):
    layers = random_layers(20, seed)
    drop, random = added(layers), np.random.default_rng(seed)
    noise: dict[tuple[int, ...], float] = {}

    def noisy(bits):
        return drop(bits) + noise.setdefault(tuple(bits.values()), 0.1 * random.normal())

    found = search(layers, noisy, 0.5, limit=25)
    assert found.met and found.drop <= 0.5 and found.evaluations <= 25
    assert found.drop == pytest.approx(noisy(found.bits))


def test_what_a_bit_costs_may_differ():
    """Two layers of one size and error: the one whose bits cost less is restored."""
    layers = [Layer("dear", 100, {4: 1.0, 8: 0.0}, weight=9.0), Layer("cheap", 100, {4: 1.0, 8: 0.0})]
    assert search(layers, added(layers), 1.0).bits == {"dear": 4, "cheap": 8}
    assert search(layers, added(layers), 0.5, widths=(8, FLOAT)).bits == {"dear": 8, "cheap": 8}
