from __future__ import annotations

import numpy as np
import pytest

from tfopt.low_rank import factors
from tfopt.low_rank.choice import Choice, Options, allot, grid, interpolated, vbmf_error
from tfopt.low_rank.layers import Geometry, Layer
from tfopt.rewrite import Refused


def layer(shape, rank=None, noise=0.0, kind="convolution", positions=49, seed=0, **geometry):
    """A layer whose kernel is of a rank over [x y i, o], with noise."""
    random = np.random.default_rng(seed)
    size = int(np.prod(shape[:3]))
    kernel = random.normal(size=(size, shape[3]))
    if rank:
        kernel = random.normal(size=(size, rank)) @ random.normal(size=(rank, shape[3])) + noise * kernel
    at = Geometry(positions, positions, positions, **geometry)
    return Layer("w", ("n",), kind, kernel.reshape(shape).astype(np.float32), (at,))


def test_ranks_that_are_tried():
    assert grid(30) == [1, 2, 3, 4, 5, 6, 7, 8, 16, 24]


COSTS = [
    ("", (), 49 * 9 * 16 * 24, 9 * 16 * 24),
    ("svd", (4,), 49 * (9 * 16 * 4 + 4 * 24), 9 * 16 * 4 + 4 * 24),
    ("tucker", (4, 5), 196 * 16 * 4 + 49 * (9 * 4 * 5 + 5 * 24), 16 * 4 + 9 * 4 * 5 + 5 * 24),
    ("cp", (4,), 196 * 16 * 4 + 49 * (9 * 4 + 4 * 24), 4 * (16 + 9 + 24)),
    ("spatial", (4,), 98 * 3 * 16 * 4 + 49 * 3 * 4 * 24, 4 * 3 * (16 + 24)),
]


@pytest.mark.parametrize(("method", "ranks", "macs", "elements"), COSTS, ids=[case[0] or "whole" for case in COSTS])
def test_what_the_factors_of_a_strided_convolution_cost(method, ranks, macs, elements):
    kernel = np.zeros((3, 3, 16, 24), np.float32)
    made = Layer("w", ("n",), "convolution", kernel, (Geometry(196, 98, 49, (2, 2)),))
    assert made.macs(method, ranks) == macs and made.elements(method, ranks) == elements


def test_cp_without_strides_has_two_depthwise_convolutions():
    made = layer((3, 3, 16, 24))
    assert made.macs("cp", (4,)) == 49 * 4 * (16 + 3 + 3 + 24) and made.elements("cp", (4,)) == 4 * (16 + 6 + 24)


def test_the_smallest_rank_within_the_bound():
    made = Options(layer((1, 1, 64, 64)), None, ["svd"], "auto")
    squares = factors.spectrum(made.layer.kernel, "svd")
    kept = np.cumsum(squares) / squares.sum()
    found = made.within(0.4)
    assert found.ranks[0] in grid(64) and kept[found.ranks[0] - 1] >= 0.6
    assert kept[grid(64)[grid(64).index(found.ranks[0]) - 1] - 1] < 0.6
    with pytest.raises(Refused, match="factors that cost less leave an error of"):
        made.within(0.01)


def test_the_cheapest_of_all_methods_wins():
    """A kernel that is a sum of 4 products of rows and columns; one of few channels; one of few outputs."""
    random = np.random.default_rng(0)
    apart = np.einsum("xir,yro->xyio", random.normal(size=(3, 32, 4)), random.normal(size=(3, 4, 32)))
    mixed = np.einsum(
        "ir,xyrs,so->xyio", random.normal(size=(32, 4)), random.normal(size=(3, 3, 4, 4)), random.normal(size=(4, 32))
    )
    wide = layer((3, 3, 16, 64), rank=4).kernel
    for kernel, method, ranks in ((apart, "spatial", (4,)), (mixed, "tucker", (4, 4)), (wide, "svd", (4,))):
        at = (Geometry(49, 49, 49),)
        made = Layer("w", ("n",), "convolution", kernel.astype(np.float32), at)
        found = Options(made, None, ["svd", "tucker", "spatial"], "auto").within(1e-6)
        assert (found.method, found.ranks) == (method, ranks)
        assert found.macs < made.macs() and found.error < 1e-6


