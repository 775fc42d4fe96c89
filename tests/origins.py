"""Small SavedModels of every origin that tfopt must take, each with inputs for its signatures."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1


@dataclasses.dataclass(frozen=True)
class Origin:
    """How to write a model, and what to feed its signatures (components of sparse inputs as `name:component`)."""

    build: Callable[[Path], None]
    inputs: dict[str, dict[str, Any]]
    calls: int = 1


ORIGINS: dict[str, Origin] = {}


def origin(calls: int = 1, **inputs: dict[str, Any]) -> Callable:
    def register(build: Callable[[Path], None]) -> Callable[[Path], None]:
        ORIGINS[build.__name__] = Origin(build, inputs, calls)
        return build

    return register


def rows(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@contextlib.contextmanager
def control_flow_v1() -> Iterator[None]:
    """Makes tf.cond and tf.while_loop write Switch and Merge, as TensorFlow 1 did."""
    v1.disable_control_flow_v2()
    try:
        yield
    finally:
        v1.enable_control_flow_v2()


def save_tf1(
    path: Path,
    session: Any,
    signatures: dict[str, tuple[dict, dict]],
    *,
    method: str = "tensorflow/serving/predict",
    main_op: Any = None,
    tags: tuple[str, ...] = ("serve",),
) -> None:
    """Writes the session's graph and variables with signatures of (inputs, outputs)."""
    builder = v1.saved_model.Builder(str(path))
    info = v1.saved_model.build_tensor_info
    signature_def_map = {
        name: v1.saved_model.build_signature_def(
            {k: info(t) for k, t in inputs.items()}, {k: info(t) for k, t in outputs.items()}, method
        )
        for name, (inputs, outputs) in signatures.items()
    }
    variables = v1.global_variables()
    builder.add_meta_graph_and_variables(
        session,
        list(tags),
        signature_def_map,
        main_op=main_op,
        saver=v1.train.Saver(variables) if variables else None,
        assets_collection=v1.get_collection(v1.GraphKeys.ASSET_FILEPATHS),
        strip_default_attrs=True,
    )
    builder.save()


def save_module(path: Path, module: tf.Module, *names: str) -> None:
    tf.saved_model.save(module, str(path), signatures={name: getattr(module, name) for name in names})


def spec(*shape: int | None, dtype: Any = tf.float32, name: str = "x") -> tf.TensorSpec:
    return tf.TensorSpec(shape, dtype, name=name)


@origin(score={"x": rows(3, 4)}, double={"x": rows(2, 4)})
def shared_weights(path: Path) -> None:
    class Shared(tf.Module):
        def __init__(self):
            super().__init__()
            self.kernel = tf.Variable(rows(4, 600, seed=1), name="kernel")

        @tf.function(input_signature=[spec(None, 4)])
        def score(self, x):
            return {"score": tf.nn.relu(x @ self.kernel)}

        @tf.function(input_signature=[spec(None, 4)])
        def double(self, x):
            return {"double": 2.0 * (x @ self.kernel)}

    save_module(path, Shared(), "score", "double")


def _keras3():
    import keras

    keras.utils.set_random_seed(7)
    layers = keras.layers
    inputs = keras.Input((8, 8, 1), name="image")
    y = layers.Conv2D(8, 3, padding="same", use_bias=False)(inputs)
    y = layers.BatchNormalization()(y)
    y = layers.Dropout(0.2)(layers.ReLU()(y))
    y = layers.GaussianNoise(0.1)(y)
    y = layers.Dense(10, activation="softmax")(layers.Flatten()(y))
    model = keras.Model(inputs, y)
    from tests.conftest import randomise_batch_norms

    randomise_batch_norms(model)
    return model


@origin(serving_default={"image": rows(3, 8, 8, 1)}, serve={"image": rows(2, 8, 8, 1)})
def keras3_export(path: Path) -> None:
    _keras3().export(path, verbose=False)


@origin(serving_default={"inputs": rows(3, 8)})
def keras3_saved_by_tf(path: Path) -> None:
    import keras

    keras.utils.clear_session()
    keras.utils.set_random_seed(8)
    tf.saved_model.save(
        keras.Sequential([keras.Input((8,)), keras.layers.Dense(300), keras.layers.Dense(3)]), str(path)
    )


