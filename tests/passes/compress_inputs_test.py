from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import serve_v1
from tests.origins import rows, save_tf1, v1
from tfopt import model, passes, runtime
from tfopt.cost import graph_cost
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.function import Function
from tfopt.passes import Data, compress_inputs
from tfopt.rewrite import Log

FRAMES, WIDTH, NODES = 12, 10, 24


def _build(path, compute, shape=(None, FRAMES, WIDTH)):
    """A TF 1 model of `x`; returns it loaded."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, shape, "x")
        y = tf.identity(compute(x), "y")
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"x": x}, {"y": y})})
    return _cleaned(model.load(path))


def _cleaned(loaded):
    for name in ("prune_graph", "merge_duplicates", "fold_constants", "fold_shapes", "fold_affine"):
        passes.get(name).run(loaded, Log())
    return loaded


def _dense(w, x):
    flat = tf.reshape(x, [-1, len(w)])
    h = tf.nn.relu(flat @ v1.get_variable("w", initializer=w) + rows(w.shape[1], seed=9))
    return h @ v1.get_variable("head", initializer=rows(w.shape[1], 60, seed=8))


def _compress(loaded, x=None, **options):
    log = Log()
    given = None if x is None else Dataset({"x": x}, None, "x")
    compress_inputs.run(loaded, log, Data("serving_default", loaded.copy(), rows=given), **{"epochs": 0, **options})
    loaded.check()
    return log


def _products(loaded):
    """Multiplications a row."""
    return graph_cost(loaded.graph.to_graph_def(), weights=loaded.weights).flops // 2


def _answers(loaded, x):
    with Function(loaded) as function:
        return function("serving_default", {"x": x})["y"]


def _of_rank(rank, topology):
    """Weights (FRAMES WIDTH, NODES) that the topology holds exactly."""
    if topology == "node":
        w = np.einsum("ktn,kfn->tfn", rows(rank, FRAMES, NODES, seed=1), rows(rank, WIDTH, NODES, seed=2))
    else:
        w = np.einsum("tkn,fk->tfn", rows(FRAMES, rank, NODES, seed=1), rows(WIDTH, rank, seed=2))
    return (w.reshape(FRAMES * WIDTH, NODES) / np.sqrt(rank * FRAMES * WIDTH)).astype(np.float32)


SIZES = {"node": lambda k: 4 * k * (FRAMES + WIDTH) * NODES, "shared": lambda k: 4 * k * (FRAMES * NODES + WIDTH)}


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("topology", SIZES)
def test_weights_of_that_rank_stay_equal_in_fewer_bytes(topology, rank, data, tmp_path):
    w = _of_rank(rank, topology)
    loaded = _build(tmp_path / "m", lambda x: _dense(w, x))
    x = rows(40, FRAMES, WIDTH, seed=3) + 0.5
    before, work, held = _answers(loaded, x), _products(loaded), loaded.weight_bytes
    log = _compress(loaded, x if data else None, rank=rank, topology=topology)
    assert log.applied == {"first dense layer": 1}
    np.testing.assert_allclose(_answers(loaded, x), before, atol=1e-4)
    size = SIZES[topology](rank)
    assert size <= held - (w.nbytes - size) + 400 and loaded.weight_bytes <= held - (w.nbytes - size) + 400
    assert f"{w.nbytes:,} bytes became {size:,}" in log.notes[0] and "0.0% of the mean square" in log.notes[0]
    new = {"node": rank * FRAMES * NODES * (WIDTH + 1), "shared": rank * FRAMES * (WIDTH + NODES)}[topology]
    assert _products(loaded) == work - w.size + new and bool(log.warnings) == (new > w.size)
    assert f"{w.size:,} multiplications a row {new:,}" in log.notes[0]
    saved_model.save(loaded, tmp_path / "c")
    np.testing.assert_allclose(serve_v1(tmp_path / "c", {"x": x})["y"], before, atol=1e-4)


def test_what_is_lost_is_least_for_the_rows_given(tmp_path):
    w = rows(FRAMES * WIDTH, NODES, seed=1)
    x = rows(500, FRAMES, WIDTH, seed=2) * np.geomspace(1, 0.01, WIDTH, dtype=np.float32)
    missed = {}
    for given in (True, False):
        loaded = _build(
            tmp_path / f"m{given}", lambda x: tf.reshape(x, [-1, len(w)]) @ v1.get_variable("w", initializer=w)
        )
        log = _compress(loaded, x if given else None, rank=2)
        missed[given] = np.square(_answers(loaded, x) - x.reshape(500, -1) @ w).sum()
    share = missed[True] / np.square(x.reshape(500, -1) @ w).sum()
    assert missed[True] < 0.7 * missed[False] and "of the mean square" in log.notes[0]
    assert share < 0.4


def _folded(shape):
    return lambda x: (
        tf.reshape(x, [-1, int(np.prod(shape))]) @ v1.get_variable("w", initializer=rows(np.prod(shape), 40))
    )


@pytest.mark.parametrize(
    "shape, wanted, expected",
    [
        ((12, 10), "", "12 x 10"),
        ((12, 5, 2), "", "12 x 10"),
        ((12, 10, 1), "", "12 x 10"),
        ((120,), "", "10 x 12"),
        ((120,), "4x30", "4 x 30"),
        ((12, 10), "30x4", "30 x 4"),
    ],
)
def test_how_inputs_fold(shape, wanted, expected, tmp_path):
    loaded = _build(tmp_path / "m", _folded(shape), (None, *shape))
    log = _compress(loaded, rank=1, shape=wanted)
    assert f"over {expected} inputs" in log.notes[0]
    assert _answers(loaded, rows(3, *shape)).shape == (3, 40)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_inputs_of_one_value_become_a_bias(value, tmp_path):
    w = rows(FRAMES * WIDTH, NODES, seed=1)
    x = rows(50, FRAMES, WIDTH, seed=2)
    x[:, 3:, ::2] = value
    loaded = _build(tmp_path / "m", lambda x: _dense(w, x))
    before, held = _answers(loaded, x), loaded.weight_bytes
    log = _compress(loaded, x, rank=0, dead_inputs=True)
    assert log.applied == {"input of one value": 45}
    np.testing.assert_allclose(_answers(loaded, x), before, atol=1e-4)
    assert held - loaded.weight_bytes > 45 * 4 * NODES - 75 * 4 - 400
    x[:, 0, 0] = x[0, 0, 0]  # the first and the last: a slice
    x[:, 3:, ::2] = rows(50, 9, 5)
    x[:, 10:] = value
    loaded = _build(tmp_path / "n", lambda x: _dense(w, x))
    before = _answers(loaded, x)
    assert _compress(loaded, x, rank=0, dead_inputs=True).applied == {"input of one value": 21}
    assert {"Slice"} <= {n.op for n in loaded.graph.nodes.values()}
    np.testing.assert_allclose(_answers(loaded, x), before, atol=1e-4)


@pytest.mark.parametrize("topology", SIZES)
def test_a_border_of_one_value_leaves_the_topology(topology, tmp_path):
    w = _of_rank(2, topology)
    x = rows(50, FRAMES, WIDTH, seed=2)
    x[:, :2], x[:, :, 8:] = 1.5, -1
    loaded = _build(tmp_path / "m", lambda x: _dense(w, x))
    before = _answers(loaded, x)
    log = _compress(loaded, x, rank=2, topology=topology, dead_inputs=True)
    assert log.applied == {"first dense layer": 1, "input of one value": FRAMES * WIDTH - 80}
    assert "only 10 x 8 of 12 x 10 inputs vary" in log.notes[0]
    np.testing.assert_allclose(_answers(loaded, x), before, atol=1e-4)


def _transposed(x):
    return tf.matmul(
        tf.reshape(x, [-1, 120]), v1.get_variable("w", initializer=_of_rank(1, "node").T), transpose_b=True
    )


def test_weights_may_be_transposed(tmp_path):
    loaded = _build(tmp_path / "m", _transposed)
    x = rows(5, FRAMES, WIDTH)
    before = _answers(loaded, x)
    _compress(loaded, rank=1)
    np.testing.assert_allclose(_answers(loaded, x), before, atol=1e-4)


def _twice(x):
    w = v1.get_variable("w", initializer=rows(120, NODES, seed=1))
    return tf.reshape(x, [-1, 120]) @ w + tf.reshape(2 * x, [-1, 120]) @ w[:, ::1] + tf.reduce_sum(w * x[0, 0, 0])


REFUSED = {
    "its weights are used elsewhere too": (_twice, {}),
    "its 113 inputs fold into no matrix": (_folded((113,)), {}),
    "shape=3x3 does not fold its 120 inputs": (_folded((120,)), {"shape": "3x3"}),
    "rank 6 of 10 x 12 takes": (_folded((120,)), {"rank": 6}),
    "no MatMul of 1,024 weights": (lambda x: tf.gather(rows(300, 8), tf.cast(x[:, 0], tf.int32)) @ rows(8, 256), {}),
    "expected two sizes": (_folded((120,)), {"shape": "28"}),
    "topology='tree'": (_folded((120,)), {"topology": "tree"}),
    "rank=0: must be at least 1": (_folded((120,)), {"rank": 0}),
    "give --representative_data": (_folded((120,)), {"dead_inputs": True}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_compressed_is_named(reason, tmp_path):
    compute, options = REFUSED[reason]
    shape = (None, 113) if "113" in reason else (None, FRAMES, WIDTH) if compute is _twice else (None, 120)
    loaded = _build(tmp_path / "m", compute, shape)
    with pytest.raises(TfoptError, match=f"compress_inputs.*{reason}"):
        _compress(loaded, **{"rank": 1, **options})


def test_without_rows_nothing_is_trained(tmp_path):
    loaded = _build(tmp_path / "m", lambda x: _dense(rows(120, NODES, seed=1), x))
    log = _compress(loaded, rank=1, topology="shared", epochs=3)
    assert any("not recovered" in warning for warning in log.warnings)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A dense net for 8x8 digits, trained for a moment: (its directory, training images, test images and labels)."""
    import keras
    from sklearn.datasets import load_digits

    keras.utils.set_random_seed(3)
    found = load_digits()
    images, labels = (found.images / 16).astype(np.float32), found.target
    layers = keras.layers
    stack = [layers.Input((8, 8), name="x"), layers.Flatten(), layers.Dense(96, activation="relu"), layers.Dense(10)]
    net = keras.Sequential(stack)
    net.compile(keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    net.fit(images[:1400], labels[:1400], epochs=12, batch_size=64, verbose=0)
    path = tmp_path_factory.mktemp("digits") / "model"
    net.export(path, verbose=False)
    return path, images[:1400], images[1400:], labels[1400:]


@pytest.mark.parametrize("topology, rank", [("node", 1), ("shared", 2)])
def test_training_brings_accuracy_back_and_the_files_run(topology, rank, digits, tmp_path):
    path, given, images, labels = digits
    original = model.load(path)
    prepared = _cleaned(original.copy())
    data = Data("serving_default", original, rows=Dataset({"x": given}, None, "digits"))
    found = []
    for loaded, epochs in ((original.copy(), None), (prepared.copy(), 0), (prepared.copy(), 15)):
        log = Log()
        if epochs is not None:
            compress_inputs.run(loaded, log, data, rank=rank, topology=topology, epochs=epochs, min_steps=0)
        with Function(loaded) as function:
            (scores,) = function("serving_default", {"x": images}).values()
        found.append(float(np.mean(scores.argmax(axis=1) == labels)))
    print(f"{topology}, rank {rank}: {found[0]:.3f}, without training {found[1]:.3f}, trained {found[2]:.3f}")
    assert found[0] > 0.87 and found[2] > found[0] - 0.05 and found[2] > found[1] + 0.04
    assert any("before training" in note for note in log.notes)
    saved_model.save(loaded, tmp_path / "c")
    (served,) = serve_v1(tmp_path / "c", {"x": images}).values()
    np.testing.assert_allclose(served, scores, atol=1e-4)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "c"), signature_keys=["serving_default"])
    (tmp_path / "c.tflite").write_bytes(converter.convert())
    with runtime.open(tmp_path / "c.tflite") as program:
        (device,) = program.run("serving_default", {"x": images}).values()
    np.testing.assert_allclose(device, scores, atol=1e-3)


def test_it_is_a_pass_that_learns():
    chosen = passes.get("compress_inputs")
    assert chosen.learns and not chosen.lossless and not chosen.keeps
