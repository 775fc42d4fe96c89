"""narrow_inputs: fewer bytes for each number, nothing wraps around, and what floats lose is measured."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import save_tf1
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.model import Model, load
from tfopt.passes import Data, broadcast_inputs, narrow_inputs, pack_inputs
from tfopt.rewrite import Log
from tfopt.serving.encode import encode
from tfopt.serving.number_ranges import byte_range
from tfopt.verify import difference

_RANDOM = np.random.default_rng(4)


def _table(rows: int) -> tf.Tensor:
    return tf.constant(_RANDOM.normal(size=(rows, 2)).astype(np.float32))


def _save(path, inputs: dict[str, tuple], outputs) -> Model:
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        fed = {n: tf.compat.v1.placeholder(dtype, [None, *shape], n) for n, (dtype, *shape) in inputs.items()}
        found = outputs(**fed)
        session.run(tf.compat.v1.tables_initializer())
        init = tf.compat.v1.tables_initializer()
        save_tf1(path, session, {"serving_default": (fed, found)}, main_op=init)
    return load(path)


def _narrow(model: Model, rows: dict[str, np.ndarray] | None = None, **options) -> tuple[Model, Log]:
    data = Data("serving_default", model, None if rows is None else Dataset(rows, None, "rows"))
    narrowed, log = model.copy(), Log()
    narrow_inputs.run(narrowed, log, data, **options)
    narrowed.check()
    return narrowed, log


def _difference(model: Model, other: Model, rows: dict[str, np.ndarray]):
    with Function(model) as before, Function(other) as after:
        return difference(before("serving_default", rows), after("serving_default", rows))


def _dtypes(model: Model) -> dict[str, str]:
    return {n: tf.as_dtype(i.dtype).name for n, i in sorted(model.signatures["serving_default"].inputs.items())}


IDS = {
    **{"small": ("int64",), "middle": ("int64", 3), "large": ("int64",), "hot": ("int32",), "keyed": ("int64",)},
    **{"free": ("int64",), "short": ("int32",)},
}
IDS_ROWS = {
    "small": np.array([0, 255, 7]),
    "middle": np.array([[0, 1, 2], [256, 9, 9], [5, 5, 5]]),
    "large": np.array([0, 69999, 3]),
    "hot": np.array([0, 9, 200], np.int32),
    "keyed": np.array([1, 300, 5]),
    "free": np.array([-5, 2**31 - 1, 0]),
    "short": np.array([1, 2, 3], np.int32),
}


def _look_up(small, middle, large, hot, keyed, free, short):
    table = tf.lookup.StaticHashTable(
        tf.lookup.KeyValueTensorInitializer(tf.constant([1, 5, 299], tf.int64), tf.constant([7, 8, 9], tf.int64)), -1
    )
    both = tf.reshape(tf.concat([small[:, None], tf.expand_dims(small, 1)], 1), [-1, 2])
    return {
        "small": tf.gather(_table(256), both),
        "middle": tf.reduce_sum(tf.gather(_table(257), tf.cast(middle, tf.int32)), 1),
        "large": tf.gather(_table(70000), large),
        "hot": tf.one_hot(hot, 10),
        "keyed": table.lookup(keyed),
        "free": free * 3,
        "short": short + 1,
    }


@pytest.mark.parametrize("rest", [True, False])
def test_ids_become_as_short_as_their_vocabulary_allows(tmp_path, rest):
    model = _save(tmp_path / "model", IDS, _look_up)
    narrowed, log = _narrow(model, IDS_ROWS, rest=rest)
    two = "int16" if rest else "uint16"
    wanted = {"small": "uint8", "middle": two, "large": "int32", "hot": "uint8", "keyed": two}
    assert rest == (not log.warnings)
    assert _dtypes(narrowed) == {**wanted, "free": "int32", "short": "int32"}
    assert _difference(model, narrowed, IDS_ROWS).absolute == 0
    assert _difference(model, narrowed, IDS_ROWS).broken is None
    assert log.applied == {"input narrowed": 6}
    notes = "\n".join(log.notes)
    assert "small: int64 to uint8, exact: " in notes and "has 256 rows" in notes
    assert (
        "free: int64 to int32, exact: no vocabulary is behind it, so this is proved for the rows given alone" in notes
    )
    assert "a request of 100 rows takes" in notes


def test_without_rows_only_what_is_sure_becomes_shorter(tmp_path):
    model = _save(tmp_path / "model", IDS, _look_up)
    narrowed, log = _narrow(model)
    wanted = {"small": "uint8", "middle": "int16", "large": "int32", "hot": "int32", "keyed": "int32"}
    assert _dtypes(narrowed) == {**wanted, "free": "int64", "short": "int32"}
    assert "no vocabulary behind it" in log.refused["input narrowed", "free"]
    assert _dtypes(_narrow(model, IDS_ROWS, integers="keep")[0]) == _dtypes(model)
    assert _dtypes(_narrow(model, IDS_ROWS, inputs="small,l*")[0]) == {
        **_dtypes(model),
        "small": "uint8",
        "large": "int32",
    }


def test_ids_that_keras_counts_from_the_end(tmp_path):
    def look_up(x):
        return {"y": tf.gather(_table(250), tf.where(x < 0, x + 250, x))}

    model = _save(tmp_path / "model", {"x": ("int64",)}, look_up)
    assert _dtypes(_narrow(model)[0]) == {"x": "int16"}
    rows = {"x": np.array([3, 249])}
    narrowed, log = _narrow(model, rows)
    assert _dtypes(narrowed) == {"x": "uint8"} and "count from the end" in log.notes[0]
    rows = {"x": np.array([3, -250])}
    narrowed, _ = _narrow(model, rows)
    assert _dtypes(narrowed) == {"x": "int16"} and _difference(model, narrowed, rows).broken is None


def test_rows_beyond_a_one_hot_vocabulary_are_held(tmp_path):
    model = _save(tmp_path / "model", {"x": ("int64",)}, lambda x: {"y": tf.one_hot(x, 10)})
    for most, dtype in ((300, "int16"), (2**40, "int64")):
        rows = {"x": np.array([3, most])}
        narrowed, log = _narrow(model, rows)
        assert _dtypes(narrowed) == {"x": dtype}
        assert _difference(model, narrowed, rows).broken is None
    assert "1,099,511,627,776" in log.refused["input narrowed", "x"]
    assert _dtypes(_narrow(model, {"x": np.array([-1, 3])})[0]) == {"x": "int16"}


@pytest.mark.parametrize(("floats", "bound"), [("float16", 6e-4), ("bfloat16", 5e-3), ("uint8", 4e-3)])
def test_floats_are_cast_and_their_error_is_measured(tmp_path, floats, bound):
    inputs = {"x": ("float32", 4), "wide": ("float32",), "n": ("int64",)}
    model = _save(
        tmp_path / "model", inputs, lambda x, wide, n: {"y": x * 2.0 + 1.0, "wide": tf.identity(wide), "n": n + 1}
    )
    scales = np.array([1, 10, 100, 0.1], np.float32)
    rows = {
        "x": _RANDOM.uniform(-1, 1, (50, 4)).astype(np.float32) * scales,
        "wide": _RANDOM.uniform(5, 6, 50).astype(np.float32),
        "n": np.arange(50),
    }
    narrowed, log = _narrow(model, rows, floats=floats, integers="keep")
    assert _dtypes(narrowed) == {"x": floats, "wide": floats, "n": "int64"}
    with Function(narrowed) as function:
        found = function("serving_default", rows)
    errors = np.abs((found["y"] - 1) / 2 - rows["x"]).max(0) / scales
    assert (errors < bound).all() and (errors > 0).all(), errors
    assert bool(log.warnings) == (floats != "uint8")
    assert any(note.startswith(f"x: float32 to {floats}") and "off by at most" in note for note in log.notes)


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (0, 1 / 255), (-1, 2 / 255), (3, 0.25)])
def test_pictures_are_sent_as_they_were(tmp_path, offset, scale):
    model = _save(
        tmp_path / "model", {"image": ("float32", 8, 8, 1)}, lambda image: {"y": tf.nn.max_pool2d(image, 2, 2, "SAME")}
    )
    pixels = _RANDOM.integers(0, 256, (20, 8, 8, 1))
    rows = {"image": (pixels * np.float32(scale) + np.float32(offset)).astype(np.float32)}
    narrowed, log = _narrow(model, rows, floats="uint8")
    assert _difference(model, narrowed, rows).relative < 1e-6
    sent = encode(narrowed.requests["serving_default"], rows)["image"]
    assert sent.dtype == np.uint8
    np.testing.assert_array_equal(sent, pixels)
    assert any("exact but for rounding" in note for note in log.notes)
    assert "takes 6,4" in log.notes[-1] and "before 25,6" in log.notes[-1], log.notes[-1]


def test_what_bytes_cannot_hold_is_left(tmp_path):
    model = _save(tmp_path / "model", {"x": ("float32",), "z": ("float32",)}, lambda x, z: {"y": x + z})
    rows = {"x": np.array([1, np.nan], np.float32), "z": np.array([1e9, 2], np.float32)}
    narrowed, log = _narrow(model, rows, floats="float16")
    assert _dtypes(narrowed) == {"x": "float16", "z": "float32"}
    assert "float16 cannot hold its largest number, 1e+09" in log.refused["input narrowed", "z"]
    narrowed, log = _narrow(model, rows, floats="uint8")
    assert _dtypes(narrowed) == {"x": "float32", "z": "uint8"}
    assert "not finite" in log.refused["input narrowed", "x"]
    with pytest.raises(TfoptError, match="learns from data: give --representative_data"):
        _narrow(model, floats="uint8")
    with pytest.raises(TfoptError, match="floats='int4': choose from float32, float16, bfloat16, uint8"):
        _narrow(model, floats="int4")
    with pytest.raises(TfoptError, match="inputs='u_\\*' fits no input; the inputs are x, z"):
        _narrow(model, inputs="u_*")


@pytest.mark.parametrize(
    ("to", "values", "message"),
    [
        ({"dtype": "uint8"}, np.array([3, 256]), "input 'x', row 1: 256 does not fit uint8, as which it is sent"),
        ({"dtype": "uint16"}, np.array([[3, -1]]), "input 'x', row 0: -1 does not fit uint16"),
        ({"dtype": "int32"}, np.array([2**31]), "2147483648 does not fit int32"),
        ({"dtype": "float16"}, np.array([1e6]), "1000000.0 does not fit float16"),
        ({"dtype": "bfloat16"}, np.array([0, 3.4e38], np.float32), "row 1: 3.*e.38 does not fit bfloat16"),
        ({"dtype": "uint8", "scale": 0.5, "offset": 1.0}, np.array([1.0, 0.7]), "row 1: 0.7 does not fit uint8"),
        ({"dtype": "uint8", "scale": [1, 2], "offset": [0, 0]}, np.array([[9, 512.0]]), "512.0 does not fit"),
        ({"dtype": "uint8", "scale": 1.0, "offset": 0.0}, np.array([np.nan]), "nan does not fit uint8"),
    ],
)
def test_the_client_refuses_what_does_not_fit(to, values, message):
    with pytest.raises(ValueError, match=message):
        encode([{"step": "narrow", "inputs": {"x": to}}], {"x": values})


def test_the_three_passes_together(tmp_path):
    def rank(user_id, user_x, c_id, c_a, c_b):
        users = tf.concat([tf.gather(_table(300), user_id), user_x], 1)
        items = tf.concat([tf.gather(_table(200), c_id), c_a, c_b], 1)
        return {"y": tf.concat([users, items], 1) @ tf.constant(np.ones((8, 2), np.float32)), "u": users}

    inputs = {
        "user_id": ("int64",),
        "user_x": ("float32", 2),
        "c_id": ("int64",),
        "c_a": ("float32", 1),
        "c_b": ("float32", 1),
    }
    model = _save(tmp_path / "model", inputs, rank)
    rows = {
        "user_id": np.full(6, 299), "user_x": np.full((6, 2), 0.5, np.float32), "c_id": np.arange(194, 200),
        "c_a": _RANDOM.normal(size=(6, 1)).astype(np.float32), "c_b": _RANDOM.normal(size=(6, 1)).astype(np.float32),
    }  # fmt: skip
    sent_once, log = model.copy(), Log()
    broadcast_inputs.run(sent_once, log, "user_*")
    narrowed, _ = _narrow(sent_once, rows, floats="float16")
    pack_inputs.run(narrowed, log)
    narrowed.check()
    assert [step["step"] for step in narrowed.requests["serving_default"]] == ["once", "narrow", "pack"]
    sent = encode(narrowed.requests["serving_default"], rows)
    assert {name: (array.dtype.name, array.shape) for name, array in sent.items()} == {
        "user_id": ("int16", (1,)), "user_x": ("float16", (1, 2)), "c_id": ("uint8", (6,)),
        "float16_features": ("float16", (6, 2)),
    }  # fmt: skip
    assert _difference(model, narrowed, rows).relative < 1e-3


def test_ranges_of_columns():
    values = np.stack([np.linspace(0, 1, 77) ** 2, np.full(77, -3.0), np.arange(77) * 0.5], 1)
    found = byte_range(values, by_column=True)
    assert found.scale.shape == (3,) and not found.exact
    np.testing.assert_allclose(found.restored(values), values, atol=0.5 / 255)
    np.testing.assert_allclose(found.restored(values)[:, 1:], values[:, 1:], atol=1e-6)
