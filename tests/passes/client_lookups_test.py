"""client_lookups: clients send what the graph would have looked up, and the answers stay."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from tests.passes.compact_signature_test import cleaned
from tests.serving import examples
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.passes import client_lookups, compact_signature
from tfopt.rewrite import Log
from tfopt.verify import difference

VOCABULARY = ["blue", "red", "grün"]


def save(path, lookup):
    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([None, 1], tf.string, name="color")])
    def serve(color):
        return {"y": tf.gather(tf.constant([1.0, 2.0, 3.0, 4.0, 5.0]), lookup(module, color))}

    module.serve = serve
    tf.saved_model.save(module, str(path), signatures=serve)
    return path


def static_table(buckets, path=None):
    def lookup(module, x):
        if not hasattr(module, "table"):
            with tf.init_scope():
                values = tf.range(3, dtype=tf.int64)
                initializer = (
                    tf.lookup.TextFileInitializer(str(path), tf.string, -2, tf.int64, -1)
                    if path
                    else tf.lookup.KeyValueTensorInitializer(VOCABULARY, values)
                )
                module.table = tf.lookup.StaticVocabularyTable(initializer, num_oov_buckets=buckets)
        return module.table.lookup(tf.squeeze(x, 1))

    return lookup


@pytest.mark.parametrize("in_file", [False, True])
def test_a_table(tmp_path, in_file):
    (tmp_path / "vocabulary").write_text("\n".join(VOCABULARY) + "\n")
    file = tmp_path / "vocabulary" if in_file else None
    model = cleaned(save(tmp_path / "m", static_table(1, file)))
    log = Log()
    client_lookups.run(model, log, inputs="col*")
    model.check()
    assert log.applied == {"lookup by the client": 1} and not log.refused
    assert not [node for node in model.graph.nodes.values() if node.op.startswith("LookupTableFind")]
    (step,) = model.requests["serving_default"]
    assert json.loads(json.dumps(step))["table"] == {"blue": 0, "red": 1, "grün": 2} and step["default"] == 3
    info = model.signatures["serving_default"].inputs["color"]
    assert info.dtype == tf.int64.as_datatype_enum and [d.size for d in info.tensor_shape.dim] == [-1]
    colors = np.array([["red"], ["grün".encode()], [b"unknown"], [b"blue"], [b"\xff"]], object)
    with Function(model) as function:
        assert function("serving_default", {"color": colors})["y"].tolist() == [2.0, 3.0, 4.0, 1.0, 4.0]


@pytest.mark.parametrize(
    "lookup, options, reason",
    [
        (static_table(2), {}, "hashed into several buckets"),
        (static_table(1), {"max_vocabulary": 2}, "has 3 entries, and max_vocabulary is 2"),
        (lambda _, x: tf.strings.to_hash_bucket_fast(tf.squeeze(x, 1), 5), {}, "no table is looked up"),
        (lambda _, x: tf.strings.length(tf.squeeze(x, 1)), {}, "goes elsewhere"),
    ],
)
def test_what_stays_on_the_server(tmp_path, lookup, options, reason):
    model = cleaned(save(tmp_path / "m", lookup))
    log = Log()
    client_lookups.run(model, log, inputs="*", **options)
    (found,) = log.refused.values()
    assert reason in found and not log.applied and not model.requests


def test_nothing_is_asked_for_or_there(tmp_path):
    model = cleaned(save(tmp_path / "m", static_table(1)))
    log = Log()
    client_lookups.run(model, log)
    assert not log.applied
    with pytest.raises(TfoptError, match="no string input is called 'colour'"):
        client_lookups.run(model, log, inputs="colour")


def test_after_compact_signature(tmp_path):
    model = cleaned(examples.save(tmp_path / "m"))
    records = examples.serialize(examples.rows(12))
    with Function(model) as function:
        expected = function("serving_default", {"examples": records})
    compact_signature.run(model, Log())
    client_lookups.run(model, Log(), inputs="company")
    assert model.signatures["serving_default"].inputs["company"].dtype == tf.int64.as_datatype_enum
    with Function(model) as function:
        found = difference(expected, function("serving_default", {"examples": records}))
    assert found.broken is None
