"""What becomes zero, what stays dense and why, that training makes up for it, and that zeros reach every file."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from pipelines.train_digits import split
from tests.conftest import REPO
from tests.origins import rows, save_module, spec
from tests.passes.quantize_test import device_file
from tests.quantized_nets import answers, build, lossless, w
from tfopt import recipe
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export import saved_model, tflite
from tfopt.model import load
from tfopt.passes import Data, get, prune_magnitude
from tfopt.pruning.sparsity import zeros
from tfopt.rewrite import Log
from tfopt.weight_statistics import arrays_of

IMAGE, ROW = (None, 8, 8, 6), (None, 24)
FAST = {"epochs": 3, "min_steps": 0, "learning_rate": 2e-3}


def prune(net, data=None, **options):
    made, log = net.copy(), Log()
    prune_magnitude.run(made, log, data or Data("serving_default", net.copy()), **options)
    made.check()
    return made, log


def kernels(net) -> dict[int, np.ndarray]:
    """The constants of two axes or more, by their size."""
    found = [net.graph.constant(name) for name in net.graph.nodes]
    return {value.size: value for value in found if value is not None and value.ndim > 1 and value.dtype == np.float32}


@pytest.fixture(scope="module")
def digits():
    """The trained convnet, its data to learn from, and (images, labels) held out."""
    net = lossless(REPO / "saved_models" / "digits")
    train, _, held, labels = split(0)
    return net, Data("serving_default", net.copy(), Dataset({"image": train}, None, "digits")), (held, labels)


def accuracy(net, held):
    return float(np.mean(answers(net, Dataset({"image": held[0]}, None, "")).argmax(1) == held[1]))


def convnet(x):
    h = tf.nn.relu(tf.nn.conv2d(x, w(3, 3, 6, 8), 1, "SAME"))
    h = tf.nn.relu(tf.nn.depthwise_conv2d(h, w(5, 5, 8, 1), [1] * 4, "SAME"))
    h = tf.nn.relu(tf.nn.conv2d(h, w(3, 3, 8, 20), 1, "SAME") + w(20))
    return tf.reshape(h, [-1, 8 * 8 * 20]) @ w(8 * 8 * 20, 10)


def test_layers_have_their_own_case(tmp_path):
    net = build(tmp_path / "m", IMAGE, convnet)
    made, log = prune(net, sparsity=0.8, scope="layer", last=0.6)
    shares = {size: zeros([kernel]) for size, kernel in kernels(made).items()}
    assert shares[3 * 3 * 6 * 8] == pytest.approx(0.5, abs=0.01)  # a first convolution
    assert shares[5 * 5 * 8] == 0  # depthwise
    assert shares[3 * 3 * 8 * 20] == pytest.approx(0.8, abs=0.001)
    assert shares[8 * 8 * 20 * 10] == pytest.approx(0.6, abs=0.001)
    assert log.applied == {"kernel pruned": 3}
    assert [reason[:20] for reason in log.refused.values()] == ["a depthwise kernel: "]
    assert [text[:40] for text in log.warnings] == [
        "prune_magnitude: not recovered, there is",
        "prune_magnitude: 61.7% of zeros, not the",
    ]
    for value in kernels(made).values():  # the largest are left, as they were
        before = kernels(net)[value.size]
        np.testing.assert_array_equal(value[value != 0], before[value != 0])
        if (value == 0).any():
            assert np.abs(before[value == 0]).max() <= np.abs(value[value != 0]).min()
    made, log = prune(net, sparsity=0.3, depthwise=0.3, first=1.0)
    assert zeros(kernels(made).values()) == pytest.approx(0.3, abs=0.001) and not log.refused


def test_a_first_dense_layer_is_one_as_others(tmp_path):
    net = build(tmp_path / "m", ROW, lambda x: tf.nn.relu(x @ w(24, 48)) @ w(48, 10))
    made, _ = prune(net, sparsity=0.8, scope="layer")
    assert [zeros([kernel]) for kernel in kernels(made).values()] == pytest.approx([0.8, 0.8], abs=0.002)


def test_two_of_four_in_the_layout_of_device_kernels(tmp_path):
    net = build(tmp_path / "m", IMAGE, convnet)
    made, log = prune(net, pattern="2:4")
    found = kernels(made)
    for kernel in (found[3 * 3 * 8 * 20], found[8 * 8 * 20 * 10]):
        groups = np.moveaxis(kernel, -2, -1).reshape(-1, 4)
        assert (np.count_nonzero(groups, axis=1) == 2).all()
    refused = {reason for (_, _), reason in log.refused.items()}
    assert "6 inputs do not make groups of 4" in refused and len(refused) == 2
    assert zeros([found[3 * 3 * 6 * 8]]) == 0
    saved_model.save(made, tmp_path / "device", max_constant_bytes=1 << 31)
    (result,) = tflite.convert(tmp_path / "device", ["float32"], tmp_path)
    shapes = [(20, 3, 3, 8), (10, 8 * 8 * 20)]
    groups = [array.reshape(-1, 4) for array in arrays_of(result.path) if array.shape in shapes]
    assert len(groups) == 2 and all((np.count_nonzero(group, axis=1) == 2).all() for group in groups)


class Shared(tf.Module):
    """A kernel that two products read, a table, and a loop with a kernel of its own."""

    def __init__(self):
        super().__init__()
        self.shared = tf.Variable(rows(24, 24, seed=1) / 5)
        self.table = tf.Variable(rows(200, 24, seed=2))
        self.loop = tf.Variable(rows(24, 24, seed=3) / 5)
        self.other = tf.Variable(rows(24, 60, seed=4) / 5)

    @tf.function(input_signature=[spec(None, 24), tf.TensorSpec((None,), tf.int32, name="word")])
    def serving_default(self, x, word):
        h = tf.nn.relu(x @ self.shared) @ self.shared + tf.gather(self.table, word)
        for _ in tf.range(3):
            h = tf.tanh(h @ self.loop)
        return {"y": h @ self.other}


def test_shared_kernels_loops_and_tables(tmp_path):
    save_module(tmp_path / "m", Shared(), "serving_default")
    net = lossless(tmp_path / "m")
    made, log = prune(net, sparsity=0.6, scope="layer")
    assert log.applied == {"kernel pruned": 3} and len(log.refused) == 1
    assert sorted(round(zeros([a]), 2) for a in kernels_of(made, (24, 24))) == [0.6, 0.6]
    made, log = prune(net, sparsity=0.6, scope="layer", embeddings=True)
    assert log.applied == {"kernel pruned": 4} and not log.refused
    random = np.random.default_rng(0)
    data = Dataset({"x": rows(64, 24), "word": random.integers(0, 200, 64).astype(np.int32)}, None, "")
    made, log = prune(net, Data("serving_default", net.copy(), data), sparsity=0.6, **FAST)
    assert any("before training" in note for note in log.notes)
    assert zeros(kernels_of(made, (24, 24)) + kernels_of(made, (24, 60))) == pytest.approx(0.6, abs=0.001)


def kernels_of(net, shape) -> list[np.ndarray]:
    found = [net.graph.constant(name) for name in net.graph.nodes]
    return [value for value in found if value is not None and value.shape == shape]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "sparsity must be more than 0 and less than 1, received 1.0"),
        ({"depthwise": 1.5}, r"depthwise must be in \[0, 1\], received 1.5"),
        ({"pattern": "4:2"}, "prune_magnitude: pattern must be N:M"),
        ({"schedule": "linear"}, "prune_magnitude: schedule must be one of"),
        ({"criterion": "size"}, "prune_magnitude: criterion must be one of lamp, magnitude"),
        ({"skip": "Conv3D"}, "skip='Conv3D' matches no kernel"),
        ({"skip": "("}, r"skip='\(' is no regular expression"),
        ({"skip": ".*"}, "no kernel of the model can be pruned: left dense as skip wants it"),
    ],
)
def test_what_cannot_be_asked_for(options, message, tmp_path):
    net = build(tmp_path / "m", ROW, lambda x: tf.nn.relu(x @ w(24, 48)) @ w(48, 10))
    with pytest.raises(TfoptError, match=message):
        prune(net, **options)


def test_skip_leaves_layers_dense_and_says_what_that_costs(tmp_path):
    net = build(tmp_path / "m", IMAGE, convnet)
    made, log = prune(net, sparsity=0.8, skip="(Batch)?MatMul")
    assert zeros([kernels(made)[8 * 8 * 20 * 10]]) == 0
    assert any("layers with 13,000 weights were left dense" in text for text in log.warnings)


@pytest.mark.parametrize("options", [{}, {"schedule": "constant"}, {"pattern": "2:4"}, {"pattern": "1x4"}])
def test_training_makes_up_for_what_is_gone(digits, options):
    net, data, held = digits
    options = {"sparsity": 0.9, **options}
    at_once, _ = prune(net, **({"sparsity": 0.9} if "schedule" in options else options))
    made, log = prune(net, data, **options, epochs=8, min_steps=0)
    share = 0.5 if options.get("pattern") == "2:4" else 0.9
    every = [kernel for kernel in kernels(made).values() if kernel.shape[:2] != (3, 3) or kernel.shape[-1] > 1]
    assert zeros(every) == pytest.approx(share, abs=0.01)
    assert not any(np.signbit(kernel[kernel == 0]).any() for kernel in every)
    before, without, after = (accuracy(model, held) for model in (net, at_once, made))
    print(f"digits {options}: {before:.4f}, at once {without:.4f}, trained {after:.4f}")
    assert after >= max(before - 0.012, without - 0.005)
    assert any("once it is zipped" in note for note in log.notes)


@pytest.mark.parametrize("sparsity", [0.95, 0.97])
def test_rows_restore_means_and_spreads_where_nothing_is_trained(digits, sparsity):
    net, data, held = digits
    plain, _ = prune(net, sparsity=sparsity)
    restored, log = prune(net, data, sparsity=sparsity, epochs=0)
    assert log.applied["layer with its mean and spread restored"] == 5 and not log.warnings
    found = [accuracy(model, held) for model in (plain, restored)]
    print(f"digits, {sparsity:.0%} zeros: {found[0]:.4f}, restored {found[1]:.4f}")
    assert found[1] > found[0]
    for size, kernel in kernels(plain).items():
        np.testing.assert_array_equal(kernel == 0, kernels(restored)[size] == 0)


def test_killed_and_started_again_ends_alike(digits, tmp_path, monkeypatch):
    from tfopt import training_loop

    net, data, _ = digits
    few = dataclasses.replace(data, rows=data.rows.take(slice(0, 256)))
    options = {"sparsity": 0.8, "epochs": 4, "min_steps": 0, "frequency": 3, "checkpoint_steps": 2}
    straight, _ = prune(net, few, **options)
    kept = dataclasses.replace(few, checkpoint=tmp_path / "checkpoint")
    advance = training_loop._Loop.advance

    def killed(loop):
        if loop.step == 5:
            raise KeyboardInterrupt
        advance(loop)

    monkeypatch.setattr(training_loop._Loop, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(net, kept, **options)
    monkeypatch.setattr(training_loop._Loop, "advance", advance)
    again, _ = prune(net, kept, **options)
    for size, kernel in kernels(straight).items():
        np.testing.assert_array_equal(kernel, kernels(again)[size])


@pytest.mark.parametrize("later", ["quantize", "train_quantized", "distill", "equalize", "prune_magnitude"])
def test_later_passes_keep_the_zeros(digits, later, tmp_path):
    net, data, _ = digits
    few = dataclasses.replace(data, rows=data.rows.take(slice(0, 256)))
    made, _ = prune(net, few, sparsity=0.8, **FAST)
    gone = {size: kernel == 0 for size, kernel in kernels(made).items() if (kernel == 0).any()}
    log = Log()
    options = {"train_quantized": {"epochs": 1}, "distill": FAST, "prune_magnitude": {"sparsity": 0.9, **FAST}}
    get(later).run(made, log, few, **options.get(later, {}))
    for size, mask in gone.items():
        assert not kernels(made)[size][mask].any()
    if later in ("quantize", "train_quantized"):
        result = device_file(made, tmp_path, "int8", trained=later == "train_quantized")
        found = {array.size: np.count_nonzero(array == 0) for array in arrays_of(result.path) if array.size in gone}
        assert found.keys() == gone.keys() and all(found[size] >= mask.sum() for size, mask in gone.items())


def test_every_kind_of_file_has_the_zeros(digits, tmp_path):
    net, data, _ = digits
    made, _ = prune(net, sparsity=0.8)
    gone = {size: np.count_nonzero(kernel == 0) for size, kernel in kernels(made).items() if (kernel == 0).any()}
    saved_model.save(made, tmp_path / "device", max_constant_bytes=1 << 31)
    names = ["float32", "float16", "dynamic_int8", "weight_int8"]
    given = {"serving_default": data.rows.take(slice(0, 64))}
    for result in tflite.convert(tmp_path / "device", names, tmp_path, representative=given):
        assert result.path, result.error
        found = {array.size: np.count_nonzero(array == 0) for array in arrays_of(result.path) if array.size in gone}
        assert found.keys() == gone.keys() and all(found[size] >= gone[size] for size in gone), result.path
    served = load(tmp_path / "device")
    assert all(np.count_nonzero(kernels(served)[size] == 0) == count for size, count in gone.items())


def test_one_seed_gives_one_result(digits):
    net, data, _ = digits
    few = dataclasses.replace(data, rows=data.rows.take(slice(0, 256)))
    one, two = (kernels(prune(net, few, **FAST)[0]) for _ in range(2))
    for size in one:
        np.testing.assert_array_equal(one[size], two[size])


def test_it_is_a_pass_that_learns_and_keeps():
    chosen = get("prune_magnitude")
    assert chosen.learns and not chosen.lossless and chosen.makes == ("sparsity",)
    lossless_steps = [name for name, _ in recipe.read("lossless").steps]
    parsed = recipe.parse([*lossless_steps, "prune_magnitude", "train_quantized"], "pqat")
    assert parsed.steps[-2:] == (("prune_magnitude", {}), ("train_quantized", {}))
