"""The Trainer's module file, called as TFX calls it, and the label that CsvExampleGen is given."""

from __future__ import annotations

import types

import numpy as np
import pytest

pytest.importorskip("tfx", reason="make test-tfx runs it")

import tensorflow as tf

from pipelines import taxi_trainer
from pipelines.taxi_examples import add_label
from tests.conftest import serve_v1

FLOATS = ("trip_miles", "fare", "pickup_latitude", "pickup_longitude", "dropoff_latitude", "dropoff_longitude")
INTS = ("trip_seconds", *taxi_trainer.CLASSES)


def example(draw, **given):
    """A trip; who pays by card tips. A feature that is None is an empty cell."""
    card = bool(draw.integers(2))
    values = {name: float(draw.normal()) for name in FLOATS} | {name: int(draw.integers(1, 7)) for name in INTS}
    values |= {"payment_type": b"Credit Card" if card else b"Cash", "company": b"A", taxi_trainer.LABEL: int(card)}
    feature = {}
    for name, value in (values | given).items():
        kind = {int: "int64_list", float: "float_list", bytes: "bytes_list"}[type(values[name])]
        feature[name] = tf.train.Feature()
        getattr(feature[name], kind).value.extend([] if value is None else [value])
    return tf.train.Example(features=tf.train.Features(feature=feature))


def schema_text(without=""):
    kinds = dict.fromkeys(FLOATS, "FLOAT") | dict.fromkeys((*INTS, taxi_trainer.LABEL), "INT")
    kinds |= dict.fromkeys(taxi_trainer.WORDS, "BYTES")
    return "".join(f'feature {{ name: "{name}" type: {kind} }}\n' for name, kind in kinds.items() if name != without)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    root = tmp_path_factory.mktemp("trainer")
    draw = np.random.default_rng(0)
    missing = [None if i % 5 == 0 else b"B" for i in range(600)]
    rows = [example(draw, company=company).SerializeToString() for company in missing]
    with tf.io.TFRecordWriter(str(root / "rows-00000-of-00001.gz"), "GZIP") as writer:
        for row in rows:
            writer.write(row)
    (root / "schema.pbtxt").write_text(schema_text())
    return types.SimpleNamespace(
        schema_path=str(root / "schema.pbtxt"),
        train_files=[str(root / "rows-*")],
        eval_files=[str(root / "rows-*")],
        train_steps=60,
        eval_steps=3,
        serving_model_dir=str(root / "model"),
    )


@pytest.fixture(scope="module")
def model(arguments):
    taxi_trainer.run_fn(arguments)
    return arguments.serving_model_dir


def test_learns_and_serves_examples(model):
    draw = np.random.default_rng(1)
    rows = [example(draw, payment_type=word).SerializeToString() for word in (b"Credit Card", b"Cash") for _ in "abcd"]
    given = serve_v1(model, {"examples": np.array(rows, dtype=object)})
    assert given["probability"].shape == (8, 1)
    assert (given["probability"][:4] > 0.8).all() and (given["probability"][4:] < 0.2).all()


def test_missing_values_and_new_words_are_answered(model):
    """Empty lists, as CsvExampleGen writes them; no such feature at all; words and numbers that were never seen."""
    draw = np.random.default_rng(2)
    full = example(draw)
    del full.features.feature[taxi_trainer.LABEL]  # not known when the model is asked
    names = sorted(full.features.feature)
    empty = example(draw, **dict.fromkeys(names))
    absent = tf.train.Example()
    strange = example(draw, payment_type=b"Barter", company=b"", trip_start_hour=99, pickup_community_area=-3)
    rows = [each.SerializeToString() for each in (full, empty, absent, strange)]
    found = serve_v1(model, {"examples": np.array(rows, dtype=object)})["probability"]
    assert np.isfinite(found).all()
    assert found[1] == found[2]


def test_a_column_that_is_not_there_is_named(arguments, tmp_path):
    (tmp_path / "schema.pbtxt").write_text(schema_text(without="fare"))
    lacking = types.SimpleNamespace(**vars(arguments) | {"schema_path": str(tmp_path / "schema.pbtxt")})
    with pytest.raises(ValueError, match="the data lack the columns fare"):
        taxi_trainer.run_fn(lacking)


@pytest.mark.parametrize(
    "tips, fare, label",
    [(2.5, 10.0, 1), (2.0, 10.0, 0), (0.0, 0.0, 0), (1.0, 0.0, 1), (None, 10.0, 0), (1.0, None, 1), (None, None, 0)],
)
def test_label(tips, fare, label):
    row = tf.train.Example()
    for name, value in (("tips", tips), ("fare", fare)):
        row.features.feature[name].float_list.value.extend([] if value is None else [value])
    assert add_label(row).features.feature[taxi_trainer.LABEL].int64_list.value[:] == [label]
