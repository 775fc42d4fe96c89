from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import save_module, save_tf1, v1
from tfopt import model, passes, recipe
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.passes import dense_lookups
from tfopt.rewrite import Log

RULE = "one lookup per row"
COLUMNS = ("identity", "hash", "vocabulary", "oov", "buckets", "cross", "integers")
SPARSE = {"Where", "SparseReshape", "SparseFillEmptyRows", "SparseToDense", "SparseSegmentSum", "SparseSegmentMean"}
SPARSE |= {"SparseSegmentSqrtN", "Unique", "GatherNd", "Tile", "Select"}

ROWS = {
    "x": np.array([[0], [11], [3], [-1], [12], [-2], [2**62], [-(2**62)], [5]], np.int64),
    "s": np.array([[b"a"], [b""], [b"c"], [b"zz"], [b"b"], [b"a"], [b"\xff"], [b"1"], [b"d"]], object),
    "f": np.array([[0], [-1], [0.5], [2], [9], [np.inf], [-np.inf], [1], [np.nan]], np.float32),
}


def _columns() -> dict:
    fc = tf.feature_column
    strings = {
        "hash": fc.categorical_column_with_hash_bucket("s", 20),
        "vocabulary": fc.categorical_column_with_vocabulary_list("s", ["a", "b", "c"]),
        "oov": fc.categorical_column_with_vocabulary_list("s", ["a", "b", "c"], num_oov_buckets=2),
    }
    return {
        "identity": fc.categorical_column_with_identity("x", 12, 4),
        "integers": fc.categorical_column_with_vocabulary_list("x", [5, 3, 11], dtype=tf.int64),
        "buckets": fc.bucketized_column(fc.numeric_column("f"), [0.0, 1.0, 2.0]),
        "cross": fc.crossed_column(["x", "s"], 30),
        **strings,
    }


@pytest.fixture(scope="module")
def estimators(tmp_path_factory):
    """A model with a signature for each use of each column, as estimators build them."""
    path = tmp_path_factory.mktemp("estimators") / "m"
    fc, layers = tf.feature_column, v1.feature_column
    with tf.Graph().as_default(), v1.Session() as session:
        types = {"x": tf.int64, "s": tf.string, "f": tf.float32}
        inputs = {name: v1.placeholder(dtype, [None, 1], name) for name, dtype in types.items()}
        signatures = {}
        for name, column in _columns().items():
            made = {
                f"linear_{name}": layers.linear_model(inputs, [column]),
                f"mean_{name}": layers.input_layer(inputs, [fc.embedding_column(column, 4)]),
                f"sqrtn_{name}": layers.input_layer(inputs, [fc.embedding_column(column, 1, combiner="sqrtn")]),
                f"indicator_{name}": layers.input_layer(inputs, [fc.indicator_column(column)]),
            }
            signatures |= {key: (inputs, {"y": y}) for key, y in made.items()}
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])
        for i, variable in enumerate(v1.global_variables()):
            variable.load(np.random.default_rng(i).normal(size=variable.shape).astype(np.float32), session)
        save_tf1(path, session, signatures, main_op=v1.tables_initializer())
    return _optimized(path)


def _optimized(path):
    loaded, log = model.load(path), Log()
    for name in ("prune_graph", "merge_duplicates", "fold_constants", "prune_graph", "fold_shapes"):
        passes.get(name).run(loaded, Log(), **passes.get(name).options)
    before = loaded.copy()
    dense_lookups.run(loaded, log)
    loaded.check()
    return before, loaded, log


def _nodes(of, signature):
    graph = of.graph
    ops = [graph.nodes[n].op for n in graph.reachable([graph.producer(graph.outputs[f"{signature}:y"]).name])]
    return [op for op in ops if op not in ("Const", "Placeholder")]


@pytest.mark.parametrize("use", ["linear", "mean", "sqrtn", "indicator"])
@pytest.mark.parametrize("column", COLUMNS)
def test_feature_columns_become_lookups(column, use, estimators):
    before, after, log = estimators
    signature = f"{use}_{column}"
    assert not log.refused
    left = _nodes(after, signature)
    if signature not in ("indicator_buckets", "indicator_cross"):  # of dense ones, and of one that is no lookup
        assert not SPARSE & set(left)
    assert len(left) <= 14 and 2 * len(left) < max(len(_nodes(before, signature)), 30)
    with Function(before) as expected, Function(after) as received:
        for rows in (slice(None), slice(0, 1), slice(3, 4), slice(1, 2)):
            given = {name: values[rows] for name, values in ROWS.items()}
            np.testing.assert_array_equal(expected(signature, given)["y"], received(signature, given)["y"])
        empty = {name: values[:0] for name, values in ROWS.items()}
        try:
            wanted = expected(signature, empty)["y"].shape
        except TfoptError:  # TensorFlow's linear columns cannot
            wanted = (0, 1)
        assert received(signature, empty)["y"].shape == wanted


