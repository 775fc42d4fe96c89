"""Scores, patterns and how a target is shared out, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from tfopt.errors import TfoptError
from tfopt.pruning.sparsity import Layer, Layout, Pattern, Rule, zeros
from tfopt.rewrite import Refused

RANDOM = np.random.default_rng(0)
CONVOLUTION, DENSE, TRANSPOSED = Layout((0, 1, 2)), Layout((0,)), Layout((1,))


def kernel(*shape, scale=1.0):
    return (scale * RANDOM.normal(size=shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", Pattern()), ("2:4", Pattern(keep=2, of=4)), ("1:8", Pattern(keep=1, of=8)), ("4x1", Pattern(rows=4))],
)
def test_patterns(text, expected):
    assert Pattern.parse(text) == expected


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "1x1", "2x", "x", "0x4", "2:4:8"])
def test_what_is_no_pattern(text):
    with pytest.raises(TfoptError, match=f"pattern must be N:M such as 2:4 .*; received '{text}'"):
        Pattern.parse(text)


def test_a_kernel_as_a_matrix_of_outputs_by_inputs():
    w = kernel(3, 2, 8, 5)
    matrix = CONVOLUTION.matrix(w)
    assert matrix.shape == (5, 48)
    np.testing.assert_array_equal(matrix[3, :8], w[0, 0, :, 3])  # one place of the window, along input channels
    for layout, shape in (
        (CONVOLUTION, (3, 2, 8, 5)),
        (DENSE, (6, 4)),
        (TRANSPOSED, (6, 4)),
        (Layout((0, 1, 3)), (3, 3, 5, 8)),
    ):
        w = kernel(*shape)
        np.testing.assert_array_equal(layout.kernel(layout.matrix(w), shape), w)


def test_lamp_by_hand():
    w = np.array([[3.0, -1.0], [2.0, 4.0]], np.float32)  # 1/30, 4/29, 9/25, 16/16
    other = np.array([[0.3, 0.2], [0.1, 0.9]], np.float32)  # 0.01/0.95, 0.04/0.94, 0.09/0.9, 1
    layers = {"w": Layer(DENSE), "other": Layer(DENSE)}
    for share, left in ((1 / 8, (4, 3)), (3 / 8, (3, 2)), (4 / 8, (3, 1)), (5 / 8, (2, 1)), (6 / 8, (1, 1))):
        masks = Rule().masks(layers, {"w": w, "other": other}, share)
        assert (masks["w"].sum(), masks["other"].sum()) == left, share
        assert masks["w"][1, 1] and masks["other"][1, 1]  # the largest of a layer goes last


@pytest.mark.parametrize(
    ("scope", "criterion", "moved"),
    [("global", "lamp", False), ("layer", "magnitude", False), ("global", "magnitude", True)],
)
def test_units_of_a_layer_matter_to_plain_magnitudes_alone(scope, criterion, moved):
    layers = {"a": Layer(CONVOLUTION), "b": Layer(DENSE)}
    kernels = {"a": kernel(3, 3, 8, 8), "b": kernel(40, 50)}
    rule = Rule(scope, criterion)
    masks = rule.masks(layers, kernels, 0.7)
    scaled = rule.masks(layers, {**kernels, "a": 100 * kernels["a"]}, 0.7)
    assert any(np.any(masks[name] != scaled[name]) for name in masks) is moved
    assert zeros(masks.values()) == pytest.approx(0.7, abs=0.001)
    if scope == "layer":
        for name, mask in masks.items():
            assert zeros([mask]) == pytest.approx(0.7, abs=0.001)
            assert np.abs(kernels[name][mask]).min() >= np.abs(kernels[name][~mask]).max()


def test_what_one_layer_may_not_lose_others_do():
    layers = {"a": Layer(DENSE, most=0.2), "b": Layer(DENSE)}
    kernels = {"a": kernel(40, 50, scale=0.01), "b": kernel(40, 50)}
    masks = Rule(criterion="magnitude").masks(layers, kernels, 0.5)
    assert zeros([masks["a"]]) == pytest.approx(0.2) and zeros([masks["b"]]) == pytest.approx(0.8)
    everything = {name: Layer(DENSE, most=0.2) for name in layers}
    assert zeros(Rule().masks(everything, kernels, 0.5).values()) == pytest.approx(0.2)


def test_a_layer_loses_a_tenth_or_nothing():
    layers = {"a": Layer(DENSE), "b": Layer(DENSE)}
    kernels = {"a": np.where(RANDOM.random((40, 50)) < 0.05, 0.001, 100.0), "b": kernel(40, 50)}
    masks = Rule(criterion="magnitude").masks(layers, kernels, 0.4)
    assert masks["a"].all() and zeros([masks["b"]]) == pytest.approx(0.8, abs=0.001)
    open_ended = Rule(criterion="magnitude", least=0.0).masks(layers, kernels, 0.4)
    assert 0.03 < zeros([open_ended["a"]]) < 0.07


@pytest.mark.parametrize(
    ("layout", "shape"),
    [(CONVOLUTION, (3, 3, 8, 6)), (DENSE, (12, 7)), (TRANSPOSED, (7, 12)), (Layout((0, 1, 3)), (3, 3, 5, 8))],
)
def test_two_of_four_along_the_inputs(layout, shape):
    w = kernel(*shape)
    rule = Rule(pattern=Pattern(2, 4))
    half, all_of_it = (rule.masks({"w": Layer(layout)}, {"w": w}, share)["w"] for share in (0.5, 1.0))
    groups = np.abs(np.moveaxis(w, layout.summed[-1], -1).reshape(-1, 4))
    stays = np.moveaxis(all_of_it, layout.summed[-1], -1).reshape(-1, 4)
    assert (stays.sum(1) == 2).all()
    assert (np.where(stays, groups, np.inf).min(1) >= np.where(stays, 0, groups).max(1)).all()
    assert zeros([half]) == pytest.approx(0.25, abs=0.01) and not np.any(all_of_it & ~half)


@pytest.mark.parametrize("pattern", ["1x4", "4x1", "2x8"])
def test_blocks_go_whole(pattern):
    rule = Rule(pattern=Pattern.parse(pattern))
    rows, columns = rule.pattern.rows, rule.pattern.columns
    w = kernel(3, 3, 8, 18)  # 18 outputs: the last block of 4 is smaller
    mask = rule.masks({"w": Layer(CONVOLUTION)}, {"w": w}, 0.6)["w"]
    matrix = CONVOLUTION.matrix(mask)
    for row in range(0, 18, rows):
        for column in range(0, 72, columns):
            assert len(np.unique(matrix[row : row + rows, column : column + columns])) == 1
    assert zeros([mask]) == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("rule", [Rule(), Rule("layer"), Rule(pattern=Pattern(2, 4)), Rule(pattern=Pattern(columns=4))])
def test_what_is_pruned_stays_as_it_is(rule):
    layers = {"a": Layer(CONVOLUTION, 0.5), "b": Layer(DENSE)}
    kernels = {"a": kernel(3, 3, 8, 8), "b": kernel(40, 50)}
    share = 1.0 if rule.pattern.of else 0.7
    once = {name: np.where(mask, kernels[name], 0) for name, mask in rule.masks(layers, kernels, share).items()}
    again = rule.masks(layers, once, share)
    assert all((again[name] == (once[name] != 0)).all() for name in layers)


def test_layouts_that_do_not_fit():
    with pytest.raises(Refused, match="3 inputs do not make groups of 4"):
        CONVOLUTION.check(Pattern(2, 4), (3, 3, 3, 8))
    with pytest.raises(Refused, match="how its inputs lie is not known"):
        Layout(None).check(Pattern(columns=4), (3, 3, 3, 8))
    Layout(None).check(Pattern(), (3, 3, 3, 8))


def test_unknown_words():
    with pytest.raises(TfoptError, match="scope must be one of global, layer; received 'all'"):
        Rule("all")
    with pytest.raises(TfoptError, match="criterion must be one of lamp, magnitude; received 'taylor'"):
        Rule(criterion="taylor")
