from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from tests.channel_nets import IMAGE, ROW, build, conv, head, inverted, residual, w
from tests.origins import rows, save_module, spec
from tfopt import model, recipe
from tfopt.channels import latency
from tfopt.channels.choose import kept_counts, unit
from tfopt.channels.groups import Channels, Group
from tfopt.cost import graph_cost
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.function import Function
from tfopt.optimize import Options, optimize
from tfopt.passes import Data, get, prune_channels
from tfopt.rewrite import Log


def _wide(x):
    h = tf.nn.relu(conv(x, 3, 32))
    h += conv(tf.nn.relu(conv(h, 3, 48, seed=2)), 3, 32, seed=3)
    return head(tf.nn.relu(conv(tf.nn.relu(h), 3, 40, seed=4, stride=2)), 5)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return build(tmp_path_factory.mktemp("wide") / "m", IMAGE, _wide)


def _rows(count=64, shape=IMAGE, seed=5):
    return Dataset({"x": rows(count, *shape[1:], seed=seed)}, None, "rows")


def _prune(loaded, data=None, **options):
    log = Log()
    pruned = loaded.copy()
    prune_channels.run(pruned, log, data or Data("serving_default", loaded), **{"epochs": 0, **options})
    pruned.check()
    return pruned, log


def _flops(loaded):
    outputs = [ref.partition(":")[0] for ref in loaded.graph.outputs.values()]
    return graph_cost(loaded.graph.to_graph_def(), outputs=outputs, weights=loaded.weights).flops


def _answer(loaded, inputs, signature="serving_default"):
    with Function(loaded) as function:
        return function(signature, inputs)


@pytest.mark.parametrize("scope", ["global", "uniform", "sensitivity"])
@pytest.mark.parametrize("importance", ["taylor", "l1", "l2"])
def test_half_of_the_flops_go(scope, importance, wide):
    data = Data("serving_default", wide, rows=_rows())
    pruned, log = _prune(wide, data, scope=scope, importance=importance)
    assert 0.4 * _flops(wide) < _flops(pruned) <= 0.5 * _flops(wide)
    assert f"{_flops(wide):,} FLOPs became {_flops(pruned):,}" in log.notes
    for group in Channels(pruned).groups:
        assert len(group.classes) % 8 == 0
    received, wanted = (_answer(each, _rows(8).inputs)["y"] for each in (pruned, wide))
    assert received.shape == wanted.shape
    assert np.isfinite(received).all()


def test_parameters_are_a_target(wide):
    pruned, _ = _prune(wide, target="params", share=0.3)
    before, after = (graph_cost(each.graph.to_graph_def(), weights=each.weights).parameters for each in (wide, pruned))
    assert 0.6 * before < after <= 0.71 * before


def test_rounds_reach_the_target_together(wide):
    pruned, log = _prune(wide, steps=3, round_to=1, importance="l2")
    assert 0.45 * _flops(wide) < _flops(pruned) <= 0.5 * _flops(wide)
    assert not log.warnings


def test_no_layer_loses_more_than_its_share(wide):
    pruned, log = _prune(wide, share=0.9, max_share=0.5)
    assert sorted(len(group.classes) for group in Channels(pruned).groups) == [16, 24, 24]
    assert "no more can go with max_share=0.5" in log.warnings[0]


def test_without_rows_weights_decide_and_nothing_is_trained(wide):
    _, log = _prune(wide, epochs=2)
    assert ["not recovered" in warning for warning in log.warnings] == [True]


def test_training_recovers(wide):
    data = Data("serving_default", wide, rows=_rows(128))
    cut, _ = _prune(wide, data, share=0.8, compensation=False)
    trained, log = _prune(wide, data, share=0.8, compensation=False, epochs=9, min_steps=0, batch_size=16)
    inputs = _rows(64).inputs
    wanted = _answer(wide, inputs)["y"]
    errors = [float(np.mean((_answer(each, inputs)["y"] - wanted) ** 2)) for each in (cut, trained)]
    assert errors[1] < 0.5 * errors[0]
    assert any("before training" in note for note in log.notes)


