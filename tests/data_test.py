"""Data from every kind of source: what fits is fed exactly, what does not is one line with wanted and received."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np
import pytest

from tfopt import examples
from tfopt.data import Dataset, TensorSpec, batch_size, load, probes, whole_inputs
from tfopt.errors import TfoptError

X = TensorSpec("x", np.dtype(np.float32), (None, 3))
EXAMPLES = {"examples": TensorSpec("examples", "string", (None,))}


def specs(*items: TensorSpec) -> dict[str, TensorSpec]:
    return {spec.name: spec for spec in items}


def fail(message: str, *arguments, **options) -> str:
    with pytest.raises(TfoptError, match=message) as caught:
        load(*map(str, arguments[:1]), *arguments[1:], **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        path = tmp_path / "data.npz"
        np.savez(path, **arrays)
        return str(path)

    return write


@pytest.fixture
def records(tmp_path):
    """Writes rows of {feature: list} as TFRecords, gzipped on demand; returns their glob."""
    import tensorflow as tf

    def example(row):
        features = {}
        for name, values in row.items():
            kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
            features[name] = tf.train.Feature(**{kind: {"value": values}})
        return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()

    def write(rows, shards=2, compression=""):
        for shard in range(shards):
            options = tf.io.TFRecordOptions(compression_type=compression)
            with tf.io.TFRecordWriter(str(tmp_path / f"part-{shard}"), options) as writer:
                for row in rows[shard::shards]:
                    writer.write(row if isinstance(row, bytes) else example(row))
        return str(tmp_path / "part-*")

    return write


@pytest.fixture
def function(tmp_path, monkeypatch):
    """Writes a function body to a module in the current directory; returns its source string."""
    monkeypatch.chdir(tmp_path)
    name = f"user_data_{tmp_path.name}"

    def write(body):
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        (tmp_path / f"{name}.py").write_text(f"import numpy as np, tensorflow as tf\n\ndef rows():\n{lines}\n")
        sys.modules.pop(name, None)
        return f"python:{name}:rows"

    yield write
    sys.modules.pop(name, None)


# The dataset itself.


def test_batches_and_take_keep_whole_inputs_as_they_are():
    data = Dataset({"x": np.arange(5), "rate": np.array(0.5)}, np.arange(5), "s", whole=frozenset({"rate"}))
    assert len(data) == 5
    batches = list(data.batches(2))
    assert [b["x"].tolist() for b in batches] == [[0, 1], [2, 3], [4]]
    assert all(b["rate"] == 0.5 for b in batches)
    assert data.take(slice(1, 3)).labels.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("shapes", "whole", "size"),
    [
        ([(None, 3)], set(), 32),
        ([(1, 512)], set(), 1),
        ([None], set(), 32),
        ([(None, 3), ()], {"i1"}, 32),
        ([(1, 8), (None, 3)], {"i0"}, 32),
        ([(4, 8), (4,)], set(), 4),
        ([(4, 8), (5,)], {"i0", "i1"}, 32),
        ([()], {"i0"}, 32),
    ],
)
def test_which_axes_count_rows(shapes, whole, size):
    s = specs(*[TensorSpec(f"i{i}", np.dtype(np.float32), shape) for i, shape in enumerate(shapes)])
    assert whole_inputs(s) == whole
    assert batch_size(s, 32) == size
    inputs = probes(s, 0, 6).inputs
    for name, shape in zip(s, shapes, strict=True):
        wanted = (None,) if shape is None else shape
        assert inputs[name].shape == tuple((6 if axis == 0 else 8) if d is None else d for axis, d in enumerate(wanted))


# .npz


def test_npz_with_labels_and_limit(npz):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    data = load(npz(x=x, label=np.arange(4)), specs(X), limit=3)
    assert len(data) == 3
    np.testing.assert_array_equal(data.inputs["x"], x[:3])
    assert data.labels.tolist() == [0, 1, 2]
    assert data.warnings == ()


@pytest.mark.parametrize(
    ("array", "dtype"),
    [
        (np.float64([0.1, -2.5]), np.float32),
        (np.int32([1, -5]), np.int64),
        (np.int64([1, -5]), np.int32),
        (np.uint8([0, 255]), np.float32),
        (np.float32([3.0, 4.0]), np.int64),
        (np.int64([0, 1]), np.bool_),
        (np.float32([1.5, np.nan]), np.float16),
        (np.array(["é", "b"]), "string"),
        (np.array([b"a", b"bc"]), "string"),
    ],
)
def test_casts_that_keep_every_value(npz, array, dtype):
    data = load(npz(x=array), specs(TensorSpec("x", dtype, (None,))))
    if dtype == "string":
        assert data.inputs["x"].dtype == object
        assert data.inputs["x"].tolist() == [v if isinstance(v, bytes) else v.encode() for v in array.tolist()]
    else:
        assert data.inputs["x"].dtype == dtype
        np.testing.assert_array_equal(data.inputs["x"], array.astype(dtype))


@pytest.mark.parametrize(
    ("array", "dtype", "message"),
    [
        (np.float32([1, 1.5]), np.int32, "'x' wants int32, received float32 with values .* such as 1.5"),
        (np.int64([2**40]), np.int32, "wants int32, received int64 .* such as 1099511627776"),
        (np.int64([-1]), np.uint64, "wants uint64, received int64 .* such as -1"),
        (np.int64([2**53 + 1]), np.float32, "wants float32, received int64"),
        (np.float64([1e300]), np.float32, "wants float32, received float64"),
        (np.float32([np.nan]), np.int32, "wants int32, received float32 .* such as nan"),
        (np.int32([2]), np.bool_, "wants bool, received int32"),
        (np.array(["a"]), np.float32, "wants float32, received <U1"),
        (np.float32([1]), "string", "wants string, received float32"),
        (np.complex64([1j]), np.float32, "wants float32, received complex64"),
    ],
)
def test_casts_that_lose_are_refused(npz, array, dtype, message):
    fail(message, npz(x=array), specs(TensorSpec("x", dtype, (None,))))


def test_npz_that_does_not_fit(npz):
    ones = np.ones((4, 3), np.float32)
    fail(r"wants 'x' float32 \(\?, 3\); received 'y'", npz(y=ones), specs(X))
    fail("received nothing", npz(), specs(X))
    fail(
        r"wants rows of shape \(3\), received \(5\) \(float32 \(4, 5\) in all\)", npz(x=np.ones((4, 5), "f")), specs(X)
    )
    fail(r"wants rows of shape \(3\), received \(\)", npz(x=np.ones(4, "f")), specs(X))
    fail("wants rows, received a single value", npz(x=np.float32(1)), specs(X))
    fail("holds no rows", npz(x=ones[:0]), specs(X))
    fail("received 'x' 4, the labels 3", npz(x=ones, label=np.ones(3)), specs(X))
    fail("received 'x' 4, 'y' 2", npz(x=ones, y=ones[:2]), specs(X, X._replace(name="y")))
    fail("labels hold NaN or infinity in 1 of 4 rows", npz(x=ones, label=np.array([0, np.nan, 1, 1])), specs(X))
    fail("labels must have one row", npz(x=ones, label=np.array(1)), specs(X))
    fail("wants labels called 'y', received 'x'", npz(x=ones), specs(X), label="y")
    fail("at least 1, received 0", npz(x=ones), specs(X), limit=0)


def test_npz_files_that_cannot_be_read(tmp_path, npz):
    fail("no such file", tmp_path / "none.npz", specs(X))
    (tmp_path / "text.npz").write_text("no archive")
    fail("not an .npz file", tmp_path / "text.npz", specs(X))
    path = npz(x=np.array([{}, None], dtype=object))
    fail("'x' holds Python objects, which are not read because they can run code", path, specs(X))
    whole = npz(x=np.random.default_rng(0).random((100, 3)))
    damaged = bytearray(Path(whole).read_bytes())
    damaged[500:600] = bytes(100)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    fail("array 'x' cannot be read", tmp_path / "damaged.npz", specs(X))


def test_what_deserves_a_look_is_a_warning(npz):
    x = np.ones((4, 3), np.float32)
    x[2, 1] = np.nan
    first, second = load(npz(x=x, labels=np.ones(4)), specs(X)).warnings
    assert "'labels' is not an input of the model: ignored" in first
    assert "input 'x' holds NaN or infinity in 1 of 4 rows (the first is row 2)" in second


def test_an_input_can_be_the_labels_too(npz):
    data = load(npz(label=np.ones(2, "f")), specs(TensorSpec("label", np.float32, (None,))))
    assert data.labels.tolist() == data.inputs["label"].tolist() == [1, 1]


# TFRecords of tf.Example

ROWS = [{"x": [float(i), 1.0, 2.0], "n": [i], "word": [b"w\x00"], "label": [i % 2]} for i in range(5)]


@pytest.mark.parametrize("compression", ["", "GZIP"])
@pytest.mark.parametrize("with_spec", [True, False])
def test_serialized_examples_are_fed_as_they_are(records, compression, with_spec):
    import tensorflow as tf

    spec = {"x": tf.io.FixedLenFeature([3], tf.float32), "word": tf.io.VarLenFeature(tf.string)}
    data = load(records(ROWS, compression=compression), EXAMPLES, feature_spec=spec if with_spec else None)
    assert data.labels.tolist() == [0, 0, 0, 1, 1]  # rows 0, 2, 4 in the first file, 1 and 3 in the second
    parsed = tf.io.parse_example(data.inputs["examples"].tolist(), spec)
    assert parsed["x"][:, 0].numpy().tolist() == [0, 2, 4, 1, 3]
    assert len(load(records(ROWS), EXAMPLES, limit=4)) == 4


@pytest.mark.parametrize("with_spec", [True, False])
def test_examples_are_parsed_into_named_inputs(records, with_spec):
    import tensorflow as tf

    wanted = specs(
        TensorSpec("x", np.float32, (None, 3)),
        TensorSpec("n", np.int32, (None, 1)),
        TensorSpec("word", "string", (None,)),
    )
    spec = {"x": tf.io.VarLenFeature(tf.float32), "n": tf.io.FixedLenFeature([], tf.int64)}
    data = load(records(ROWS, shards=1), wanted, feature_spec=spec if with_spec else None, label="n")
    assert data.inputs["x"].tolist() == [row["x"] for row in ROWS]
    assert data.inputs["n"].tolist() == [[0], [1], [2], [3], [4]]
    assert data.inputs["word"].tolist() == [b"w\x00"] * 5
    assert data.labels.tolist() == [0, 1, 2, 3, 4]


def test_a_single_string_input_that_the_records_name_is_parsed(records):
    data = load(records(ROWS), specs(TensorSpec("word", "string", (None,))))
    assert set(data.inputs["word"].tolist()) == {b"w\x00"}


def test_several_globs_are_read_in_their_order(records, tmp_path):
    records(ROWS)  # rows 0, 2, 4 in part-0, 1 and 3 in part-1
    data = load(f"{tmp_path}/part-1, {tmp_path}/part-0*", EXAMPLES, label="n")
    assert data.labels.tolist() == [1, 3, 0, 2, 4]
    fail(r"none-\*: no file matches", f"{tmp_path}/part-1,{tmp_path}/none-*", EXAMPLES)
    (tmp_path / "part-1").rename(tmp_path / "a,b")
    assert len(load(str(tmp_path / "a,b"), EXAMPLES)) == 2


def test_one_hot_labels(records):
    data = load(records([{"label": [0, 1, 0]}] * 2), EXAMPLES)
    assert data.labels.tolist() == [[0, 1, 0]] * 2


def test_records_that_do_not_fit(tmp_path, records):
    import tensorflow as tf

    path = records(ROWS)
    fail(
        "examples do not fit .*Feature: y .*required.*holds 'label', 'n', 'word', 'x'",
        path,
        specs(X._replace(name="y")),
    )
    fixed = {"x": tf.io.FixedLenFeature([2], tf.float32)}
    fail("examples do not fit the features of the model: Key: x", path, EXAMPLES, feature_spec=fixed)
    fail("examples do not fit", path, specs(TensorSpec("x", np.int64, (None, 3))))
    fail("wants labels called 'y'", path, EXAMPLES, label="y")
    fail("no file matches", tmp_path / "none-*", EXAMPLES)
    fail("is a directory: name its files", tmp_path, EXAMPLES)
    ragged = [{"x": [1.0]}, {"x": [1.0, 2.0]}]
    fail("as many values in every record, received 1 to 2", records(ragged), specs(X._replace(shape=(None, None))))
    some = [{"label": [1]}, {"x": [1.0]}]
    fail("Feature: label .* required", records(some, shards=1), EXAMPLES)
    fail("records that are none", records([b"\xff\xff\xff"]), EXAMPLES)
    fail("holds no rows", records([]), EXAMPLES)


def test_files_that_are_no_records(tmp_path):
    (tmp_path / "data.csv").write_text("a,b,c\n" * 100)
    fail("data.csv: not a TFRecord file, or a damaged one: corrupted record at 0", tmp_path / "data.csv", EXAMPLES)
    with gzip.open(tmp_path / "data.gz", "wb") as stream:
        stream.write(b"a,b,c\n" * 100)
    fail("not a TFRecord file", tmp_path / "data.gz", EXAMPLES)


# Python functions


@pytest.mark.parametrize(
    "body",
    [
        "return tf.data.Dataset.from_tensor_slices(({'x': np.ones((5, 3), 'f')}, np.arange(5)))",
        "return tf.data.Dataset.from_tensor_slices(({'x': np.ones((5, 3), 'f')}, np.arange(5))).batch(2)",
        "return tf.data.Dataset.from_tensor_slices(({'x': np.ones((5, 3))}, np.arange(5))).batch(2).take(9)",
    ],
)
def test_functions_that_return_datasets(function, body):
    data = load(function(body), specs(X))
    np.testing.assert_array_equal(data.inputs["x"], np.ones((5, 3), np.float32))
    assert data.inputs["x"].dtype == np.float32
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    assert len(load(function(body), specs(X), limit=3)) == 3


def test_functions_keep_bytes_and_whole_inputs(function):
    source = function(
        "rows = {'s': [b'a\\0', b'b'], 'rate': [0.5, 0.5]}\nreturn tf.data.Dataset.from_tensor_slices(rows)"
    )
    data = load(source, specs(TensorSpec("s", "string", (None,)), TensorSpec("rate", np.float32, ())))
    assert data.inputs["s"].tolist() == [b"a\x00", b"b"]
    assert data.inputs["rate"].shape == () and data.labels is None


def test_endless_datasets_need_a_limit(function):
    source = function("return tf.data.Dataset.from_tensor_slices({'x': np.ones((5, 3), 'f')}).repeat()")
    assert len(load(source, specs(X), limit=12)) == 12
    fail("the dataset has no end", source, specs(X))


def test_functions_that_do_not_fit(function):
    fail("wants python:package.module:function", "python:math", specs(X))
    fail("ModuleNotFoundError: No module named 'not_there'", "python:not_there:rows", specs(X))
    fail("AttributeError: module 'math' has no attribute 'rows'", "python:math:rows", specs(X))
    fail("wants a tf.data.Dataset, received int", function("return 3"), specs(X))
    fail("ValueError: two lines", function("raise ValueError('two\\nlines')"), specs(X))
    fail("SystemExit: 3", function("raise SystemExit(3)"), specs(X))
    fail("wants elements that are a dict with 'x', or", function("return tf.data.Dataset.range(3)"), specs(X))
    fail("holds no rows", function("return tf.data.Dataset.from_tensor_slices({'x': np.ones((0, 3))})"), specs(X))
    generator = "return tf.data.Dataset.from_generator(lambda: ({'x': [1.0] * n} for n in (3, 4)), {'x': tf.float32})"
    fail("wants rows of one shape, received", function(generator), specs(X))


# Probes


def test_probes_are_seeded_and_drawn_by_dtype():
    s = specs(
        X,
        TensorSpec("i", np.dtype(np.int32), (None,)),
        TensorSpec("u", np.dtype(np.uint8), (None, 100)),
        TensorSpec("b", np.dtype(np.bool_), (None, 100)),
        TensorSpec("s", "string", (None, None)),
        TensorSpec("c", np.dtype(np.complex64), (None,)),
        TensorSpec("h", np.dtype(np.float16), (None,)),
    )
    a, b, c = (probes(s, seed, 50, int_high=4, tokens=(b"known",)).inputs for seed in (1, 1, 2))
    for name, spec in s.items():
        np.testing.assert_array_equal(a[name], b[name])
        assert (a[name] != c[name]).any()
        assert a[name].dtype == (object if spec.dtype == "string" else spec.dtype)
    assert abs(a["x"].mean()) < 0.3 and abs(a["x"].std() - 1) < 0.2
    assert set(a["i"].tolist()) == {0, 1, 2, 3}
    assert a["u"].max() > 200
    assert 0.4 < a["b"].mean() < 0.6
    assert a["s"].shape == (50, 8)
    assert 0.3 < (a["s"] == b"known").mean() < 0.7
    assert all(isinstance(value, bytes) for value in a["s"].flat)


def test_probes_take_other_shapes():
    s = specs(TensorSpec("image", np.float32, (None, None, None, 3)), TensorSpec("any", np.float32, None))
    inputs = probes(s, 0, 2, size=32, shapes={"any": (2, 7)}).inputs
    assert inputs["image"].shape == (2, 32, 32, 3)
    assert inputs["any"].shape == (2, 7)


def test_random_examples_parse_by_their_spec():
    import tensorflow as tf

    spec = {
        "fixed": tf.io.FixedLenFeature([2, 2], tf.float32),
        "default": tf.io.FixedLenFeature([], tf.int64, default_value=-1),
        "variable": tf.io.VarLenFeature(tf.string),
        "sequence": tf.io.FixedLenSequenceFeature([2], tf.float32, allow_missing=True),
        "sparse": tf.io.SparseFeature("index", "value", tf.float32, 10),
        "ragged": tf.io.RaggedFeature(tf.int64),
    }
    data = probes(EXAMPLES, 3, 200, spec)
    parsed = tf.io.parse_example(data.inputs["examples"].tolist(), spec)
    assert parsed["fixed"].shape == (200, 2, 2)
    default = parsed["default"].numpy()
    assert 0.1 < (default == -1).mean() < 0.4
    assert default.max() == 9
    lengths = parsed["ragged"].row_lengths().numpy()
    assert set(lengths) == {0, 1, 2, 3}
    assert parsed["sparse"].dense_shape.numpy().tolist() == [200, 10]
    assert parsed["variable"].values.shape[0] > 100
    assert parsed["sequence"].shape[0] == 200
    again = probes(EXAMPLES, 3, 200, spec)
    assert again.inputs["examples"].tolist() == data.inputs["examples"].tolist()


def test_probes_of_partitioned_ragged_features_are_refused():
    import tensorflow as tf

    spec = {"r": tf.io.RaggedFeature(tf.int64, partitions=[tf.io.RaggedFeature.RowLengths("lengths")])}
    with pytest.raises(TfoptError, match="'r': no random values for RaggedFeature with partitions"):
        probes(EXAMPLES, 0, 20, spec)


# Real data


def test_keyword_spotting_rows(shared):
    source = str(shared / "data/kws/kws01_first500.npz")
    data = load(source, specs(TensorSpec("input_1", np.dtype(np.float32), (None, 49, 10, 1))))
    assert (len(data), data.labels.shape, data.warnings) == (500, (500,), ())
    fail(r"\(49, 12, 1\), received \(49, 10, 1\)", source, specs(TensorSpec("input_1", np.float32, (None, 49, 12, 1))))


def test_taxi_rows(shared):
    import tensorflow as tf

    source = str(shared / "data/chicago-taxi/tfexamples/Split-eval/*.gz")
    data = load(source, EXAMPLES, label="tips", limit=1000)
    assert (len(data), data.labels.shape) == (1000, (1000,))
    first = examples.decode(source, data.inputs["examples"][0])
    assert first.features.feature["fare"].float_list.value[0] == pytest.approx(12.25)
    named = specs(TensorSpec("fare", np.float32, (None, 1)), TensorSpec("trip_start_hour", np.int64, (None,)))
    parsed = load(source, named, feature_spec={"fare": tf.io.FixedLenFeature([], tf.float32)}, limit=10)
    assert parsed.inputs["fare"].shape == (10, 1)
