"""The Trainer's module file for Chicago's taxi trips: will the tip be more than a fifth of the fare?

The model takes serialized tf.Examples, as CsvExampleGen writes them, and gives the `probability` of such a tip. All
preprocessing is inside: missing values, normalisation, vocabularies. TFX calls `run_fn`:

    Trainer(module_file="pipelines/taxi_trainer.py", examples=..., schema=..., train_args=TrainArgs(num_steps=400), ...)
"""

from __future__ import annotations

from typing import Any

LABEL = "big_tip"
NUMBERS = {  # and what stands for a missing one
    "trip_miles": 0.0,
    "fare": 0.0,
    "trip_seconds": 0.0,
    "pickup_latitude": 41.9,
    "pickup_longitude": -87.65,
    "dropoff_latitude": 41.9,
    "dropoff_longitude": -87.65,
}
WORDS = ("payment_type", "company")
CLASSES = {  # the number of values from 0 on; 0 stands for a missing one
    "trip_start_hour": 24,
    "trip_start_day": 8,
    "trip_start_month": 13,
    "pickup_community_area": 78,
    "dropoff_community_area": 78,
}
BATCH = 128


def run_fn(fn_args: Any) -> None:
    """Trains a model and exports it to `fn_args.serving_model_dir`.

    Args:
      fn_args: tfx.components.trainer.fn_args_utils.FnArgs; `train_steps` batches of 128 rows are trained on, and the
        AUC on `eval_files` is printed.
    """
    import keras
    import tensorflow as tf
    from tensorflow_metadata.proto.v0 import schema_pb2
    from tfx.utils import io_utils

    keras.utils.set_random_seed(0)
    schema = io_utils.parse_pbtxt_file(fn_args.schema_path, schema_pb2.Schema())
    features = feature_spec(schema)
    train = dataset(fn_args.train_files, features).cache()
    model = build_model(features, train)
    model.compile(keras.optimizers.Adam(3e-3), "binary_crossentropy", metrics=[keras.metrics.AUC(name="auc")])
    shuffled = train.unbatch().shuffle(10_000, seed=0).batch(BATCH).repeat()
    model.fit(shuffled, steps_per_epoch=fn_args.train_steps, verbose=0)
    rows = dataset(fn_args.eval_files, features).take(fn_args.eval_steps or -1)
    print(f"AUC on the eval split: {model.evaluate(rows, verbose=0)[1]:.4f}")

    del features[LABEL]
    archive = keras.export.ExportArchive()
    archive.track(model)

    def serve(examples: Any) -> dict[str, Any]:
        return {"probability": model(dense(tf.io.parse_example(examples, features)))}

    archive.add_endpoint("serving_default", serve, [tf.TensorSpec([None], tf.string, name="examples")])
    archive.write_out(fn_args.serving_model_dir, verbose=False)


def feature_spec(schema: Any) -> dict[str, Any]:
    """What to parse: the label and the features of the model, all of a varying number of values.

    CsvExampleGen writes an empty cell as an empty list, which a FixedLenFeature refuses.
    """
    import tensorflow as tf
    from tensorflow_metadata.proto.v0 import schema_pb2

    types = {schema_pb2.INT: tf.int64, schema_pb2.FLOAT: tf.float32, schema_pb2.BYTES: tf.string}
    wanted = {LABEL, *NUMBERS, *WORDS, *CLASSES}
    found = {each.name: tf.io.VarLenFeature(types[each.type]) for each in schema.feature if each.name in wanted}
    if missing := wanted - found.keys():
        raise ValueError(f"taxi_trainer: the data lack the columns {', '.join(sorted(missing))}")
    return found


def dense(parsed: dict[str, Any]) -> dict[str, Any]:
    """Parsed features as (rows, 1), with something in the place of what is missing."""
    import tensorflow as tf

    columns = {}
    for name, value in parsed.items():
        one = tf.SparseTensor(value.indices, value.values, [value.dense_shape[0], 1])
        columns[name] = tf.sparse.to_dense(one, b"" if name in WORDS else tf.cast(NUMBERS.get(name, 0), value.dtype))
    return columns


def dataset(files: list[str], features: dict[str, Any]) -> Any:
    """Batches of (columns, label) from gzipped TFRecord files, which may be globs."""
    import tensorflow as tf

    def split(records: Any) -> tuple[dict[str, Any], Any]:
        columns = dense(tf.io.parse_example(records, features))
        return columns, columns.pop(LABEL)

    names = sorted(name for each in files for name in tf.io.gfile.glob(each))
    return tf.data.TFRecordDataset(names, "GZIP").batch(BATCH).map(split)


def build_model(features: dict[str, Any], train: Any) -> Any:
    """A Keras model on the columns; its means, variances and vocabularies are those of the training rows."""
    import keras

    layers, ops = keras.layers, keras.ops
    used = [*NUMBERS, *WORDS, *CLASSES]
    inputs = {name: keras.Input((1,), name=name, dtype=features[name].dtype.name) for name in used}
    numbers = layers.Normalization()
    numbers.adapt(train.map(lambda x, _: ops.concatenate([ops.cast(x[name], "float32") for name in NUMBERS], -1)))
    # Bounded, so that the longest trip does not take the range of all others where 8 bits are left.
    encoded = [ops.tanh(numbers(layers.concatenate([ops.cast(inputs[name], "float32") for name in NUMBERS])))]
    for name in WORDS:
        lookup = layers.StringLookup(output_mode="one_hot")
        lookup.adapt(train.map(lambda x, _, name=name: x[name]))
        encoded.append(lookup(inputs[name]))
    for name, count in CLASSES.items():
        known = ops.clip(ops.cast(inputs[name][:, 0], "int32"), 0, count - 1)
        encoded.append(ops.one_hot(known, count))
    x = layers.concatenate(encoded)
    for units in (64, 32):
        x = layers.BatchNormalization(momentum=0.9)(layers.Dense(units, activation="relu")(x))
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))
