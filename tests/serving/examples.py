"""A model of serialized tf.Examples with features of every kind, and rows for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

FEATURES = {
    "age": tf.io.FixedLenFeature([], tf.float32),
    "words": tf.io.FixedLenFeature([2], tf.string, default_value=["none", "none"]),
    "day": tf.io.FixedLenFeature([1], tf.int64, default_value=[3]),
    "history": tf.io.FixedLenSequenceFeature([], tf.int64, allow_missing=True, default_value=-1),
    "clicks": tf.io.VarLenFeature(tf.int64),
    "scores": tf.io.RaggedFeature(tf.float32, row_splits_dtype=tf.int64),
    "fare": tf.io.VarLenFeature(tf.float32),
    "company": tf.io.VarLenFeature(tf.string),
    "never_used": tf.io.VarLenFeature(tf.string),
}


class AllKinds(tf.Module):
    """Uses every kind of feature, in ways that show the rows, the order and the shapes of what was parsed."""

    def __init__(self):
        super().__init__()
        self.table = tf.Variable(tf.random.stateless_normal((20, 4), seed=(1, 2)))
        self.companies = tf.lookup.StaticVocabularyTable(
            tf.lookup.KeyValueTensorInitializer(["blue", "red"], tf.constant([0, 1], tf.int64)), num_oov_buckets=1
        )

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def serve(self, examples):
        parsed = tf.io.parse_example(examples, FEATURES)
        count = tf.shape(examples)[0]

        def filled(sparse, default):  # as TensorFlow Transform does it
            shape = [sparse.dense_shape[0], 1]
            return tf.squeeze(tf.sparse.to_dense(tf.SparseTensor(sparse.indices, sparse.values, shape), default), 1)

        company = parsed["company"]
        ids = tf.SparseTensor(company.indices, self.companies.lookup(company.values), company.dense_shape)
        clicks = tf.nn.safe_embedding_lookup_sparse(self.table, parsed["clicks"], combiner="mean")
        history = (
            tf.gather(self.table, tf.maximum(parsed["history"], 0))
            * tf.cast(parsed["history"] >= 0, tf.float32)[..., None]
        )
        numbers = tf.stack(
            [
                parsed["age"],
                tf.cast(parsed["day"][:, 0], tf.float32),
                filled(parsed["fare"], -7.0),
                tf.cast(filled(ids, tf.constant(-1, tf.int64)), tf.float32),
                tf.reduce_sum(parsed["scores"], axis=1),
                tf.cast(parsed["scores"].row_lengths(), tf.float32),
                tf.fill([count], tf.cast(parsed["clicks"].dense_shape[1], tf.float32)),
            ],
            axis=1,
        )
        return {
            "numbers": numbers,
            "embedded": clicks + tf.reduce_sum(history, axis=1),
            "text": tf.strings.reduce_join(parsed["words"], axis=1, separator=" "),
        }


def save(path: Path) -> Path:
    """Writes the model."""
    module = AllKinds()
    tf.saved_model.save(module, str(path), signatures=module.serve)
    return path


def rows(count: int, seed: int = 0) -> list[dict]:
    """Draws rows: optional features are missing in some, and variable ones have 0 to 3 values."""
    generator = np.random.default_rng(seed)
    drawn = []
    for index in range(count):
        row = {
            "age": float(generator.normal()),
            "history": generator.integers(0, 20, index % 4).tolist(),
            "clicks": generator.integers(0, 20, (index + 1) % 4).tolist(),
            "scores": generator.normal(size=(index + 2) % 3).tolist(),
            "never_used": ["x"] * (index % 2),
        }
        row |= {"words": ["a b", "c"], "day": 5} if index % 2 else {}
        row |= {"fare": 2.5 + index} if index % 3 else {}
        row |= {"company": ["blue", "red", "green"][index % 3]} if index % 4 else {}
        drawn.append(row)
    return drawn


def serialize(drawn: list[dict]) -> np.ndarray:
    """Rows as serialized tf.Examples."""
    records = []
    for row in drawn:
        example = tf.train.Example()
        for name, value in row.items():
            values = value if isinstance(value, list) else [value]
            feature = example.features.feature[name]
            if FEATURES[name].dtype == tf.string:
                feature.bytes_list.value.extend(v.encode() for v in values)
            elif FEATURES[name].dtype == tf.int64:
                feature.int64_list.value.extend(values)
            else:
                feature.float_list.value.extend(values)
        records.append(example.SerializeToString())
    return np.array(records, object)


def write(path: Path, drawn: list[dict]) -> Path:
    """Rows as a TFRecord file."""
    with tf.io.TFRecordWriter(str(path)) as writer:
        for record in serialize(drawn):
            writer.write(record)
    return path
