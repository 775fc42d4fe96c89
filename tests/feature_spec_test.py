from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import v1
from tfopt import model
from tfopt.feature_spec import feature_spec
from tfopt.verify import features

SPEC = {
    "fixed": tf.io.FixedLenFeature([3], tf.float32),
    "scalar": tf.io.FixedLenFeature([], tf.int64),
    "default": tf.io.FixedLenFeature([2], tf.float32, default_value=[1.5, 2.5]),
    "one_default": tf.io.FixedLenFeature([2, 2], tf.int64, default_value=[[7, 7], [7, 7]]),
    "text": tf.io.FixedLenFeature([1], tf.string, default_value=[b"none"]),
    "variable": tf.io.VarLenFeature(tf.string),
    "sequence": tf.io.FixedLenSequenceFeature([2], tf.float32, allow_missing=True),
}


def _save(path, parse):
    with tf.Graph().as_default(), v1.Session() as session:
        examples = v1.placeholder(tf.string, [None], "examples")
        parsed = parse(examples)
        outputs = {k: v.values if isinstance(v, tf.SparseTensor) else v for k, v in parsed.items()}
        v1.saved_model.simple_save(session, str(path), {"examples": examples}, outputs)
    return model.load(path)


@pytest.mark.parametrize("parse", [v1.io.parse_example, tf.io.parse_example])
def test_the_features_that_a_model_parses(parse, tmp_path):
    loaded = _save(tmp_path / "m", lambda examples: parse(examples, SPEC))
    found = features(loaded, "serving_default")
    assert set(found) == set(SPEC)
    for name, feature in SPEC.items():
        assert type(found[name]) is type(feature) and found[name].dtype == feature.dtype
        if hasattr(feature, "shape"):
            assert list(found[name].shape) == list(feature.shape)
    np.testing.assert_array_equal(found["default"].default_value, [1.5, 2.5])
    np.testing.assert_array_equal(found["one_default"].default_value, [[7, 7], [7, 7]])
    assert found["text"].default_value == [b"none"] and found["fixed"].default_value is None


def test_it_is_found_behind_a_function_call_and_a_reshape(tmp_path):
    @tf.function(input_signature=[tf.TensorSpec([None, 1], tf.string, name="examples")])
    def serve(examples):
        return {"y": tf.io.parse_example(tf.reshape(examples, [-1]), {"x": SPEC["fixed"]})["x"] * 2.0}

    tf.saved_model.save(tf.Module(), str(tmp_path / "m"), {"serving_default": serve})
    assert set(features(model.load(tmp_path / "m"), "serving_default")) == {"x"}


def test_nothing_is_found_where_nothing_parses(built):
    loaded = model.load(built("strings"))
    assert feature_spec(loaded.graph, loaded.signatures["serving_default"].inputs["text"].name) == {}
    assert features(loaded, "serving_default") is None
    assert features(model.load(built("tf1_sparse")), "serving_default") is None


def test_the_taxi_model(shared):
    loaded = model.load(shared / "models" / "tfx-chicago-taxi" / "estimator_serving")
    found = features(loaded, "serving_default")
    assert {"trip_miles", "fare", "payment_type", "company"} <= set(found) and len(found) >= 15