@origin(serving_default={"x": rows(3, 4)})
def tf1_ref_variables(path: Path) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "x")
        w = v1.get_variable("w", initializer=rows(4, 300, seed=2), use_resource=False)
        b = v1.get_variable("b", initializer=rows(300, seed=3), use_resource=False)
        step = v1.train.get_or_create_global_step()
        y = tf.matmul(x, w) + b
        v1.train.MomentumOptimizer(0.1, 0.9).minimize(tf.reduce_mean(y**2), step)
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"x": x}, {"y": y, "b": b})})


@origin(serving_default={"x": rows(3, 40)})
def tf1_partitioned_variables(path: Path) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 40], "x")
        w = v1.get_variable("w", (40, 50), partitioner=v1.fixed_size_partitioner(3), use_resource=False)
        y = tf.matmul(x, tf.convert_to_tensor(w))
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"x": x}, {"y": y})})


@origin(
    classify={"words": np.array([b"ja", b"nein", b"unknown"], object)},
    serving_default={"words": np.array([b"nein"], object)},
)
def tf1_tables_and_assets(path: Path) -> None:
    words = path.parent / f"{path.name}-vocabulary.txt"
    words.write_text("ja\nnein\nvielleicht\n")
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.string, [None], "words")
        name = tf.constant(str(words))
        v1.add_to_collection(v1.GraphKeys.ASSET_FILEPATHS, name)
        table = tf.lookup.StaticVocabularyTable(
            tf.lookup.TextFileInitializer(
                name, tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
            ),
            num_oov_buckets=2,
        )
        ids = table.lookup(x)
        embedding = v1.get_variable("embedding", initializer=rows(5, 3, seed=5))
        vectors = tf.gather(embedding, ids)
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])
        save_tf1(
            path,
            session,
            {
                "classify": ({"words": x}, {"ids": ids, "words": tf.strings.upper(x)}),
                "serving_default": ({"words": x}, {"vectors": vectors}),
            },
            method="tensorflow/serving/classify",
            main_op=v1.tables_initializer(),
        )
    (path / "assets.extra").mkdir()
    (path / "assets.extra" / "tf_serving_warmup_requests").write_bytes(bytes(range(256)))
    (path / "assets.extra" / "deep").mkdir()
    (path / "assets.extra" / "deep" / "note.txt").write_text("kept")


class _Control(tf.Module):
    def __init__(self):
        super().__init__()
        self.w = tf.Variable(rows(8, 8, seed=6) / 4)
        self.big = tf.Variable(rows(40, 40, seed=7))

    @tf.function(input_signature=[spec(None, 8)])
    def cond(self, x):
        return {
            "y": tf.cond(tf.reduce_sum(x) > 0, lambda: tf.identity(x @ self.w), lambda: x + self.big[0, :8]),
            "z": tf.cond(tf.reduce_sum(x) > 1e6, lambda: tf.gather(self.big, [1, 2]), lambda: self.big[:2] * 2.0),
        }

    @tf.function(input_signature=[spec(None, 8)])
    def loop(self, x):
        def body(i, y):
            return i + 1, tf.nn.tanh(y @ self.w + tf.gather(self.big, i)[:8])

        return {"y": tf.while_loop(lambda i, y: i < 5, body, (tf.constant(0), x))[1]}

    @tf.function(input_signature=[spec(None, 8)])
    def nested(self, x):
        for i in tf.range(4):
            if i % 2 == 0:
                j = tf.constant(0)
                while tf.reduce_sum(x) < 50.0 and j < 3:
                    x = x + tf.abs(x @ self.w)
                    j += 1
            else:
                x = tf.switch_case(i % 3, [lambda x=x: x, lambda x=x: x * 2.0 + self.w[0, 0], lambda x=x: -x])
        return {"y": x}


@origin(cond={"x": rows(3, 8, seed=1)}, loop={"x": rows(3, 8)}, nested={"x": rows(2, 8)})
def control_flow(path: Path) -> None:
    save_module(path, _Control(), "cond", "loop", "nested")


