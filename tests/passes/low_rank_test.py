"""Low rank as a pass: what is factored and said, what is lost, what training brings back, and the files."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import REPO, serve_v1
from tests.low_rank.edit_test import answer, weight
from tests.origins import rows, v1
from tests.passes.int8_weights_test import _build
from tfopt import model
from tfopt.calibration import values
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.function import Function
from tfopt.passes import Data, get, low_rank
from tfopt.recipe import read
from tfopt.rewrite import Log


def run(loaded, data=None, **options):
    log = Log()
    low_rank.run(loaded, log, data or Data("serving_default", loaded.copy()), **{"epochs": 0, **options})
    loaded.check()
    return log


def flops(log) -> tuple[int, int]:
    (note,) = [note for note in log.notes if " FLOPs became " in note]
    before, after = re.findall(r"([\d,]+) FLOPs became ([\d,]+)", note)[0]
    return int(before.replace(",", "")), int(after.replace(",", ""))


def low(*shape, rank, name="w", noise=0.0):
    size = int(np.prod(shape[:-1]))
    value = rows(size, rank, seed=5) @ rows(rank, shape[-1], seed=6) + noise * rows(size, shape[-1], seed=7)
    return v1.get_variable(name, initializer=value.reshape(shape))


def test_a_matrix_of_low_rank_loses_nothing(tmp_path):
    loaded = _build(tmp_path / "m", (None, 64), lambda x: tf.nn.bias_add(x @ low(64, 48, rank=8), rows(48)))
    x = rows(5, 64)
    expected = answer(loaded, x)
    log = run(loaded, energy=0.999)
    assert log.applied == {"product factored by svd": 1}
    assert flops(log) == (2 * 64 * 48, 2 * 8 * (64 + 48))
    np.testing.assert_allclose(answer(loaded, x), expected, atol=1e-3)
    assert any("svd of rank 8, 3,072 multiplications became 896, error" in note for note in log.notes)


def test_variational_bayes_finds_the_rank(tmp_path):
    loaded = _build(tmp_path / "m", (None, 100), lambda x: x @ low(100, 120, rank=16, noise=0.5))
    log = run(loaded, rank="vbmf")
    assert any("svd of rank 16," in note for note in log.notes)


def test_a_convolution_by_each_method(tmp_path):
    loaded = _build(
        tmp_path / "m", (None, 9, 9, 24), lambda x: tf.nn.relu(tf.nn.conv2d(x, low(3, 3, 24, 32, rank=8), 2, "SAME"))
    )
    x = rows(3, 9, 9, 24)
    expected = answer(loaded, x)
    for method in ("svd", "tucker", "cp", "spatial"):
        made = loaded.copy()
        log = run(made, method=method, energy=0.999 if method == "svd" else 0.6)
        assert log.applied == {f"convolution factored by {method}": 1}
        before, after = flops(log)
        assert before == 2 * 25 * 9 * 24 * 32 and after < 0.95 * before
        error = np.sum((answer(made, x) - expected) ** 2) / np.sum(expected**2)
        assert error < (1e-6 if method == "svd" else 0.7)
    log = run(loaded)
    assert log.applied == {"convolution factored by svd": 1}  # the cheapest here


def test_embeddings_are_factored_for_bytes(tmp_path):
    loaded = _build(
        tmp_path / "m", (None, 4), lambda x: tf.reduce_mean(tf.gather(low(500, 32, rank=4), x), 1), tf.int32
    )
    x = np.random.default_rng(0).integers(0, 500, (6, 4)).astype(np.int32)
    expected = answer(loaded, x)
    with pytest.raises(TfoptError, match="a lookup has no FLOPs to lower"):
        run(loaded.copy(), minimize="flops")
    before = loaded.weight_bytes
    log = run(loaded, energy=0.999)
    assert log.applied == {"lookup factored by svd": 1} and loaded.weight_bytes < 0.2 * before
    np.testing.assert_allclose(answer(loaded, x), expected, atol=1e-4)


def _two(x):
    return tf.nn.relu(x @ weight(96, 96)) @ weight(96, 96, name="v")


WRONG = {
    r"rank must be one of energy, flops, vbmf; received 'svd'": {"rank": "svd"},
    r"method must be one of auto, svd, tucker, cp, spatial; received 'pca'": {"method": "pca"},
    r"minimize must be one of auto, flops, bytes; received 'latency'": {"minimize": "latency"},
    r"energy is a share between 0 and 1; received 90": {"energy": 90.0},
    r"flops is a share between 0 and 1; received 1": {"flops": 1.0},
    r"keep_float32|keep=|matches no op and no node": {"keep": "nothing"},
    r"no layer of the model can be factored: .*'w.*' ?stays|stays as keep wants it": {"keep": "MatMul"},
    r"no layer of the model can be factored: factors that cost less leave an error of": {"energy": 0.999},
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_said_in_a_line(message, tmp_path):
    loaded = _build(tmp_path / "m", (None, 96), _two)
    with pytest.raises(TfoptError, match=message) as error:
        run(loaded, **WRONG[message])
    assert "\n" not in str(error.value)


def test_a_target_out_of_reach_is_said(tmp_path):
    loaded = _build(tmp_path / "m", (None, 96), _two)
    log = run(loaded, rank="flops", flops=0.99)
    (warning,) = log.warnings
    assert "99% of the FLOPs were to be removed" in warning


def test_without_rows_it_says_that_nothing_was_recovered(tmp_path):
    loaded = _build(tmp_path / "m", (None, 96), _two)
    log = run(loaded, rank="flops", flops=0.2, epochs=2)
    assert any("not recovered" in warning for warning in log.warnings)


@pytest.fixture(scope="module")
def digits():
    """The digits model after the lossless recipe, its original, rows to learn from, and rows with labels."""
    from sklearn.datasets import load_digits

    original = model.load(REPO / "saved_models" / "digits")
    prepared = original.copy()
    for name, options in read("lossless").steps:
        get(name).run(prepared, Log(), **options)
    found = load_digits()
    images = (found.images[..., None] / 16).astype(np.float32)
    return prepared, original, Dataset({"image": images[:1400]}, None, "digits"), (images[1400:], found.target[1400:])


def scores(loaded, images):
    with Function(loaded) as function:
        return next(iter(function("serving_default", {"image": images}).values()))


def accuracy(loaded, test):
    return float(np.mean(scores(loaded, test[0]).argmax(axis=1) == test[1]))


def test_rows_make_better_factors(digits):
    """At the same ranks, on rows that the factors were not made from: of the layer, and of the logits."""
    prepared, original, given, test = digits
    products = [node.name for node in prepared.graph.nodes.values() if node.op == "MatMul"]
    fresh = Dataset({"image": test[0]}, None, "digits")

    def outputs(loaded):
        parts = [tensors for _, tensors in values(loaded, "serving_default", products, fresh)]
        return [np.concatenate([part[name] for part in parts]) for name in products]

    errors = {}
    for weighted in (False, True):
        made = prepared.copy()
        log = run(made, Data("serving_default", original, rows=given), rank="flops", flops=0.27, weighted=weighted)
        assert any("svd of rank 16" in note for note in log.notes)
        pairs = zip(outputs(made), outputs(prepared), strict=True)
        errors[weighted] = [float(np.sum((a - b) ** 2) / np.sum((b - b.mean(axis=0)) ** 2)) for a, b in pairs]
    print(f"noise over signal of the layer and of the logits: by weights {errors[False]}, by rows {errors[True]}")
    assert all(aware < 0.5 * plain for plain, aware in zip(errors[False], errors[True], strict=True))


def test_a_third_fewer_flops_on_rows_without_labels(digits, tmp_path):
    from tfopt import runtime
    from tfopt.cost import cost
    from tfopt.export import tflite

    prepared, original, given, test = digits
    made = prepared.copy()
    log = run(made, Data("serving_default", original, rows=given), rank="flops", flops=0.3, epochs=4)
    before, after = flops(log)
    assert after <= 0.7 * before
    assert accuracy(made, test) >= accuracy(prepared, test) - 0.01
    saved_model.save(made, tmp_path / "m")
    assert cost(tmp_path / "m").flops == after
    served = next(iter(serve_v1(tmp_path / "m", {"image": test[0]}).values()))
    np.testing.assert_allclose(served, scores(made, test[0]), atol=1e-4)
    (result,) = tflite.convert(tmp_path / "m", ["float32"], tmp_path / "device")
    assert not result.error
    with runtime.open(result.path, threads=1) as file:
        received = next(iter(file.run("serving_default", {"image": test[0][:8]}).values()))
    np.testing.assert_allclose(received, served[:8], atol=1e-4)


def test_it_is_a_pass_that_learns_and_keeps_nothing():
    chosen = get("low_rank")
    assert chosen.learns and not chosen.lossless and chosen.keeps == () and chosen.needs == ("fold_affine",)
