"""Inputs for the benchmarks' models: seeded numbers in each model's range, real records where it parses tf.Example."""

from __future__ import annotations

import csv
import itertools

import numpy as np

from benchmarks.models import REPOSITORY, SEED, input_range, picture

DATA = REPOSITORY.parent / "shared" / "data"


def taxi_records(split: str = "Split-eval", limit: int | None = None) -> list[bytes]:
    """Returns the serialized tf.Examples of the Chicago taxi data, as they lie in its TFRecords."""
    import tensorflow as tf

    files = sorted(str(x) for x in (DATA / "chicago-taxi" / "tfexamples" / split).iterdir())
    compression = "GZIP" if files[0].endswith(".gz") else ""
    records = tf.data.TFRecordDataset(files, compression_type=compression).as_numpy_iterator()
    return list(itertools.islice(records, limit))


def penguin_records(limit: int | None = None) -> list[bytes]:
    """Returns the penguins' rows as serialized tf.Examples, the model's input."""
    import tensorflow as tf

    def feature(text):
        return tf.train.Feature(float_list=tf.train.FloatList(value=[float(text)]))

    with (DATA / "penguins" / "penguins_processed.csv").open() as file:
        rows = list(itertools.islice(csv.DictReader(file), limit))
    examples = [{key: feature(value) for key, value in row.items() if key != "species"} for row in rows]
    return [
        tf.train.Example(features=tf.train.Features(feature=x)).SerializeToString(deterministic=True) for x in examples
    ]


def draw(name: str, inputs: dict, rows: int, seed: int = SEED) -> dict[str, np.ndarray]:
    """Returns one batch for a signature of model `name`.

    Args:
        name: a name of benchmarks.models; it decides the numbers' range and what a string input holds.
        inputs: input name -> TensorInfo of the SavedModel's signature.
        rows: the size of every unknown first dimension; other unknown dimensions become 1.
        seed: for the random numbers.
    """
    import tensorflow as tf

    rng = np.random.default_rng(seed)
    low, high = input_range(name)
    batch = {}
    for key, info in sorted(inputs.items()):
        sizes = [d.size for d in info.tensor_shape.dim]
        shape = [size if size >= 0 else rows if axis == 0 else 1 for axis, size in enumerate(sizes)]
        dtype = tf.dtypes.as_dtype(info.dtype)
        if dtype == tf.string:
            records = penguin_records(rows) if name == "tfx-penguin" else taxi_records(limit=rows)
            batch[key] = np.array(records, dtype=object)
        elif dtype.is_floating:
            batch[key] = picture(rng, shape, low, high).astype(dtype.as_numpy_dtype)
        else:
            batch[key] = rng.integers(0, 1000, shape).astype(dtype.as_numpy_dtype)
    return batch
