"""A net whose channels were cut gives what it gives with the weights that read these channels at zero."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.channel_nets import IMAGE, NETS, SEQUENCE, build, conv, depthwise, head, w
from tests.origins import rows
from tfopt.channels.groups import Channels, masked
from tfopt.channels.reshapes import aligned
from tfopt.function import Function
from tfopt.rewrite import Log


def _input(shape, seed=3):
    return {"x": rows(*(4 if size is None else size for size in shape), seed=seed)}


def _some(channels, seed):
    """A mask without a random part of each group, but for one channel at least."""
    random = np.random.default_rng(seed)
    kept = channels.everything()
    for group in channels.groups:
        count = random.integers(0, len(group.classes))
        kept[random.permutation(group.classes)[:count]] = False
    return channels.spare(kept, np.ones(len(kept)))


def _compare(loaded, inputs, kept, channels, bound=2e-5):
    with Function(loaded) as function:
        wanted = function("serving_default", inputs, masked(channels, loaded, kept))["y"]
    cut = loaded.copy()
    again = Channels(cut)
    again.cut(cut, kept)
    cut.graph.sweep()
    cut.check()
    with Function(cut) as function:
        received = function("serving_default", inputs)["y"]
    np.testing.assert_allclose(received, wanted, atol=bound * max(1, np.abs(wanted).max()))
    return cut


@pytest.mark.parametrize("name", NETS)
def test_cut_is_masked(name, tmp_path):
    net = NETS[name]
    loaded = build(tmp_path / "m", net.shape, net.compute)
    log = Log()
    channels = Channels(loaded, log)
    assert sorted((len(group.classes), group.width) for group in channels.groups) == net.groups
    assert net.refused in " ".join(log.refused.values())
    whole, parameters = channels.everything(), sum(_sizes(loaded))
    assert channels.parameters(whole) == parameters
    for seed in range(3):
        kept = _some(channels, seed)
        cut = _compare(loaded, _input(net.shape), kept, channels)
        assert sum(_sizes(cut)) == channels.parameters(kept)
        left = Channels(cut)
        assert left.macs(left.everything()) == pytest.approx(channels.macs(kept))


def _sizes(loaded):
    graph = loaded.graph
    values = [graph.constant(name) for name, node in graph.nodes.items() if node.op in ("Const", "Placeholder")]
    return [value.size for value in values if value is not None and value.dtype == np.float32 and value.ndim]


def _random_net(seed):
    """A net of blocks chosen at random: residual, dense, excited, split, grouped, depthwise."""
    random = np.random.default_rng(seed)

    def block(x, index):
        out, size = int(random.integers(4, 14)), int(random.choice([1, 3]))
        h = tf.nn.relu(conv(x, size, out, seed=index))
        match random.integers(7):
            case 0:
                return h + conv(tf.nn.relu6(conv(h, 1, 9, seed=index + 1)), 3, out, seed=index + 2)
            case 1:
                return tf.concat([h, x, tf.nn.avg_pool2d(h, 3, 1, "SAME")], -1)
            case 2:
                gate = conv(tf.reduce_mean(h, [1, 2], keepdims=True), 1, out, seed=index + 1)
                return h * tf.sigmoid(gate)
            case 3:
                a, b = tf.split(conv(h, 1, 12, seed=index + 1), 2, -1)
                return a * tf.nn.relu(b) + a
            case 4:
                return conv(conv(h, 1, 16, seed=index + 1), 3, 16, seed=index + 2, groups=int(random.choice([2, 4, 8])))
            case 5:
                return tf.nn.relu(depthwise(h, int(random.integers(1, 3)), seed=index))
            case _:
                return tf.pad(h, [[0, 0], [0, 0], [0, 0], [1, 2]]) + conv(x, 1, out + 3, seed=index + 1)

    def compute(x):
        for index in range(5):
            x = block(x, 10 * index)
        return head(x) if random.random() < 0.5 else tf.reshape(x, [-1, 64 * x.shape[-1]]) @ w(64 * x.shape[-1], 3)

    return compute


@pytest.mark.parametrize("seed", range(12))
def test_cut_is_masked_in_random_nets(seed, tmp_path):
    loaded = build(tmp_path / "m", IMAGE, _random_net(seed))
    channels = Channels(loaded)
    assert channels.groups
    for again in range(2):
        _compare(loaded, _input(IMAGE), _some(channels, again), channels)


def test_layer_norm_and_heads_shrink_with_the_stream(tmp_path):
    def compute(x):
        h = tf.matmul(x, w(16, 20)) + w(6, 20, seed=8)
        mean = tf.reduce_mean(h, -1, keepdims=True)
        variance = tf.reduce_mean(tf.math.squared_difference(h, mean), -1, keepdims=True)
        n = (h - mean) * tf.math.rsqrt(variance + 1e-5) * (w(20, seed=5) + 1) + w(20, seed=6)
        h += tf.matmul(tf.nn.gelu(tf.matmul(n, w(20, 32, seed=2))), w(32, 20, seed=3))
        return tf.matmul(h, w(20, 4, seed=4))

    loaded = build(tmp_path / "m", SEQUENCE, compute)
    channels = Channels(loaded)
    assert [len(group.classes) for group in channels.groups] == [20, 32]
    kept = channels.everything()
    kept[channels.groups[0].classes[::2]] = False
    channels.cut(loaded, kept)
    with Function(loaded) as function:
        assert np.isfinite(function("serving_default", _input(SEQUENCE))["y"]).all()


def test_channels_that_nothing_makes_or_reads_go_without_a_trace(tmp_path):
    kernel, reader = rows(3, 3, 6, 12, seed=1), rows(12, 3, seed=2)
    kernel[..., [2, 5, 7]] = 0
    reader[[2, 5, 7]] = 0
    loaded = build(
        tmp_path / "m", IMAGE, lambda x: tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME")), [1, 2]) @ reader
    )
    with Function(loaded) as function:
        wanted = function("serving_default", _input(IMAGE))["y"]
    channels = Channels(loaded)
    (group,) = channels.groups
    kept = channels.everything()
    kept[group.classes[[2, 5, 7]]] = False
    assert channels.cut(loaded, kept) == 2
    with Function(loaded) as function:
        received = function("serving_default", _input(IMAGE))["y"]
    np.testing.assert_allclose(received, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        ((1, 7, 7, 64), (1, 3136), [([1, 2, 3], [1]), ([0], [0])]),
        ((None, 6, 20), (None, 6, 4, 5), [([2], [2, 3]), ([1], [1]), ([0], [0])]),
        ((1, 49, 64), (49, 64), [([2], [1]), ([1], [0]), ([0], [])]),
        ((2, 3, 4), (6, 4), [([2], [1]), ([0, 1], [0])]),
        ((6, 4), (4, 6), [([0, 1], [0, 1])]),
        ((None, 4), (None,), [([0, 1], [0])]),
        ((1, 5), (5, 1), [([], [1]), ([1], [0]), ([0], [])]),
        ((4, 3), (2, 6), [([0, 1], [0, 1])]),
    ],
)
def test_axes_of_a_reshape_line_up(before, after, runs):
    assert aligned(before, after) == runs