def test_range_checks_become_a_table(estimators):
    before, after, _ = estimators
    assert sorted(_nodes(after, "mean_identity")) == ["GatherV2", "Maximum", "Minimum", "Reshape", "Sub"]
    (gather,) = (n for n in after.graph.nodes.values() if n.name == after.graph.outputs["mean_identity:y"])
    table = after.graph.constant(gather.input[0])
    weights = next(w for name, w in before.weights.items() if "x_embedding" in name and w.shape == (12, 4))
    wanted = [weights[4], np.zeros(4), *weights, weights[4]]  # below -1, -1, in range, above
    np.testing.assert_array_equal(table, wanted)


def _module(path, compute, **inputs):
    module = tf.Module()
    module.w = tf.Variable(np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32))
    specs = [tf.TensorSpec(shape, dtype, name) for name, (shape, dtype) in inputs.items()]
    module.serve = tf.function(lambda *given: {"y": compute(module.w, *given)}, input_signature=specs)
    save_module(path, module, "serve")
    return _optimized(path)


def _sparse(x, missing=-1):
    indices = tf.where(tf.not_equal(x, missing))
    return tf.SparseTensor(indices, tf.gather_nd(x, indices), tf.shape(x, out_type=tf.int64))


def _unique(w, x):
    sparse = _sparse(x)
    filled, empty = tf.sparse.fill_empty_rows(sparse, 2)
    ids, which = tf.unique(filled.values)
    found = tf.sparse.segment_sum(tf.gather(w, ids), which, filled.indices[:, 0])
    return tf.where(empty[:, tf.newaxis], tf.zeros_like(found), found)


def _no_zeros(w, x):
    filled, _ = tf.sparse.fill_empty_rows(_sparse(x), 2)
    return tf.raw_ops.SparseSegmentMeanWithNumSegments(
        data=w, indices=filled.values, segment_ids=filled.indices[:, 0], num_segments=tf.shape(x)[0]
    )


@pytest.mark.parametrize("compute", [_unique, _no_zeros])
@pytest.mark.parametrize("dtype", [tf.int32, tf.int64])
def test_written_out_by_hand(compute, dtype, tmp_path):
    before, after, log = _module(tmp_path / "m", compute, x=((None, 1), dtype))
    assert log.applied[RULE] == 1 and not SPARSE & {n.op for n in after.graph.nodes.values()}
    with Function(before) as expected, Function(after) as received:
        for rows in ([0, -1, 5, 2], [-1], [], [3]):
            x = np.array(rows, dtype.as_numpy_dtype).reshape(-1, 1)
            np.testing.assert_array_equal(expected("serve", {"x": x})["y"], received("serve", {"x": x})["y"])
        for bad in (6, -2, 2**31 - 1):  # no range check: an error before and after
            for function in (expected, received):
                with pytest.raises(TfoptError, match="serve"):
                    function("serve", {"x": np.array([[0], [bad]], dtype.as_numpy_dtype)})


def _of_two_columns(w, x, z):
    sparse = _sparse(x)
    filled, _ = tf.sparse.fill_empty_rows(tf.SparseTensor(sparse.indices, sparse.values, _sparse(z).dense_shape), 2)
    return tf.sparse.segment_sum(w, filled.values, filled.indices[:, 0])


def _of_any_number(w, x, z):
    del z
    return tf.sparse.segment_sum(w, tf.gather_nd(x, tf.where(x >= 0)), tf.where(x >= 0)[:, 0])


def _wide(w, x, z):
    filled, _ = tf.sparse.fill_empty_rows(_sparse(tf.concat([x, z], 1)), 2)
    return tf.sparse.segment_sum(w, filled.values, filled.indices[:, 0])


