from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.channel_nets import IMAGE, ROW, SEQUENCE, build, conv, head, heads_by_reshape, inverted, plain, w
from tests.origins import rows
from tfopt.channels.blocks import find
from tfopt.channels.spread import Spread
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.passes import Data, prune_layers
from tfopt.rewrite import Log

EFFECTS = (1.0, 0.01, 0.3, 0.03)


def _stack(x):
    h = tf.nn.relu(conv(x, 3, 8))
    for index, effect in enumerate(EFFECTS):
        h = tf.nn.relu(h + effect * conv(tf.nn.relu(conv(h, 3, 8, seed=index)), 3, 8, seed=index + 20))
    return head(h)


def _rows(shape=IMAGE):
    return Dataset({"x": rows(32, *shape[1:], seed=5)}, None, "rows")


def _prune(loaded, shape=IMAGE, **options):
    log = Log()
    pruned = loaded.copy()
    prune_layers.run(pruned, log, Data("serving_default", loaded, rows=_rows(shape)), **{"epochs": 0, **options})
    pruned.check()
    return pruned, log


@pytest.mark.parametrize("importance", ["outputs", "similarity"])
def test_blocks_of_least_effect_go(importance, tmp_path):
    loaded = build(tmp_path / "m", IMAGE, _stack)
    blocks = find(Spread(loaded))
    assert len(blocks) == 4
    pruned, log = _prune(loaded, target="blocks", share=0.5, importance=importance)
    assert log.applied == {"residual block": 2}
    left = [block.name for block in find(Spread(pruned))]
    assert left == [blocks[0].name, blocks[2].name]
    x = _rows().inputs
    with Function(loaded) as before, Function(pruned) as after:
        wanted, received = before("serving_default", x)["y"], after("serving_default", x)["y"]
    np.testing.assert_allclose(received, wanted, atol=0.05 * np.abs(wanted).max())


def test_flops_are_a_target(tmp_path):
    loaded = build(tmp_path / "m", IMAGE, _stack)
    _, log = _prune(loaded, share=0.4)
    assert log.applied == {"residual block": 2}
    before, after = (int(part.replace(",", "")) for part in log.notes[-1].split() if part[0].isdigit())
    assert 0.5 * before < after <= 0.6 * before
    _, log = _prune(loaded, share=1.0)
    assert log.applied == {"residual block": 4}
    assert "no block is left" in log.warnings[0]


def test_attention_and_inverted_residuals_are_blocks(tmp_path):
    for index, (shape, compute) in enumerate(((SEQUENCE, heads_by_reshape), (IMAGE, inverted))):
        loaded = build(tmp_path / str(index), shape, compute)
        assert len(find(Spread(loaded))) == 1
        _, log = _prune(loaded, shape, target="blocks")
        assert log.applied == {"residual block": 1}


def test_training_follows(tmp_path):
    loaded = build(tmp_path / "m", IMAGE, _stack)
    _, log = _prune(loaded, target="blocks", share=0.25, epochs=1, min_steps=0)
    assert "before training" in log.notes[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "layers"}, "target: choose from flops, blocks; received 'layers'"),
        ({"importance": "taylor"}, "importance: choose from outputs, similarity"),
        ({"share": 0.0}, "share must be above 0 and at most 1"),
    ],
)
def test_options_are_checked(options, message, tmp_path):
    with pytest.raises(TfoptError, match=message):
        _prune(build(tmp_path / "m", IMAGE, _stack), **options)


@pytest.mark.parametrize(
    ("shape", "compute"),
    [(IMAGE, plain), (ROW, lambda x: x @ w(24, 8) + x @ w(24, 8, seed=2)), (ROW, lambda x: x + tf.tanh(x))],
)
def test_no_block_is_an_error(shape, compute, tmp_path):
    with pytest.raises(TfoptError, match="no residual block"):
        _prune(build(tmp_path / "m", shape, compute), shape)


def test_rows_are_needed(tmp_path):
    loaded = build(tmp_path / "m", IMAGE, _stack)
    with pytest.raises(TfoptError, match="prune_layers learns from data"):
        prune_layers.run(loaded, Log(), Data("serving_default", loaded))