def test_what_grows_is_not_chosen():
    """A convolution with strides: Tucker's first factor works at many more positions than the layer."""
    kernel = layer((3, 3, 16, 16), rank=8).kernel
    made = Layer("w", ("n",), "convolution", kernel, (Geometry(4900, 700, 100, (7, 7)),))
    for minimize in ("auto", "flops", "bytes"):
        for front in Options(made, None, ["svd", "tucker", "spatial"], minimize).fronts.values():
            assert all(price <= 0.95 for price, _, _ in front)
    by_bytes = Options(made, None, ["tucker"], "bytes").fronts["tucker"]
    assert max(made.macs("tucker", ranks) for _, _, ranks in by_bytes) > made.macs()
    by_both = Options(made, None, ["tucker"], "auto").fronts["tucker"]
    assert max(made.macs("tucker", ranks) for _, _, ranks in by_both) <= made.macs()


def test_a_table_is_factored_for_its_bytes():
    table = layer((1, 1, 500, 32), rank=6, kind="lookup")
    found = Options(table, None, ["svd"], "auto").within(1e-6)
    assert found.ranks == (6,) and found.elements == 6 * 532
    with pytest.raises(Refused, match="no FLOPs to lower"):
        Options(table, None, ["svd"], "flops").within(1e-6)


def test_the_error_at_the_ranks_of_variational_bayes():
    """What the ranks leave is about all of the noise, and nothing else."""
    made = layer((1, 1, 80, 100), rank=5, noise=0.3)
    assert vbmf_error(made, None) == pytest.approx(0.09 / 5.09, rel=0.2)
    random = np.random.default_rng(0)
    mixed = np.einsum(
        "ir,xyrs,so->xyio", random.normal(size=(40, 3)), random.normal(size=(3, 3, 3, 4)), random.normal(size=(4, 48))
    )
    noisy = mixed + 0.5 * random.normal(size=mixed.shape)
    made = Layer("w", ("n",), "convolution", noisy.astype(np.float32), (Geometry(49, 49, 49),))
    assert vbmf_error(made, None) == pytest.approx(0.25 / np.mean(noisy**2), rel=0.1)


def choices(*points):
    """(multiply-accumulates, error) of one layer."""
    return [Choice("svd", (macs,), error, macs, macs) for macs, error in points]


def test_flops_go_where_they_do_the_least_harm():
    options = {
        "robust": choices((80, 0.01), (50, 0.02), (20, 0.3)),
        "fragile": choices((80, 0.2), (50, 0.6)),
    }
    whole, alike = {"robust": 100, "fragile": 100}, {"robust": float, "fragile": float}
    chosen = allot(options, whole, alike, 40)
    assert {name: choice.macs for name, choice in chosen.items()} == {"robust": 50}
    chosen = allot(options, whole, alike, 70)
    assert {name: choice.macs for name, choice in chosen.items()} == {"robust": 20}
    chosen = allot(options, whole, {"robust": float, "fragile": lambda error: error / 100}, 70)
    assert {name: choice.macs for name, choice in chosen.items()} == {"robust": 80, "fragile": 50}
    assert len(allot(options, whole, alike, 1000)) == 2  # all that there is
    assert allot(options, whole, alike, 0) == {}


def test_harm_between_measured_points():
    harm = interpolated([0.4, 0.1, 0.2], [0.9, 0.01, 0.04])
    assert harm(0.1) == pytest.approx(0.01) and harm(0.4) == pytest.approx(0.9)
    assert harm(np.sqrt(0.1 * 0.2)) == pytest.approx(0.02)  # the mean of the logarithms
    assert harm(0.05) == pytest.approx(0.005) and harm(0.8) == pytest.approx(1.8)
    assert interpolated([0.1, 0.2], [0.5, 0.3])(0.2) == pytest.approx(0.5)  # it does not fall
    assert interpolated([0.1], [0.0])(0.1) < 1e-12


def test_greedy_is_near_the_best_of_all_combinations():
    random = np.random.default_rng(1)
    whole = dict.fromkeys("abcd", 100)
    options = {}
    for name in whole:
        macs = np.sort(random.choice(95, 6, replace=False))[::-1]
        options[name] = choices(*zip(macs.tolist(), np.sort(random.uniform(size=6)).tolist(), strict=True))
    for wanted in (50, 120, 200):
        chosen = allot(options, whole, dict.fromkeys(whole, float), wanted)
        assert sum(100 - choice.macs for choice in chosen.values()) >= wanted
        received = sum(choice.error for choice in chosen.values())
        best = {0: 0.0}
        for name in whole:  # saved -> least error
            steps = [(0, 0.0), *((100 - c.macs, c.error) for c in options[name])]
            merged: dict[int, float] = {}
            for (saved, error), (more, cost) in ((a, b) for a in best.items() for b in steps):
                merged[saved + more] = min(merged.get(saved + more, np.inf), error + cost)
            best = merged
        least = min(error for saved, error in best.items() if saved >= wanted)
        assert received <= 1.35 * least