def test_copies_of_channels_go_without_a_trace(tmp_path):
    kernel = np.repeat(rows(3, 3, 6, 8, seed=1), 2, axis=-1)
    reader = rows(16, 3, seed=2)
    loaded = build(
        tmp_path / "m", IMAGE, lambda x: tf.reduce_mean(tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME")), [1, 2]) @ reader
    )
    data = Data("serving_default", loaded, rows=_rows())
    pruned, log = _prune(loaded, data, round_to=1)
    assert log.applied["channel"] == 8
    assert log.applied["kernel compensated"] == 1
    inputs = _rows(8, seed=9).inputs
    np.testing.assert_allclose(_answer(pruned, inputs)["y"], _answer(loaded, inputs)["y"], atol=0.02)
    plain, _ = _prune(loaded, data, round_to=1, compensation=False)
    assert np.abs(_answer(plain, inputs)["y"] - _answer(loaded, inputs)["y"]).max() > 0.5


@pytest.mark.parametrize("importance", ["taylor", "l2"])
def test_what_is_not_read_goes_first(importance, tmp_path):
    kernel, reader = rows(24, 12, seed=1), rows(12, 4, seed=2)
    dead = [1, 4, 5, 9, 10, 11]
    kernel[:, dead] *= 1e-3
    reader[dead] *= 1e-3
    loaded = build(tmp_path / "m", ROW, lambda x: tf.nn.relu(x @ kernel) @ reader)
    data = Data("serving_default", loaded, rows=_rows(shape=ROW))
    pruned, _ = _prune(loaded, data, round_to=1, importance=importance, compensation=False)
    inputs = _rows(8, ROW, seed=9).inputs
    np.testing.assert_allclose(_answer(pruned, inputs)["y"], _answer(loaded, inputs)["y"], atol=1e-3)


def test_batch_norm_scales_before_the_fold(tmp_path):
    import keras

    layers = keras.layers
    image = keras.Input((8, 8, 1), name="image")
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(12, 3, name="conv")(image))
    net = keras.Model(image, layers.Dense(3)(layers.GlobalAveragePooling2D()(layers.ReLU()(x))))
    gamma = np.linspace(0.1, 1.2, 12, dtype=np.float32)
    net.get_layer("norm").gamma.assign(gamma[::-1])
    net.export(tmp_path / "m", verbose=False)
    loaded = model.load(tmp_path / "m")
    for name in ("prune_graph", "merge_duplicates"):
        get(name).run(loaded, Log())
    pruned, _ = _prune(loaded, importance="bn_scale", round_to=1, share=0.5)
    vectors = [value for value in map(pruned.graph.constant, pruned.graph.nodes) if value is not None]
    assert any(value.shape == (6,) and np.allclose(value, gamma[::-1][:6]) for value in vectors)
    folded = loaded.copy()
    for name in ("fold_constants", "fold_affine"):
        get(name).run(folded, Log())
    with pytest.raises(TfoptError, match="put prune_channels before fold_affine"):
        _prune(folded, importance="bn_scale")


def test_sparse_and_clustered_kernels_stay_so(tmp_path):
    random = np.random.default_rng(0)
    kernel = rows(3, 3, 6, 32, seed=1) * (random.random((3, 3, 6, 32)) < 0.4)
    reader = random.choice(np.float32([-0.5, 0.25, 1.0]), (3, 3, 32, 16))
    loaded = build(
        tmp_path / "m",
        IMAGE,
        lambda x: head(tf.nn.relu(tf.nn.conv2d(tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME")), reader, 1, "SAME"))),
    )
    data = Data("serving_default", loaded, rows=_rows())
    pruned, _ = _prune(loaded, data, epochs=1, min_steps=0)
    kernels = [weight for weight in pruned.weights.values() if weight.ndim == 4]
    assert len(kernels) == 2
    assert np.mean(kernels[0] == 0) > 0.5
    assert len(np.unique(kernels[1])) <= 3


def test_a_killed_run_goes_on_with_what_it_chose(wide, tmp_path):
    data = Data("serving_default", wide, rows=_rows(), checkpoint=tmp_path / "c")
    first, _ = _prune(wide, data)
    other = Data("serving_default", wide, rows=_rows(seed=77), checkpoint=tmp_path / "c")
    again, _ = _prune(wide, other)
    assert first.weights.keys() == again.weights.keys()
    for name, weight in first.weights.items():
        np.testing.assert_array_equal(weight, again.weights[name])


def test_a_killed_run_ends_with_the_same_weights(wide, tmp_path, monkeypatch):
    options = {"epochs": 2, "min_steps": 0, "steps": 2, "batch_size": 16}
    rows = _rows()
    whole, _ = _prune(wide, Data("serving_default", wide, rows=rows, checkpoint=tmp_path / "whole"), **options)
    data = Data("serving_default", wide, rows=rows, checkpoint=tmp_path / "killed")
    real, calls = prune_channels.recover, []

    def killed(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **settings)

    monkeypatch.setattr(prune_channels, "recover", killed)
    with pytest.raises(KeyboardInterrupt):
        _prune(wide, data, **options)
    again, _ = _prune(wide, data, **options)
    assert whole.weights.keys() == again.weights.keys()
    for name, weight in whole.weights.items():
        np.testing.assert_allclose(again.weights[name], weight, atol=1e-5)


def test_latency_is_measured_until_it_is_low_enough(wide, monkeypatch):
    def times(models, signature, inputs):
        assert inputs["x"].shape == (1, 8, 8, 6)
        return {name: 1.0 + _flops(each) / _flops(wide) for name, each in models.items()}

    monkeypatch.setattr(latency, "_times", times)
    pruned, log = _prune(wide, target="latency", share=0.25, round_to=1)
    assert 0.35 * _flops(wide) < _flops(pruned) <= 0.5 * _flops(wide)
    assert sum("estimated to take" in note for note in log.notes) == 4
    with pytest.raises(TfoptError, match="latency falls by less than 60%"):
        _prune(wide, target="latency", share=0.6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "bytes"}, "target: choose from flops, params, latency; received 'bytes'"),
        ({"share": 1.0}, "share must be above 0 and below 1, received 1.0"),
        ({"importance": "magic"}, "importance: choose from taylor, l1, l2, bn_scale; received 'magic'"),
        ({"scope": "local"}, "scope: choose from"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"round_to": 0}, "round_to must be at least 1"),
        ({"importance": "taylor"}, "prune_channels: importance=taylor learns from data"),
    ],
)
def test_options_are_checked(options, message, wide):
    with pytest.raises(TfoptError, match=message):
        _prune(wide, **options)


