from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import rows, spec
from tests.passes.compress_embeddings_test import (
    IDS,
    METHODS,
    SIZE,
    WIDTH,
    _answers,
    _build,
    _cleaned,
    _compress,
    _of_form,
)
from tfopt import model
from tfopt.data import Dataset
from tfopt.embeddings import tables as embeddings
from tfopt.errors import TfoptError
from tfopt.function import Function


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_ids_out_of_range_fail_as_before(method, dtype, tmp_path):
    loaded = _build(tmp_path / "m", lambda w, ids: tf.gather(w, ids), rows(1999, WIDTH, seed=1), dtype)
    _compress(loaded, np.minimum(IDS, 1998).astype(dtype.as_numpy_dtype), method=method)
    wrong = [-1, 1999, 2000, 2**31 - 1, -(2**31)] + ([2**32 + 5, -(2**40)] if dtype == tf.int64 else [])
    for bad in wrong:
        ids = np.full((1, 12), 3, dtype.as_numpy_dtype)
        ids[0, 4] = bad
        with pytest.raises(TfoptError, match=r"not in \[0"):
            _answers(loaded, ids)


@pytest.mark.parametrize("batch", [None, 64])
@pytest.mark.parametrize("flat", [True, False])
def test_rows_are_counted_through_the_graph(batch, flat, tmp_path):
    def lookup(w, ids):
        moved = tf.math.floormod(ids + 7, SIZE)
        return tf.reshape(tf.gather(w, tf.reshape(moved, [-1]) if flat else moved), [-1, 12, WIDTH])

    loaded = _build(tmp_path / "m", lookup, rows(SIZE, WIDTH, seed=1), shape=(batch, 12))
    ids = IDS[:192] if flat else IDS
    counts = embeddings.count(
        loaded, "serving_default", embeddings.find(loaded.graph, "table"), Dataset({"ids": ids}, None, "")
    )
    np.testing.assert_array_equal(counts, np.bincount((ids.ravel() + 7) % SIZE, minlength=SIZE))


LOOKUPS = {
    "v1 gather": lambda w, ids: tf.raw_ops.Gather(params=w, indices=ids),
    "one hot": lambda w, ids: tf.one_hot(ids[:, 0], SIZE) @ w,
    "sum": lambda w, ids: tf.raw_ops.SparseSegmentSum(data=w, indices=ids[:, 0], segment_ids=_segments(ids)),
    "mean": lambda w, ids: tf.raw_ops.SparseSegmentMean(data=w, indices=ids[:, 0], segment_ids=_segments(ids)),
    "computed ids": lambda w, ids: tf.gather(w, tf.math.floormod(ids * 7, SIZE)),
    "one id a row": lambda w, ids: tf.gather(w, ids[:, 3]),
}


def _segments(ids):
    return tf.range(tf.shape(ids)[0]) // 3


@pytest.mark.parametrize("method", ["mixed_dimension", "vocabulary"])
@pytest.mark.parametrize("name", LOOKUPS)
def test_every_kind_of_lookup(name, method, tmp_path):
    table = _of_form("mixed_dimension")
    loaded = _build(tmp_path / "m", LOOKUPS[name], table)
    before = _answers(loaded, IDS)
    _compress(loaded, method=method, ratio=3.0)
    assert sum(w.nbytes for w in loaded.weights.values()) <= table.nbytes / 3
    np.testing.assert_allclose(_answers(loaded, IDS), before, atol=1e-4)
    if name == "one hot":  # 0 for what is out of range
        beyond = IDS.copy()
        beyond[:2, 0] = SIZE, -1
        assert not _answers(loaded, beyond)[:2].any() and _answers(loaded, beyond)[2:].any()


class _Two(tf.Module):
    def __init__(self, table):
        super().__init__()
        self.table = tf.Variable(table, name="table")

    @tf.function(input_signature=[spec(None, 12, dtype=tf.int32, name="ids")])
    def serving_default(self, ids):
        return {"y": tf.gather(self.table, ids)}

    @tf.function(input_signature=[spec(None, dtype=tf.int32, name="id")])
    def one(self, id):
        return {"z": 2.0 * tf.gather(self.table, id)}


def test_all_signatures_share_the_new_table(tmp_path):
    table = _of_form("quotient_remainder")
    module = _Two(table)
    signatures = {"serving_default": module.serving_default, "one": module.one}
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=signatures)
    loaded = _cleaned(model.load(tmp_path / "m"))
    _compress(loaded, IDS.astype(np.int32), method="quotient_remainder")
    assert sum(w.nbytes for w in loaded.weights.values()) <= table.nbytes / 4
    with Function(loaded) as function:
        z = function("one", {"id": np.array([3, 1999], np.int32)})["z"]
    np.testing.assert_allclose(z, 2 * table[[3, 1999]], atol=2e-4)


def float_of(ids):
    return tf.cast(ids[0, 0], tf.float32)


REFUSED = {
    "Mul .* reads it otherwise than a lookup": lambda w, ids: tf.gather(w, ids) + tf.reduce_sum(w * float_of(ids)),
    "AddV2 .* reads it otherwise": lambda w, ids: tf.gather(w, ids) + tf.gather(w + 1.0, ids),
    "less than min_bytes": lambda w, ids: tf.gather(w, ids),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_compressed_is_named(reason, tmp_path):
    loaded = _build(tmp_path / "m", REFUSED[reason], rows(SIZE, WIDTH, seed=1))
    options = {"min_bytes": 1 << 20} if "min_bytes" in reason else {}
    with pytest.raises(TfoptError, match=f"no table of embeddings was compressed: .*{reason}"):
        _compress(loaded, **options)