@origin(cond={"x": rows(3, 8, seed=1)}, loop={"x": rows(3, 8)}, nested={"x": rows(2, 8)})
def control_flow_switch_merge(path: Path) -> None:
    with control_flow_v1(), tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 8], "x")
        w = v1.get_variable("w", initializer=rows(8, 8, seed=6) / 4, use_resource=True)
        b = v1.get_variable("b", initializer=rows(8, seed=6), use_resource=False)
        assert not v1.control_flow_v2_enabled()
        y = v1.cond(tf.reduce_sum(x) > 0, lambda: tf.identity(tf.identity(x) @ w), lambda: x + b)
        loop = v1.while_loop(
            lambda i, y: i < 5, lambda i, y: (i + 1, tf.nn.tanh(tf.stop_gradient(y @ w) + b)), (tf.constant(0), x)
        )
        nested = v1.while_loop(
            lambda i, y: i < 4,
            lambda i, y: (
                i + 1,
                v1.cond(
                    tf.equal(i % 2, 0),
                    lambda: v1.while_loop(lambda j, z: j < 3, lambda j, z: (j + 1, z + tf.abs(z @ w)), (0, y))[1],
                    lambda: tf.identity(-y),
                ),
            ),
            (0, x),
        )
        session.run(v1.global_variables_initializer())
        outputs = {"cond": y, "loop": loop[1], "nested": nested[1]}
        save_tf1(path, session, {name: ({"x": x}, {"y": result}) for name, result in outputs.items()})


@origin(serving_default={"text": np.array([b"a b c", "ünïcode und mehr".encode(), b""], object)})
def strings(path: Path) -> None:
    class Strings(tf.Module):
        def __init__(self):
            super().__init__()
            self.words = tf.Variable([b"x", b"yy", "ü".encode()])

        @tf.function(input_signature=[spec(None, dtype=tf.string, name="text")])
        def serving_default(self, text):
            return {
                "length": tf.strings.length(text),
                "joined": tf.strings.join([text, self.words[1]], separator="-"),
                "hash": tf.strings.to_hash_bucket_fast(text, 100),
            }

    save_module(path, Strings(), "serving_default")


@origin(serving_default={"x": np.array([3, 1999, 5000], np.int64)}, file={"x": np.array([b"ja", b"quatsch"], object)})
def static_tables(path: Path) -> None:
    words = path.parent / f"{path.name}-words.txt"
    words.write_text("ja\nnein\n")

    class Tables(tf.Module):
        def __init__(self):
            super().__init__()
            keys = np.arange(2000)
            self.table = tf.lookup.StaticHashTable(
                tf.lookup.KeyValueTensorInitializer(tf.constant(keys), tf.constant(keys[::-1].copy() * 3)), -1
            )
            self.file = tf.lookup.StaticHashTable(
                tf.lookup.TextFileInitializer(
                    str(words), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64,
                    tf.lookup.TextFileIndex.LINE_NUMBER,
                ),
                -1,
            )  # fmt: skip
            self.w = tf.Variable(rows(1500, seed=3))

        @tf.function(input_signature=[spec(None, dtype=tf.int64)])
        def serving_default(self, x):
            return {"y": self.table.lookup(x), "w": tf.gather(self.w, x % 1500)}

        @tf.function(input_signature=[spec(None, dtype=tf.string)])
        def lookup(self, x):
            return {"y": self.file.lookup(x)}

    module = Tables()
    tf.saved_model.save(module, str(path), {"serving_default": module.serving_default, "file": module.lookup})


@origin(serving_default={"x": np.array([b"a", b"b", b"z"], object)})
def mutable_table(path: Path) -> None:
    class Mutable(tf.Module):
        def __init__(self):
            super().__init__()
            self.table = tf.lookup.experimental.MutableHashTable(tf.string, tf.float32, -1.0)
            self.table.insert(tf.constant(["a", "b"]), tf.constant([1.5, 2.5]))

        @tf.function(input_signature=[spec(None, dtype=tf.string)])
        def serving_default(self, x):
            return {"y": self.table.lookup(x)}

    save_module(path, Mutable(), "serving_default")


@origin(calls=3, count={"x": rows(1, 4)}, peek={})
def counter(path: Path) -> None:
    class Counter(tf.Module):
        def __init__(self):
            super().__init__()
            self.total = tf.Variable(rows(1, 4, seed=5), name="w")
            self.calls = tf.Variable(7, dtype=tf.int64, name="w")
            self.w = tf.Variable(rows(4, 4, seed=6), name="w")

        @tf.function(input_signature=[spec(1, 4)])
        def count(self, x):
            self.calls.assign_add(1)
            if self.calls % 2 == 0:
                self.total.assign_add(x @ self.w)
            return {"total": self.total.read_value() + x, "calls": self.calls.read_value()}

        @tf.function(input_signature=[])
        def peek(self):
            return {"total": self.total * 2.0}

    save_module(path, Counter(), "count", "peek")


