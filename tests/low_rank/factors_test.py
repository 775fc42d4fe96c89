from __future__ import annotations

import numpy as np
import pytest

from tfopt.low_rank import factors
from tfopt.low_rank.factors import Factors, Moment, decompose, error, signal

SHAPE = (3, 3, 6, 8)
FULL = {"svd": (8,), "tucker": (6, 8), "spatial": (18,)}


def kernel(shape=SHAPE, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def inputs(size=54, rows=400, seed=1):
    """Patches whose components differ in strength and hang together, and their moment."""
    random = np.random.default_rng(seed)
    patches = random.normal(size=(rows, size)) * np.geomspace(1, 0.01, size) @ random.normal(size=(size, size)) + 0.3
    second = patches.T @ patches / rows
    channels = np.einsum("aiaj->ij", second.reshape(9, 6, 9, 6)) / 9
    return patches, Moment(np.linalg.cholesky(second).T, np.linalg.cholesky(channels).T, patches.mean(axis=0))


@pytest.mark.parametrize("known", [False, True], ids=["weights", "inputs"])
@pytest.mark.parametrize("method", FULL)
def test_full_rank_is_the_kernel(method, known):
    moment = inputs()[1] if known else None
    found = decompose(kernel(), method, FULL[method], moment)
    assert found.ranks == FULL[method]
    np.testing.assert_allclose(found.kernel(SHAPE), kernel(), atol=1e-9)
    assert error(kernel(), found, moment) < 1e-18


def test_cp_finds_a_kernel_of_its_rank():
    random = np.random.default_rng(3)
    arrays = tuple(random.normal(size=size) for size in [(6, 3), (3, 3), (3, 3), (3, 8)])
    of_rank_3 = Factors("cp", (3,), arrays).kernel(SHAPE)
    by_hand = np.einsum("ir,xr,yr,ro->xyio", *arrays)
    np.testing.assert_allclose(of_rank_3, by_hand, atol=1e-12)
    assert error(of_rank_3, decompose(of_rank_3, "cp", (3,))) < 1e-6
    assert error(of_rank_3, decompose(of_rank_3, "cp", (2,))) > 1e-3


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_of_an_svd_is_what_it_leaves_out(rank):
    matrix = kernel((1, 1, 30, 8))
    singular = np.linalg.svd(matrix[0, 0], compute_uv=False) ** 2
    found = decompose(matrix, "svd", (rank,))
    assert [a.shape for a in found.arrays] == [(30, rank), (rank, 8)]
    assert error(matrix, found) == pytest.approx(singular[rank:].sum() / singular.sum(), rel=1e-9)
    np.testing.assert_allclose(factors.spectrum(matrix, "svd"), singular, rtol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 30, 20), (1, 1, 20, 30), (1, 1, 300, 8)], ids=str)
def test_large_matrices_by_their_products(shape, monkeypatch):
    matrix = kernel(shape)
    by_svd = decompose(matrix, "svd", (5,)).kernel(shape)
    monkeypatch.setattr(factors, "_LARGE", 1)
    np.testing.assert_allclose(decompose(matrix, "svd", (5,)).kernel(shape), by_svd, atol=1e-6)
    singular = np.linalg.svd(matrix[0, 0], compute_uv=False)
    np.testing.assert_allclose(factors.spectrum(matrix, "svd"), singular**2, rtol=1e-6)


def test_the_spatial_split_leaves_out_what_its_spectrum_says():
    squares = factors.spectrum(kernel(), "spatial")
    assert len(squares) == 18
    found = decompose(kernel(), "spatial", (5,))
    assert error(kernel(), found) == pytest.approx(squares[5:].sum() / squares.sum(), rel=1e-9)


@pytest.mark.parametrize("ranks", [(2, 3), (5, 4), (6, 8)])
def test_the_energy_of_all_tucker_ranks_at_once(ranks):
    kept = factors.tucker_energy(kernel())
    assert kept.shape == (7, 9) and kept[-1, -1] == pytest.approx(1)
    quick = error(kernel(), decompose(kernel(), "tucker", ranks, quick=True))
    assert quick == pytest.approx(1 - kept[ranks], abs=1e-9)
    assert error(kernel(), decompose(kernel(), "tucker", ranks)) <= quick + 1e-9  # it starts there


@pytest.mark.parametrize(
    ("method", "ranks"), [("svd", (3,)), ("tucker", (4, 5)), ("cp", (12,)), ("spatial", (6,))], ids=str
)
def test_factors_for_the_inputs_have_a_smaller_error_on_them(method, ranks):
    patches, moment = inputs()
    fresh = np.random.default_rng(9).permutation(patches)[:200]
    outputs = fresh @ kernel().reshape(54, 8)

    def noise(found):
        return np.sum((fresh @ found.kernel(SHAPE).reshape(54, 8) - outputs) ** 2)

    plain, aware = (decompose(kernel(), method, ranks, m) for m in (None, moment))
    assert noise(aware) < 0.7 * noise(plain)
    assert error(kernel(), aware, moment) < 0.7 * error(kernel(), plain, moment)
    assert error(kernel(), plain) < error(kernel(), aware)  # by the weights it is the other way round


def test_the_svd_for_the_inputs_is_optimal():
    """The rank-3 matrix nearest to the outputs: their own truncated SVD."""
    patches, moment = inputs()
    outputs = patches @ kernel().reshape(54, 8)
    singular = np.linalg.svd(outputs, compute_uv=False) ** 2
    found = error(kernel(), decompose(kernel(), "svd", (3,), moment), moment)
    variance = np.sum((outputs - outputs.mean(axis=0)) ** 2)
    assert found == pytest.approx(singular[3:].sum() / variance, rel=1e-6)
    assert signal(kernel(), moment) == pytest.approx(variance / len(patches), rel=1e-9)


def test_rows_of_a_table_count_as_often_as_they_are_read():
    table = kernel((1, 1, 200, 8))
    often = np.full(200, 1e-4)
    often[:6] = 1
    moment = Moment(np.sqrt(often), np.sqrt(often), often)
    made = decompose(table, "svd", (6,), moment).kernel(table.shape)
    assert np.abs(made - table)[0, 0, :6].max() < 0.05 < np.abs(made - table)[0, 0, 6:].max()


@pytest.mark.parametrize("method", ["svd", "tucker", "cp", "spatial"])
def test_factors_are_of_like_norms(method):
    found = decompose(1e4 * kernel(), method, (4, 4) if method == "tucker" else (4,))
    norms = [np.linalg.norm(array) for array in found.arrays]
    assert max(norms) < 30 * min(norms)
