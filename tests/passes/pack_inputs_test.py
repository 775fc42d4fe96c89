"""pack_inputs: one tensor for each dtype gives what single inputs gave, and is taken apart only where it must be."""

from __future__ import annotations

import collections
import sys

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import save_tf1
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.model import Model, load
from tfopt.passes import broadcast_inputs, pack_inputs
from tfopt.rewrite import Log
from tfopt.serving.encode import encode
from tfopt.verify import difference

_RANDOM = np.random.default_rng(3)
_KERNEL = _RANDOM.normal(size=(6, 3)).astype(np.float32)


def _rows(inputs: dict[str, tuple], count: int = 5) -> dict[str, np.ndarray]:
    rows = {}
    for name, (dtype, *shape) in inputs.items():
        array = _RANDOM.integers(0, 9, (count, *shape)) if dtype != "float32" else _RANDOM.normal(size=(count, *shape))
        rows[name] = array.astype(str).astype("S").astype(object) if dtype == "string" else array.astype(dtype)
    return rows


def _save(path, inputs: dict[str, tuple], outputs) -> Model:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        fed = {n: tf.compat.v1.placeholder(dtype, [None, *shape], n) for n, (dtype, *shape) in inputs.items()}
        save_tf1(path, session, {"serving_default": (fed, outputs(**fed))})
    return load(path)


def _assert_equal(model: Model, packed: Model, rows: dict[str, np.ndarray]) -> None:
    with Function(model) as before, Function(packed) as after:
        found = difference(before("serving_default", rows), after("serving_default", rows))
    assert found.broken is None and found.relative == 0, found


def _ops(model: Model) -> collections.Counter:
    return collections.Counter(node.op for node in model.graph.nodes.values())


FLOATS = dict.fromkeys("fbdace", ("float32", 1))


def test_columns_that_are_concatenated_stand_in_this_order_and_stay_together(tmp_path):
    model = _save(
        tmp_path / "model", FLOATS, lambda a, b, c, d, e, f: {"y": tf.concat([f, a, b, c, e, d], 1) @ _KERNEL}
    )
    packed, log = model.copy(), Log()
    pack_inputs.run(packed, log)
    assert packed.requests == {"serving_default": [{"step": "pack", "into": "float_features", "from": list("fabced")}]}
    assert _ops(packed) == _ops(model) - collections.Counter(ConcatV2=1, Placeholder=5, Const=1)
    assert log.applied == {"input packed": 6, "column that is not put back": 5}
    assert packed.signatures["serving_default"].inputs["float_features"].tensor_shape.dim[1].size == 6
    assert any("a request of 100 rows takes 2,4" in note for note in log.notes), log.notes
    _assert_equal(model, packed, _rows(FLOATS))


def test_what_is_done_to_each_column_is_done_to_all(tmp_path):
    def outputs(**inputs):
        scaled = [(tf.cast(v, tf.float32) - i) / (i + 2.0) for i, v in enumerate(inputs.values())]
        return {"y": tf.concat([tf.expand_dims(tf.nn.relu(x), -1) for x in scaled], 1), "z": tf.stack(scaled, 1)}

    inputs = dict.fromkeys("fbdace", ("int64",))
    model = _save(tmp_path / "model", inputs, outputs)
    packed, log = model.copy(), Log()
    pack_inputs.run(packed, log)
    counts = _ops(packed)
    assert counts["Cast"] == 2 and counts["Sub"] == 2 and counts["RealDiv"] == 2 and counts["Relu"] == 1
    assert not {"ConcatV2", "Pack", "Unpack", "ExpandDims", "Slice"} & counts.keys()
    assert packed.requests["serving_default"][0]["into"] == "int_features"
    _assert_equal(model, packed, _rows(inputs))


MIXED = {
    **{"a": ("float32",), "b": ("float32", 1), "v": ("float32", 3), "image": ("float32", 2, 2)},
    **{"i": ("int64",), "j": ("int64",), "s": ("string",), "t": ("string", 1)},
}


def _mixed(a, b, v, image, i, j, s, t):
    return {
        "y": tf.concat([v, tf.expand_dims(a, 1), b], 1) * tf.reduce_sum(image, [1, 2])[:, None],
        "again": tf.concat([b, a[:, None], v], 1),
        "i": i * 2 + tf.cast(tf.shape(j)[0], tf.int64),
        "j": j,
        "s": tf.strings.join([s, tf.reshape(t, [-1])]),
        "b": tf.identity(b),
    }