@origin(serving_default={"x": rows(3, 4)}, tail={"hidden": rows(2, 6)}, both={"x": rows(2, 4), "hidden": rows(2, 6)})
def tf1_feeds_an_intermediate_tensor(path: Path) -> None:
    with control_flow_v1(), tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "x")
        w = v1.get_variable("w", initializer=rows(4, 6, seed=6))
        hidden = tf.nn.relu(x @ w, name="hidden")
        positive = v1.cond(tf.reduce_sum(hidden) > 1, lambda: hidden * 2.0, lambda: tf.constant([[7.0]]) - hidden)
        y = v1.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, h * 1.5 + hidden), (0, positive))[1]
        session.run(v1.global_variables_initializer())
        save_tf1(
            path,
            session,
            {
                "serving_default": ({"x": x}, {"y": y}),
                "tail": ({"hidden": hidden}, {"y": y}),
                "both": ({"x": x, "hidden": hidden}, {"y": tf.reduce_sum(y) + x}),
            },
        )


@origin(
    serving_default={
        "s:values": rows(3), "s:indices": np.array([[0, 1], [1, 0], [1, 4]], np.int64),
        "s:dense_shape": np.array([2, 5], np.int64),
    },
)  # fmt: skip
def tf1_sparse(path: Path) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        sparse = v1.sparse_placeholder(tf.float32, [None, 5], "s")
        w = v1.get_variable("w", initializer=rows(5, 300, seed=6))
        doubled = tf.SparseTensor(sparse.indices, sparse.values * 2.0, sparse.dense_shape)
        session.run(v1.global_variables_initializer())
        save_tf1(
            path,
            session,
            {"serving_default": ({"s": sparse}, {"y": tf.sparse.sparse_dense_matmul(sparse, w), "d": doubled})},
        )


@origin(serving_default={"r:0": rows(5), "r:1": np.array([0, 2, 2, 5], np.int64)})
def tf1_ragged(path: Path) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        ragged = v1.ragged.placeholder(tf.float32, 1, (), name="r")
        session.run(v1.global_variables_initializer())
        save_tf1(
            path,
            session,
            {
                "serving_default": (
                    {"r": ragged},
                    {"sum": tf.reduce_sum(ragged, 1), "twice": ragged.with_values(ragged.values * 2.0)},
                )
            },
        )


@origin(serving_default={"x": rows(3, 4), "i": np.array([0, 2], np.int32)})
def dtypes(path: Path) -> None:
    class Types(tf.Module):
        def __init__(self):
            super().__init__()
            self.bf16 = tf.Variable(tf.cast(rows(4, 300), tf.bfloat16))
            self.f16 = tf.Variable(rows(4, 300).astype(np.float16))
            self.f64 = tf.Variable(rows(4, 300).astype(np.float64))
            self.c64 = tf.Variable(rows(3, 500).astype(np.complex64) * (1 + 2j))
            self.i8 = tf.Variable(np.arange(3 * 500).reshape(3, 500).astype(np.int8))
            self.u16 = tf.Variable(np.arange(30).reshape(3, 10).astype(np.uint16))
            self.flag = tf.Variable(np.arange(1500) % 3 == 0)
            self.empty = tf.Variable(np.zeros((0, 7), np.float32))
            self.scalar = tf.Variable(2.5)

        @tf.function(input_signature=[spec(None, 4), spec(None, dtype=tf.int32, name="i")])
        def serving_default(self, x, i):
            return {
                "bf16": tf.cast(x, tf.bfloat16) @ self.bf16,
                "f16": tf.cast(x, tf.float16) @ self.f16,
                "f64": tf.cast(x, tf.float64) @ self.f64,
                "c64": tf.gather(self.c64, i) * tf.complex(x[0, 0], x[0, 1]),
                "i8": tf.gather(self.i8, i),
                "u16": tf.gather(self.u16, i),
                "flag": self.flag,
                "empty": tf.concat([self.empty, self.empty], 1),
                "scalar": self.scalar * x,
            }

    save_module(path, Types(), "serving_default")


@origin(**{"größe/名前": {"eingang_ä": rows(2, 3)}})
def unicode_names(path: Path) -> None:
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 3], "x")
        save_tf1(path, session, {"größe/名前": ({"eingang_ä": x}, {"ausgang ✓": x * 3.0})})