@pytest.mark.parametrize(("compute", "why"), [(_of_two_columns, "column"), (_of_any_number, "id"), (_wide, "id a row")])
def test_what_is_not_one_id_a_row_stays(compute, why, tmp_path):
    before, after, log = _module(tmp_path / "m", compute, x=((None, 1), tf.int64), z=((None, 1), tf.int64))
    assert not log.applied and log.refused and after.graph.same_as(before.graph)
    assert all(why in reason for reason in log.refused.values())


def _dense_again(w, x):
    sparse = tf.sparse.map_values(tf.add, _sparse(x), 2)
    dense = tf.cast(tf.sparse.to_dense(sparse, default_value=-7), tf.float32)
    return dense * w[0]


def _retained(w, x):
    sparse = _sparse(x)
    dense = tf.sparse.to_dense(tf.sparse.retain(sparse, sparse.values % 2 > 0), default_value=-7)
    return tf.cast(dense, tf.float32) * w[0]


@pytest.mark.parametrize("rows", [None, 4])
def test_what_becomes_dense_again_was_never_sparse(rows, tmp_path):
    before, after, log = _module(tmp_path / "m", _dense_again, x=((rows, 1), tf.int64))
    assert log.applied == {"dense ids": 1} and not SPARSE & {n.op for n in after.graph.nodes.values()}
    x = {"x": np.array([[0], [-1], [5], [2**40]])}
    with Function(before) as expected, Function(after) as received:
        np.testing.assert_array_equal(expected("serve", x)["y"], received("serve", x)["y"])


def test_an_op_that_may_fail_is_not_given_the_rows_left_out(tmp_path):
    before, after, log = _module(tmp_path / "m", _retained, x=((None, 1), tf.int64))
    assert not log.applied and after.graph.same_as(before.graph)


def test_a_large_table_that_others_read_is_not_copied(tmp_path):
    def compute(w, x):
        big = tf.constant(np.random.default_rng(0).normal(size=(40000, 1)).astype(np.float32))
        filled, empty = tf.sparse.fill_empty_rows(_sparse(tf.clip_by_value(x, -1, 39999)), 2)
        found = tf.sparse.segment_sum(big, filled.values, filled.indices[:, 0])
        return tf.where(empty[:, tf.newaxis], 0.0, found) + tf.reduce_sum(big) + w[0, 0]

    before, after, log = _module(tmp_path / "m", compute, x=((None, 1), tf.int64))
    assert log.applied[RULE] == 1 and after.weight_bytes < before.weight_bytes + 1000
    x = np.array([[3], [-1], [-9], [10**6]], np.int64)
    with Function(before) as expected, Function(after) as received:
        np.testing.assert_array_equal(expected("serve", {"x": x})["y"], received("serve", {"x": x})["y"])


def test_a_real_estimator(shared):
    path = shared / "models" / "tfx-chicago-taxi" / "estimator_serving"
    before, after, log = _optimized(path)
    assert log.applied == {RULE: 9} and not log.refused
    assert before.node_count() > 500 and after.node_count() < 240
    files = sorted((shared / "data" / "chicago-taxi" / "tfexamples" / "Split-eval").iterdir())
    compression = "GZIP" if files[0].suffix == ".gz" else ""
    real = list(tf.data.TFRecordDataset([str(f) for f in files], compression).as_numpy_iterator())
    changed = []
    for hour, company in ((-1, b""), (24, b"nobody"), (-5, b"\xff"), (2**40, b"Flash Cab"), (0, None)):
        example = tf.train.Example.FromString(real[0])
        for name in ("trip_start_hour", "trip_start_day", "trip_start_month"):
            example.features.feature[name].int64_list.value[:] = [hour]
        example.features.feature["company"].bytes_list.value[:] = [] if company is None else [company]
        example.features.feature["pickup_latitude"].float_list.value[:] = []
        changed.append(example.SerializeToString())
    changed.append(tf.train.Example().SerializeToString())
    with Function(before) as expected, Function(after) as received:
        for signature, info in before.signatures.items():
            (name,) = info.inputs
            for rows in (real, changed, changed[:1], real[:1]):
                given = {name: np.array(rows, object)}
                wanted, got = expected(signature, given), received(signature, given)
                for key, values in wanted.items():
                    np.testing.assert_array_equal(values, got[key])


def test_in_the_lossless_recipe():
    steps = recipe.NAMED["lossless"]["passes"]
    assert steps.index("fold_shapes") < steps.index("dense_lookups")
    assert "fold_constants" in steps[steps.index("dense_lookups") :]
