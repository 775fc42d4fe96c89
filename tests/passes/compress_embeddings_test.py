from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import serve_v1
from tests.origins import rows, save_tf1, v1
from tfopt import model, passes, recipe, runtime
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export import saved_model
from tfopt.function import Function
from tfopt.passes import Data, compress_embeddings
from tfopt.rewrite import Log

SIZE, WIDTH = 2000, 16
METHODS = ("quotient_remainder", "hashing", "mixed_dimension", "vocabulary")
IDS = np.random.default_rng(5).zipf(1.5, (300, 12)) % SIZE  # rows 1, 2, .. most often, as words of a language


def _build(path, lookup, table, dtype=tf.int32, shape=(None, 12)):
    """A TF 1 model of `ids`, which looks up a table; returns it loaded."""
    with tf.Graph().as_default(), v1.Session() as session:
        ids = v1.placeholder(dtype, shape, "ids")
        found = lookup(v1.get_variable("table", initializer=table), ids)
        y = tf.identity(found, "y")
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"ids": ids}, {"y": y})})
    return _cleaned(model.load(path))


def _cleaned(loaded):
    for name in ("prune_graph", "merge_duplicates", "fold_constants", "fold_affine"):
        passes.get(name).run(loaded, Log())
    return loaded


def _compress(loaded, ids=IDS, **options):
    log = Log()
    given = None if ids is None else Dataset({"ids": ids}, None, "ids")
    data = Data("serving_default", loaded.copy(), rows=given)
    compress_embeddings.run(loaded, log, data, **{"epochs": 0, **options})
    loaded.check()
    return log


def _answers(loaded, ids):
    with Function(loaded) as function:
        return function("serving_default", {"ids": ids})["y"]