@origin(serving_default={"x": rows(2, 3)}, passed={"x": rows(2, 3)}, constant={})
def results_that_nothing_computes(path: Path) -> None:
    """An input that is a result as it is, twice; a weight and a constant that are results."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 3], "x")
        w = v1.get_variable("w", initializer=rows(40, 40, seed=9), use_resource=True)
        session.run(v1.global_variables_initializer())
        save_tf1(
            path,
            session,
            {
                "serving_default": ({"x": x}, {"same": tf.identity(x), "again": tf.identity(x), "w": w.read_value()}),
                "passed": ({"x": x}, {"x": x}),
                "constant": ({}, {"c": tf.constant(rows(50, 50, seed=1)), "s": tf.constant(b"text")}),
            },
        )


@origin(serving_default={"x": rows(4, 5, 3)})
def several_ports(path: Path) -> None:
    class Ports(tf.Module):
        @tf.function(input_signature=[spec(None, 5, 3)])
        def serving_default(self, x):
            values, indices = tf.math.top_k(x, 2)
            again, places = tf.math.top_k(x, 2)
            a, b, c = tf.split(x, 3, axis=2)
            mean, variance = tf.nn.moments(x, [0])
            unique, index = tf.unique(tf.reshape(tf.cast(x * 3.0, tf.int32), [-1]))
            return {
                "values": values, "indices": indices, "again": again, "places": places, "b": b, "ac": a - c,
                "mean": mean, "variance": variance, "unique": unique, "index": index,
            }  # fmt: skip

    save_module(path, Ports(), "serving_default")


def answers(path: Path, inputs: dict[str, dict[str, Any]], calls: int = 1, tags: Any = ("serve",)) -> dict[str, list]:
    """What a v1 session, which is what TensorFlow Serving runs, answers: signature -> outputs of successive calls."""
    from tfopt.inline import tensor_names

    results = {}
    for name, fed in inputs.items():
        with tf.Graph().as_default(), v1.Session() as session:
            signature = v1.saved_model.load(session, list(tags), str(path)).signature_def[name]
            names = [
                {f"{key}:{part}" if part else key: t for key, info in infos.items() for part, t in tensor_names(info)}
                for infos in (signature.inputs, signature.outputs)
            ]
            feeds = {names[0][key]: value for key, value in fed.items()}
            results[name] = [session.run(names[1], feeds) for _ in range(calls)]
    return results


def python_answers(path: Path, inputs: dict[str, dict[str, Any]], calls: int = 1) -> dict[str, list]:
    """The same by tf.saved_model.load; for dense inputs and outputs."""
    results = {}
    for name, fed in inputs.items():
        loaded = tf.saved_model.load(str(path))
        function = loaded.signatures[name]
        feeds = {key: tf.constant(value) for key, value in fed.items()}
        results[name] = [{k: v.numpy() for k, v in function(**feeds).items()} for _ in range(calls)]
    return results


def original_answers(name: str, path: Path) -> dict[str, list]:
    """What the original answers; a Keras 3 model that tf.saved_model.save wrote cannot be loaded in a v1 session."""
    how = python_answers if name == "keras3_saved_by_tf" else answers
    return how(path, ORIGINS[name].inputs, ORIGINS[name].calls)


def memory_answers(model: Any, inputs: dict[str, dict[str, Any]], calls: int = 1) -> dict[str, list]:
    """What a tfopt Model answers in memory, each signature from its first state."""
    from tfopt.function import Function

    results = {}
    for name, fed in inputs.items():
        with Function(model) as function:
            results[name] = [function(name, fed) for _ in range(calls)]
    return results


def assert_same(expected: dict[str, list], received: dict[str, list], bound: float = 5e-6) -> None:
    """Floats within `bound` of the output's scale (a coarser one where the dtype is), everything else equal."""
    from tfopt.verify import difference

    assert expected.keys() == received.keys()
    for name, calls in expected.items():
        for a, b in zip(calls, received[name], strict=True):
            assert a.keys() == b.keys()
            found = difference(a, b)
            assert found.broken is None, f"{name}: {found.broken}"
            fine = {k for k, v in a.items() if np.asarray(v).dtype.name in ("float32", "float64", "complex64")}
            found = difference({k: a[k] for k in fine}, {k: b[k] for k in fine})
            assert found.relative <= bound, f"{name}: {found}"


REAL_MODELS = (
    "basic-pitch/nmp",
    "dtln/saved_model",
    "kws-ds-cnn/saved_model",
    "tf-serving-testdata/saved_model_counter/00000123",
    "tf-serving-testdata/saved_model_half_plus_two_2_versions/00000124",
    "tf-serving-testdata/saved_model_half_plus_two_cpu/00000123",
    "tf-serving-testdata/saved_model_half_plus_two_tf2_cpu/00000123",
    "tfx-chicago-taxi/estimator_serving",
    "tfx-penguin",
)
