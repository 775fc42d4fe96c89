from __future__ import annotations

import numpy as np
import pytest

from tfopt.low_rank import vbmf


def noisy(rows, columns, rank, noise, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(rows, rank)) @ random.normal(size=(rank, columns)) + noise * random.normal(
        size=(rows, columns)
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("rows", "columns", "rank", "noise"),
    [
        (100, 200, 10, 0.1),
        (200, 100, 10, 1.0),
        (64, 64, 20, 0.3),
        (50, 1000, 5, 1.0),
        (300, 100, 30, 0.5),
        (100, 200, 0, 1.0),
        (40, 60, 1, 0.5),
    ],
)
def test_it_finds_the_rank_under_noise(rows, columns, rank, noise, seed):
    assert vbmf.rank(noisy(rows, columns, rank, noise, seed)) == rank


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_it_does_not_depend_on_the_unit_or_on_the_side(scale):
    matrix = scale * noisy(60, 90, 7, 0.4)
    assert vbmf.rank(matrix) == vbmf.rank(matrix.T) == 7


def test_components_too_weak_to_be_told_from_noise_are_noise():
    """Above the level where the largest singular value of noise lies, sqrt(L) + sqrt(M), a component is found."""
    random = np.random.default_rng(2)
    noise = random.normal(size=(100, 200))
    u, v = (np.linalg.qr(random.normal(size=(size, 1)))[0] for size in (100, 200))
    edge = np.sqrt(100) + np.sqrt(200)
    assert vbmf.rank(noise + 0.5 * edge * u @ v.T) == 0
    assert vbmf.rank(noise + 2 * edge * u @ v.T) == 1


def test_without_noise_it_is_the_rank():
    assert vbmf.rank(noisy(40, 60, 6, 0.0)) == 6
    assert vbmf.rank(np.zeros((5, 5))) == 0 and vbmf.rank(np.ones((1, 9))) == 1


def test_singular_values_of_a_tall_matrix():
    matrix = noisy(500, 20, 20, 0.1)
    np.testing.assert_allclose(vbmf.singular_values(matrix), np.linalg.svd(matrix, compute_uv=False), rtol=1e-9)
