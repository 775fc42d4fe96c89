"""What the serving benchmark serves: models as they are and as tfopt makes them, and the same requests for both."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.models import CACHE, SEED, all_models
from benchmarks.samples import penguin_records, picture, taxi_records

HERE = CACHE.parent / "serving"
USER = {"user_stats": (32, np.float32), "user_history": (50, np.int64), "user_id": (1, np.int64)}
ITEM = {"item_stats": (16, np.float32), "item_id": (1, np.int64)}
IDS = 60_000
CANDIDATES = 200


@dataclasses.dataclass(frozen=True)
class Side:
    """One of two forms of a model.

    Attributes:
      base: the folder that holds the version directory.
      signature: which is asked.
      steps: how its inputs are made of the rows; none where it takes them as they are.
    """

    base: Path
    signature: str
    steps: tuple = ()

    def inputs(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs of one request."""
        from tfopt.serving.encode import encode

        return encode(self.steps, rows)


def original(name: str, signature: str) -> Side:
    """The model as it is, under a version directory."""
    base = HERE / name / "original"
    if not (base / "1").exists():
        shutil.copytree(ranking() if name.startswith("ranking") else all_models([name])[name], base / "1")
    return Side(base, signature)


def optimized(name: str, signature: str, recipe: str = "lossless", data: Path | None = None, **options) -> Side:
    """The model as tfopt-optimize writes it."""
    from tfopt.optimize import Options, optimize
    from tfopt.serving.client_stub import client_steps

    base = HERE / name / recipe
    if not (base / "report.json").exists():
        source = original(name, signature).base / "1"
        chosen = Options(
            recipe=recipe,
            tflite=(),
            representative_data=None if data is None else str(data),
            measure_latency=False,
            overwrite=True,
            **options,
        )
        result = optimize(source, base, chosen)
        assert not result.failed, result.report.table()
    steps = client_steps(base / "serving" / "1", signature)
    return Side(base / "serving", signature, tuple(steps))


def records_file(name: str, records: list[bytes]) -> Path:
    """Writes tf.Examples where tfopt-optimize can read them."""
    import tensorflow as tf

    path = HERE / f"{name}.tfrecord"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tf.io.TFRecordWriter(str(path)) as writer:
            for record in records:
                writer.write(record)
    return path


def example_model(name: str) -> tuple[Side, Side, list[bytes], str]:
    """A TFX model by tf.Examples, by its compact signature, all real examples, and the input that takes them."""
    if name == "tfx-penguin":
        records, signature, key = penguin_records(), "serving_default", "examples"
    else:
        records = [r for split in ("Split-train", "Split-eval") for r in taxi_records(split)]
        signature, key = "predict", "examples"
    data = records_file(name, records[:200])
    return original(name, signature), optimized(name, signature, "compact_signature", data), records, key


def pages(records: list[bytes], key: str, rows: int) -> list[dict[str, np.ndarray]]:
    """Requests of so many examples each; a rest is left out."""
    return [{key: np.array(records[at : at + rows], object)} for at in range(0, len(records) - rows + 1, rows)]


def pictures(name: str, count: int) -> list[dict[str, np.ndarray]]:
    """Requests of one random input each."""
    rng = np.random.default_rng(SEED)
    shape = {"kws-ds-cnn": (1, 49, 10, 1), "mobilenet_v2": (1, 224, 224, 3)}[name]
    return [{"": picture(rng, shape, -1.0, 1.0)} for _ in range(count)]


def ranking() -> Path:
    """A ranking model on tf.Examples.

    The 50 items of the user's history go through two layers each, are pooled by attention, and join the user's own
    features in a tower of three layers; an item has a layer; and three layers take both.
    """
    import tensorflow as tf

    path = HERE / "ranking" / "model"
    if path.exists():
        return path

    class Ranking(tf.Module):
        def __init__(self):
            super().__init__()
            self.count = itertools.count(1)
            self.ids = tf.Variable(self.draw(IDS, 32) * 0.3, name="ids")
            self.history = [self.dense(32, 64), self.dense(64, 32)]
            self.query = self.dense(32, 1)
            self.users = [self.dense(32 + 32 + 32, 512), self.dense(512, 256), self.dense(256, 128)]
            self.item = self.dense(16 + 32, 64)
            self.both = [self.dense(128 + 64, 128), self.dense(128, 64), self.dense(64, 1)]

        def draw(self, *shape):
            return tf.random.stateless_normal(shape, seed=(SEED, next(self.count)))

        def dense(self, inputs, outputs):
            return tf.Variable(self.draw(inputs, outputs) / inputs**0.5), tf.Variable(self.draw(outputs) * 0.1)

        @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
        def rank(self, examples):
            features = {
                name: tf.io.FixedLenFeature([size], tf.as_dtype(dtype)) for name, (size, dtype) in (USER | ITEM).items()
            }
            x = tf.io.parse_example(examples, features)
            history = tf.gather(self.ids, x["user_history"])
            for kernel, bias in self.history:
                history = tf.nn.relu(tf.tensordot(history, kernel, 1) + bias)
            attention = tf.nn.softmax(tf.tensordot(history, self.query[0], 1), axis=1)
            history = tf.reduce_sum(attention * history, axis=1)
            user = tf.concat([x["user_stats"], history, tf.gather(self.ids, x["user_id"][:, 0])], axis=1)
            for kernel, bias in self.users:
                user = tf.nn.relu(tf.matmul(user, kernel) + bias)
            item = tf.concat([x["item_stats"], tf.gather(self.ids, x["item_id"][:, 0])], axis=1)
            item = tf.nn.relu(tf.matmul(item, self.item[0]) + self.item[1])
            y = tf.concat([user, item], axis=1)
            for index, (kernel, bias) in enumerate(self.both):
                y = tf.matmul(y, kernel) + bias
                y = tf.nn.relu(y) if index < 2 else y
            return {"score": y[:, 0]}

    module = Ranking()
    tf.saved_model.save(module, str(path), signatures=module.rank)
    return path


def ranking_requests(count: int, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Requests of one user and 200 items, as tf.Examples that repeat the user."""
    import tensorflow as tf

    rng = np.random.default_rng([SEED, seed])

    def draw(size, dtype):
        return rng.normal(size=size).astype(dtype) if dtype is np.float32 else rng.integers(0, IDS, size)

    for _ in range(count):
        user = {name: draw(*kind) for name, kind in USER.items()}
        records = []
        for _ in range(CANDIDATES):
            example = tf.train.Example()
            for name, values in {**user, **{name: draw(*kind) for name, kind in ITEM.items()}}.items():
                feature = example.features.feature[name]
                if values.dtype == np.float32:
                    feature.float_list.value.extend(values)
                else:
                    feature.int64_list.value.extend(values)
            records.append(example.SerializeToString())
        yield {"examples": np.array(records, object)}