def _of_form(method):
    """A table that the method holds exactly, in a quarter of the bytes."""
    if method == "quotient_remainder":
        return rows(5, WIDTH, seed=1)[np.arange(SIZE) // 495] * rows(495, WIDTH, seed=2)[np.arange(SIZE) % 495]
    if method == "hashing":  # rows of one value are a sum of any hashed rows
        return np.broadcast_to(rows(WIDTH, seed=3), (SIZE, WIDTH)).copy()
    if method == "mixed_dimension":
        narrow = rows(SIZE, 2, seed=4) @ rows(2, WIDTH, seed=5)
        narrow[:100] = rows(100, WIDTH, seed=6)
        return narrow
    rare = np.bincount(IDS.ravel(), minlength=SIZE) == 0
    return np.where(rare[:, None], rows(WIDTH, seed=7), rows(SIZE, WIDTH, seed=8)).astype(np.float32)


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
@pytest.mark.parametrize("method", METHODS)
def test_tables_of_its_form_stay_equal_in_fewer_bytes(method, dtype, tmp_path):
    table = _of_form(method)
    loaded = _build(tmp_path / "m", lambda w, ids: tf.nn.embedding_lookup(w, ids), table, dtype)
    log = _compress(loaded, IDS.astype(dtype.as_numpy_dtype), method=method, ratio=4.0)
    assert log.applied == {f"table of embeddings by {method}": 1}
    assert sum(w.nbytes for w in loaded.weights.values()) <= table.nbytes / 4
    every = np.resize(np.arange(SIZE), (SIZE // 10, 12)).astype(dtype.as_numpy_dtype)
    np.testing.assert_allclose(_answers(loaded, every), table[every], atol=2e-4)
    saved_model.save(loaded, tmp_path / "c")
    np.testing.assert_allclose(serve_v1(tmp_path / "c", {"ids": every})["y"], table[every], atol=2e-4)


@pytest.mark.parametrize("ratio", [2.0, 3.0, 10.0])
@pytest.mark.parametrize("method", METHODS)
def test_bytes_fall_by_the_ratio(method, ratio, tmp_path):
    table = rows(SIZE, WIDTH, seed=1)
    loaded = _build(tmp_path / "m", lambda w, ids: tf.gather(w, ids), table)
    log = _compress(loaded, method=method, ratio=ratio)
    left = sum(w.nbytes for w in loaded.weights.values())
    used = WIDTH * 4 * (np.count_nonzero(np.bincount(IDS.ravel())) + 1)
    assert left <= table.nbytes / ratio
    assert left > 0.9 * min(table.nbytes / ratio, used if method == "vocabulary" else np.inf)
    # What the form gives is what the note says: frequent rows come nearer than a random table could be folded.
    missed = np.square(_answers(loaded, IDS) - table[IDS]).sum() / np.square(table[IDS]).sum()
    assert missed < 1 - 1 / ratio and f"{table.nbytes:,} bytes became" in log.notes[0]


@pytest.mark.parametrize("sort", [True, False])
def test_frequent_rows_of_a_cut_vocabulary_are_bit_equal(sort, tmp_path):
    places = np.arange(SIZE) if sort else np.random.default_rng(2).permutation(SIZE)
    ids = places[IDS]
    table = rows(SIZE, WIDTH, seed=1)
    loaded = _build(tmp_path / "m", lambda w, i: tf.gather(w, i), table)
    log = _compress(loaded, ids, method="vocabulary", min_count=3)
    counts = np.bincount(ids.ravel(), minlength=SIZE)
    every = np.resize(np.arange(SIZE), (SIZE // 10, 12))
    got = _answers(loaded, every).reshape(-1, WIDTH)[:SIZE]
    np.testing.assert_array_equal(got[counts >= 3], table[counts >= 3])
    last = np.flatnonzero(counts >= 3).max()
    gone = np.arange(SIZE) > last if len(loaded.weights) == 1 else counts < 3
    mean = np.average(table[gone], axis=0, weights=counts[gone] + 1)
    np.testing.assert_allclose(got[gone], np.broadcast_to(mean, got[gone].shape), atol=1e-5)
    assert "one stands for the others" in log.notes[0]
    with pytest.raises(TfoptError, match="no row was read 100000 times"):
        _compress(_build(tmp_path / "n", lambda w, i: tf.gather(w, i), table), method="vocabulary", min_count=100_000)


def test_a_vocabulary_sorted_by_frequency_needs_no_numbers(tmp_path):
    ids = np.repeat(np.arange(400), 1 + 4000 // np.arange(1, 401))
    ids = np.resize(ids, (-(-len(ids) // 12), 12))
    loaded = _build(tmp_path / "m", lambda w, i: tf.gather(w, i), rows(SIZE, WIDTH, seed=1))
    _compress(loaded, ids, method="vocabulary", ratio=8.0)
    (left,) = loaded.weights.values()
    assert left.shape == (250, WIDTH) and any(node.op == "Minimum" for node in loaded.graph.nodes.values())


def test_auto_takes_what_loses_least_or_refuses(tmp_path):
    loaded = _build(tmp_path / "m", lambda w, ids: tf.gather(w, ids), _of_form("mixed_dimension"))
    log = _compress(loaded)
    assert log.applied == {"table of embeddings by mixed_dimension": 1} and "quotient_remainder" in log.notes[0]
    loaded = _build(tmp_path / "n", lambda w, ids: tf.gather(w, ids), rows(SIZE, WIDTH, seed=1))
    with pytest.raises(TfoptError, match=r"would lose .*max_error=0\.01 is the bound"):
        _compress(loaded, np.arange(SIZE).repeat(12).reshape(-1, 12).astype(np.int32), max_error=0.01)


def test_without_rows_each_row_counts_alike(tmp_path):
    loaded = _build(tmp_path / "m", lambda w, ids: tf.gather(w, ids), _of_form("quotient_remainder"))
    log = _compress(loaded, ids=None, epochs=1)
    assert "every row counted alike" in log.notes[0] and "not recovered" in log.warnings[0]
    with pytest.raises(TfoptError, match="how often each row is read is not known"):
        _compress(_build(tmp_path / "n", lambda w, i: tf.gather(w, i), rows(SIZE, 8)), ids=None, method="vocabulary")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "magic"}, "method='magic': choose from auto"),
        ({"ratio": 1.0}, "ratio=1.0: must be above 1"),
        ({"hashes": 0}, "hashes=0: must be at least 1"),
        ({"method": "quotient_remainder", "ratio": 1000.0}, "a quotient and a remainder table take"),
        ({"method": "mixed_dimension", "ratio": 100.0}, "hold no narrow rows"),
    ],
)
def test_options_that_cannot_be(options, message, tmp_path):
    loaded = _build(tmp_path / "m", lambda w, ids: tf.gather(w, ids), rows(SIZE, WIDTH, seed=1))
    with pytest.raises(TfoptError, match=message):
        _compress(loaded, **options)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A Keras 3 classifier of bags of ids, trained for a moment: (its directory, ids, labels)."""
    import keras

    keras.utils.set_random_seed(1)
    random = np.random.default_rng(0)
    ids = (random.zipf(1.4, (1200, 12)) % SIZE).astype(np.int32)
    meaning = random.normal(size=SIZE)
    labels = (meaning[ids].mean(axis=1, keepdims=True) > 0).astype(np.float32)
    layers = keras.layers
    net = keras.Sequential(
        [
            layers.Input((12,), dtype="int32", name="ids"),
            layers.Embedding(SIZE, WIDTH),
            layers.GlobalAveragePooling1D(),
            layers.Dense(8, activation="relu"),
            layers.Dense(1, activation="sigmoid"),
        ]
    )
    net.compile(keras.optimizers.Adam(0.02), "binary_crossentropy")
    net.fit(ids, labels, epochs=6, batch_size=64, verbose=0)
    path = tmp_path_factory.mktemp("classifier") / "model"
    net.export(path, verbose=False)
    return path, ids, labels


@pytest.mark.parametrize("method", METHODS)
def test_training_brings_answers_back_and_the_files_run(method, classifier, tmp_path):
    path, ids, labels = classifier
    original = model.load(path)
    prepared = _cleaned(original.copy())
    data = Data("serving_default", original, rows=Dataset({"ids": ids[:1000]}, None, "bags"))
    missed, answers = [], {}
    with Function(original) as function:
        (want,) = function("serving_default", {"ids": ids}).values()
    for epochs in (0, 8):
        trained, log = prepared.copy(), Log()
        compress_embeddings.run(
            trained, log, data, method=method, ratio=5.0, epochs=epochs, min_steps=0, learning_rate=0.01
        )
        with Function(trained) as function:
            (answers[epochs],) = function("serving_default", {"ids": ids}).values()
        missed.append(float(np.abs(answers[epochs] - want).mean()))
    accuracy = [float(np.mean((y > 0.5) == labels)) for y in (want, answers[0], answers[8])]
    print(f"{method}: accuracy {accuracy[0]:.3f}, at a fifth of the bytes {accuracy[1]:.3f}, trained {accuracy[2]:.3f}")
    assert missed[1] <= missed[0] and accuracy[2] > accuracy[0] - 0.05
    assert any("before training" in note for note in log.notes)
    saved_model.save(trained, tmp_path / "c")
    (served,) = serve_v1(tmp_path / "c", {"ids": ids}).values()
    np.testing.assert_allclose(served, answers[8], atol=1e-5)
    content = tf.lite.TFLiteConverter.from_saved_model(str(tmp_path / "c"), signature_keys=["serving_default"])
    (tmp_path / "c.tflite").write_bytes(content.convert())
    with runtime.open(tmp_path / "c.tflite") as program:
        (device,) = program.run("serving_default", {"ids": ids[:16]}).values()
    np.testing.assert_allclose(device, answers[8][:16], atol=1e-5)


def test_small_tables_of_an_estimator(shared):
    loaded = _cleaned(model.load(shared / "models/tfx-chicago-taxi/estimator_serving"))
    data = Data("serving_default", loaded.copy())
    with pytest.raises(TfoptError, match=r"company_xf/weights: it has 4,040 bytes, less than min_bytes=16,384"):
        compress_embeddings.run(loaded, Log(), data)


def test_it_is_a_pass_that_learns():
    chosen = passes.get("compress_embeddings")
    assert chosen.learns and not chosen.lossless and not chosen.keeps
    with pytest.raises(TfoptError, match="needs fold_affine"):
        recipe.parse(["compress_embeddings"], "mine")