def test_nothing_to_prune_is_an_error(tmp_path):
    loaded = build(tmp_path / "m", ROW, lambda x: tf.nn.softmax(x @ w(24, 5)))
    with pytest.raises(TfoptError, match=r"no channel of the model can go: .*normalises over them"):
        _prune(loaded)


def test_steps_of_small_layers_are_small():
    def group(size, width=1):
        return Group("g", np.arange(size), (), width)

    assert [unit(group(size), 8) for size in (64, 24, 16, 8, 5, 2)] == [8, 8, 4, 2, 1, 1]
    assert unit(group(4, 16), 8) == 1
    assert kept_counts(group(24), 8, 0.9) == [24, 16, 8]
    assert kept_counts(group(20), 8, 0.5) == [20, 16, 12]


def test_two_signatures_share_what_is_left(tmp_path):
    class Two(tf.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = tf.Variable(rows(24, 64, seed=1)), tf.Variable(rows(64, 5, seed=2))
            self.c = tf.Variable(rows(64, 2, seed=3))

        @tf.function(input_signature=[spec(None, 24)])
        def score(self, x):
            return {"score": tf.nn.relu(x @ self.a) @ self.b}

        @tf.function(input_signature=[spec(None, 24)])
        def features(self, x):
            return {"pair": tf.tanh(x @ self.a) @ self.c}

    save_module(tmp_path / "m", Two(), "score", "features")
    loaded = model.load(tmp_path / "m")
    get("prune_graph").run(loaded, Log())
    pruned, _ = _prune(loaded, Data("score", loaded))
    saved_model.save(pruned, tmp_path / "s")
    served = tf.saved_model.load(str(tmp_path / "s"))
    x = tf.constant(rows(3, 24))
    assert served.signatures["score"](x=x)["score"].shape == (3, 5)
    assert served.signatures["features"](x=x)["pair"].shape == (3, 2)
    assert [len(group.classes) for group in Channels(pruned).groups] == [32]


def _recipe(folder, **options):
    steps = [*recipe.NAMED["lossless"]["passes"], {"pass": "prune_channels", "epochs": 0, **options}]
    (folder / "slim.json").write_text(json.dumps({"passes": steps}))
    return str(folder / "slim.json")


def test_keras_3_through_the_command(keras3_convnet, tmp_path):
    np.savez(tmp_path / "rows.npz", image=rows(32, 8, 8, 1))
    result = optimize(
        keras3_convnet,
        tmp_path / "out",
        Options(
            recipe=_recipe(tmp_path, share=0.4),
            tflite=("int8",),
            representative_data=str(tmp_path / "rows.npz"),
            measure_latency=False,
        ),
    )
    assert not result.failed
    flops = {artifact.name: artifact.flops for artifact in result.report.artifacts}
    assert flops["int8"] == flops["serving"] < 0.6 * flops["original"]


@pytest.mark.parametrize("compute", [residual, inverted])
def test_every_scope_on_nets_with_joined_layers(compute, tmp_path):
    loaded = build(tmp_path / "m", IMAGE, compute)
    for scope in ("global", "uniform"):
        pruned, _ = _prune(loaded, Data("serving_default", loaded, rows=_rows(32)), scope=scope, round_to=1)
        assert _flops(pruned) <= 0.5 * _flops(loaded)