@pytest.mark.parametrize("max_width", [1, 4])
@pytest.mark.parametrize("min_inputs", [2, 3])
def test_every_kind_of_input(tmp_path, max_width, min_inputs):
    model = _save(tmp_path / "model", MIXED, _mixed)
    packed, log = model.copy(), Log()
    pack_inputs.run(packed, log, min_inputs=min_inputs, max_width=max_width)
    into = {step["into"]: step["from"] for step in packed.requests.get("serving_default", [])}
    if min_inputs == 2:
        assert into["int_features"] == ["i", "j"] and into["string_features"] == ["s", "t"]
        assert into["float_features"] == (["a", "b"] if max_width == 1 else ["v", "a", "b"])
    else:
        assert into == ({} if max_width == 1 else {"float_features": ["v", "a", "b"]})
    gone = {name for names in into.values() for name in names}
    assert set(packed.signatures["serving_default"].inputs) == (set(MIXED) - gone) | set(into)
    _assert_equal(model, packed, _rows(MIXED))


def test_a_few_single_columns_are_sliced(tmp_path):
    model = _save(
        tmp_path / "model", FLOATS, lambda a, b, c, d, e, f: {"y": tf.concat([a, b, c, d, e, f], 1), "c": c * 2.0}
    )
    packed = model.copy()
    pack_inputs.run(packed, Log())
    assert _ops(packed)["Slice"] == 1 and not {"Split", "Unpack", "ConcatV2"} & _ops(packed).keys()
    _assert_equal(model, packed, _rows(FLOATS))


def test_without_the_protos_of_serving_bytes_are_not_counted(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis.predict_pb2", None)
    model, log = _save(tmp_path / "model", {"a": ("float32",), "b": ("float32",)}, lambda a, b: {"y": a + b}), Log()
    pack_inputs.run(model, log)
    assert log.applied["input packed"] == 2 and "tensorflow-serving-api is not installed" in log.notes[-1]


def test_a_free_name_is_taken(tmp_path):
    inputs = {"float_features": ("float32", 4), "a": ("float32",), "b": ("float32",)}
    model = _save(tmp_path / "model", inputs, lambda float_features, a, b: {"y": float_features[:, 0] * a + b})
    packed = model.copy()
    pack_inputs.run(packed, Log())
    assert set(packed.signatures["serving_default"].inputs) == {"float_features", "float_features_2"}
    _assert_equal(model, packed, _rows(inputs))


def test_signatures_that_share_inputs(tmp_path):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        a, b, c, d = (tf.compat.v1.placeholder(tf.float32, [None], name) for name in "abcd")
        signatures = {
            "serving_default": ({"a": a, "b": b, "c": c}, {"y": a * b - c}),
            "again": ({"x": a, "b": b, "d": d}, {"y": a - b * d}),
        }
        save_tf1(tmp_path / "model", session, signatures)
    model = load(tmp_path / "model")
    packed = model.copy()
    pack_inputs.run(packed, Log())
    assert packed.requests["serving_default"] == [{"step": "pack", "into": "float_features", "from": ["b", "a"]}]
    assert packed.requests["again"] == [{"step": "pack", "into": "float_features", "from": ["b", "x"]}]
    rows = _rows(dict.fromkeys("abcdx", ("float32",)))
    _assert_equal(model, packed, rows)
    with Function(model) as before, Function(packed) as after:
        assert difference(before("again", rows), after("again", rows)).broken is None


def test_what_is_sent_once_is_packed_apart(tmp_path):
    inputs = dict.fromkeys(("user_a", "user_b", "c_a", "c_b"), ("float32",))
    model = _save(
        tmp_path / "model", inputs, lambda user_a, user_b, c_a, c_b: {"y": user_a * c_a + user_b * c_b, "u": user_a}
    )
    packed = model.copy()
    broadcast_inputs.run(packed, Log(), "user_*")
    pack_inputs.run(packed, Log())
    shapes = {n: [d.size for d in i.tensor_shape.dim] for n, i in packed.signatures["serving_default"].inputs.items()}
    assert shapes == {"float_features": [-1, 2], "once_float_features": [1, 2]}
    rows = _rows(inputs)
    _assert_equal(model, packed, {n: np.repeat(v[:1], 5) if n.startswith("user") else v for n, v in rows.items()})


def test_bad_options_and_rows_that_do_not_fit(tmp_path):
    model = _save(tmp_path / "model", {"a": ("float32",)}, lambda a: {"y": a * 2.0})
    with pytest.raises(TfoptError, match="min_inputs=1: must be at least 2"):
        pack_inputs.run(model, Log(), min_inputs=1)
    log = Log()
    pack_inputs.run(model, log)
    assert not log.applied and not model.requests
    step = {"step": "pack", "into": "x", "from": ["a", "b"]}
    with pytest.raises(ValueError, match="input 'b' has 2 rows, and 'a' has 3"):
        encode([step], {"a": np.zeros(3), "b": np.zeros(2)})
