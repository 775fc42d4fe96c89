"""broadcast_inputs: one row for what all rows share gives what N equal rows gave, whatever the graph does with it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import control_flow_v1, save_tf1
from tfopt.errors import TfoptError
from tfopt.function import Function
from tfopt.model import Model, load
from tfopt.passes import broadcast_inputs, compact_signature, fold_constants
from tfopt.rewrite import Log
from tfopt.serving.encode import encode
from tfopt.verify import difference

_RANDOM = np.random.default_rng(5)


def _weight(*shape: int) -> tf.Tensor:
    return tf.constant(_RANDOM.normal(size=shape).astype(np.float32) / 2)


TABLE, U, W, BIAS, HEAD = _weight(90, 4), _weight(4, 4), _weight(16, 8), _weight(8), _weight(8, 1)
TRANSPOSED = tf.constant(W.numpy().T)
ROWS = {
    "user_x": _RANDOM.normal(size=(1, 4)).astype(np.float32),
    "user_seq": _RANDOM.normal(size=(1, 5, 4)).astype(np.float32),
    "user_ids": _RANDOM.integers(0, 90, (1, 5)),
    "user_age": _RANDOM.normal(size=1).astype(np.float32),
    "user_word": np.array([b"ja"], object),
    "c": _RANDOM.normal(size=(7, 4)).astype(np.float32),
    "c_id": _RANDOM.integers(0, 90, 7),
    "c_word": np.array([b"a", b"ja", b"b", b"c", b"ja", b"", b"x"], object),
}
DTYPES = {"user_ids": tf.int64, "c_id": tf.int64, "user_word": tf.string, "c_word": tf.string}

CASES: dict[str, tuple[Callable[..., object], int | None]] = {}


def case(repeats: int | None = None) -> Callable:
    """Registers a graph; `repeats` is how often rows may be repeated, None for as often as it takes."""

    def register(function: Callable[..., object]) -> Callable[..., object]:
        CASES[function.__name__] = (function, repeats)
        return function

    return register


@case(repeats=0)
def ranking(user_x, user_ids, c, c_id):
    user, history = tf.nn.relu(user_x @ U), tf.reduce_mean(tf.gather(TABLE, user_ids), 1)
    features = tf.concat([user, c, history, tf.gather(TABLE, c_id)], -1)
    hidden = tf.nn.relu(tf.nn.bias_add(features @ W, BIAS))
    return tf.sigmoid(hidden @ HEAD), tf.reduce_sum(history * tf.gather(TABLE, c_id), -1)


@case(repeats=0)
def normalised_concatenation(user_x, c, c_id):
    inner = tf.concat([c, user_x], 1) * tf.constant(np.arange(1, 9, dtype=np.float32)) - 1.0
    features = tf.nn.elu(tf.concat([inner, user_x, tf.gather(TABLE, c_id)], 1))
    return tf.linalg.matmul(features, TRANSPOSED, transpose_b=True) + BIAS[None]


@case(repeats=1)
def concatenation_is_needed_whole_too(user_x, c):
    features = tf.concat([user_x, c], 1)
    return features, features @ W[:8]


@case(repeats=0)
def dense_on_sequences(user_seq, c):
    batch = tf.shape(user_seq)[0]
    hidden = tf.reshape(tf.reshape(user_seq, [-1, 4]) @ U, tf.stack([batch, 5, 4]))
    return tf.reduce_max(hidden, 1) + c, tf.reshape(hidden, [-1, 20])[:, :4] * c


@case(repeats=0)
def rows_counted_by_the_user(user_x, c):
    count = tf.shape(user_x)[0]
    return tf.reshape(c, [count, 2, 2]), tf.zeros([count, 3]) + c[:, :3], tf.cast(count, tf.float32) * c


@case(repeats=0)
def rows_counted_by_the_candidates(user_x, c):
    count = tf.shape(c)[0]
    return tf.reshape(user_x, [count, 2, 2])[:, 0] + c[:, :2], tf.broadcast_to(user_x, [count, 4]) - c


@case()
def across_rows(user_x, user_age, c):
    return (
        c - tf.reduce_mean(user_x, 0),
        tf.cumsum(user_x, 0) + c,
        tf.nn.softmax(user_x, 0) * c,
        tf.reduce_sum(user_age) * c,
        tf.reverse(user_x, [0]) + c,
        tf.nn.softmax(user_age),
    )


@case()
def pairs(user_x, user_age, c):
    return (
        tf.matmul(user_x, c, transpose_b=True),
        tf.matmul(user_x, c, transpose_b=True) + user_age,
        tf.matmul(user_x, c, transpose_a=True),
        tf.nn.relu(tf.matmul(user_x, c, transpose_b=True)) * tf.reduce_sum(c, 1),
    )


@case()
def depth_is_the_number_of_rows(user_ids, c):
    hot = tf.one_hot(user_ids[:, 0], tf.shape(c)[0])
    return hot, tf.reduce_sum(hot, 1), tf.concat([hot, c], 1)


@case(repeats=0)
def attention(user_seq, c):
    query = tf.tile(c[:, None], [1, 5, 1])
    weights = tf.nn.softmax(tf.reduce_sum(user_seq * query, -1) + tf.einsum("nsd,nd->ns", user_seq, c))
    scores = tf.matmul(user_seq, c[:, :, None])
    return tf.einsum("ns,nsd->nd", weights, user_seq), tf.squeeze(scores, 2), tf.matmul(weights[:, None], user_seq)


@case()
def attention_with_concatenation(user_seq, c):
    query = tf.repeat(c[:, None], 5, 1)
    features = tf.concat([user_seq, query, user_seq - query, user_seq * query], -1)
    return tf.reduce_sum(tf.tensordot(features, W, 1), 1)


@case()
def ranks_that_differ(user_x, user_age, c):
    return (
        user_age[:, None] * c,
        user_age + tf.reduce_sum(c, 1),
        tf.where(user_age[:, None] > 0, c, user_x),
        tf.squeeze(user_x[:, :1]) + tf.reduce_sum(c, 1),
        tf.expand_dims(user_x, 0) + c,
        tf.stack([user_age, tf.reduce_sum(c, 1)], 1) @ W[:2],
        tf.transpose(user_x) * user_age,
    )


@case()
def rows_are_picked(user_x, user_ids, c, c_id):
    return (
        tf.gather(user_x, c_id % tf.cast(tf.shape(user_x)[0], tf.int64)) + c,
        tf.gather(user_ids, [1, 0], axis=1),
        user_x[:1] + c,
        user_x[-1] * c,
        tf.slice(user_x, [0, 1], [tf.shape(c)[0], 2]) + c[:, 2:],
        tf.unique(tf.reshape(user_ids, [-1]))[0],
        tf.boolean_mask(c, user_x[:, 0] > -9),
        tf.gather(user_x, c_id % 4, axis=1),
    )


@case()
def several_results(user_x, c):
    values, indices = tf.math.top_k(user_x, 2)
    first, second = tf.split(user_x, 2, axis=1)
    rows = tf.unstack(user_x, axis=1)
    return values + c[:, :2], indices, first * second, rows[0] * rows[1], tf.split(user_x @ U, 1, axis=0)[0]


@case()
def control_flow(user_x, c):
    state = tf.while_loop(
        lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ U + user_x)), (0, tf.zeros([tf.shape(user_x)[0], 4]))
    )[1]
    chosen = tf.cond(tf.reduce_sum(user_x) > 0, lambda: user_x * 2.0, lambda: tf.identity(c))
    return state + c, chosen, tf.map_fn(lambda row: row / tf.norm(row), user_x) * c


@case(repeats=None)
def words(user_word, c_word):
    return (
        tf.strings.to_hash_bucket_fast(user_word, 50) + tf.strings.to_hash_bucket_fast(c_word, 50),
        tf.strings.join([user_word, c_word]),
        tf.equal(user_word, c_word),
        tf.strings.upper(user_word),
    )


@case()
def constants_of_rows(user_x, c):
    learned = tf.tile(TABLE[:1], [tf.shape(c)[0], 1])
    mask = tf.ones_like(user_x[:, :1])
    return tf.concat([learned, user_x, c, mask], 1) @ W[:13], learned, mask


def _specs(names: tuple[str, ...]) -> list[tf.TensorSpec]:
    return [tf.TensorSpec((None, *ROWS[n].shape[1:]), DTYPES.get(n, tf.float32), name=n) for n in names]


def _save(path, function: Callable[..., object]) -> Model:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    module = tf.Module()

    def labelled(*inputs):
        found = function(*inputs)
        results = found if isinstance(found, tuple) else (found,)
        return {f"y{number}": result for number, result in enumerate(results)}

    module.f = tf.function(labelled, input_signature=_specs(names))
    tf.saved_model.save(module, str(path), {"serving_default": module.f})
    return load(path)


def _assert_equal(model: Model, rewritten: Model, counts: tuple[int, ...] = (1, 2, 7)) -> None:
    inputs = list(model.signatures["serving_default"].inputs)
    for count in counts:
        rows = {n: np.repeat(ROWS[n], count, 0) if n.startswith("user") else ROWS[n][:count] for n in inputs}
        with Function(model) as function, Function(rewritten) as other:
            found = difference(function("serving_default", rows), other("serving_default", rows))
        assert found.broken is None and found.relative < 1e-5, f"{count} rows: {found}"


@pytest.mark.parametrize("name", CASES)
def test_it_answers_as_with_equal_rows(name, tmp_path):
    function, repeats = CASES[name]
    model = _save(tmp_path / "model", function)
    rewritten, log = model.copy(), Log()
    broadcast_inputs.run(rewritten, log, "user_*")
    rewritten.check()
    assert log.applied["input sent once"] == sum(
        n.startswith("user") for n in model.signatures["serving_default"].inputs
    )
    _assert_equal(model, rewritten)
    if repeats is not None:
        made = [node for name, node in rewritten.graph.nodes.items() if "/every_row" in name]
        assert sum(node.op in ("BroadcastTo", "Tile") for node in made) == repeats, log


def test_the_first_layer_is_split_and_its_bias_added_once(tmp_path):
    model, log = _save(tmp_path / "model", ranking), Log()
    broadcast_inputs.run(model, log, "user_*")
    assert log.applied["product split into one row and the others"] == 1
    sizes = sorted(model.graph.constant(n.input[1]).shape for n in model.graph.nodes.values() if n.op == "MatMul")
    assert sizes == [(4, 4), (8, 1), (8, 8), (8, 8)]
    hidden = next(n for n in model.graph.nodes.values() if n.op == "Relu" and "Relu_1" in n.name)
    bias = model.graph.producer(hidden.input[0])
    assert bias.op == "BiasAdd" and model.graph.producer(bias.input[0]).op == "MatMul"
    assert model.signatures["serving_default"].inputs["user_x"].tensor_shape.dim[0].size == 1
    assert model.requests == {"serving_default": [{"step": "once", "inputs": ["user_ids", "user_x"]}]}
    assert any("cannot batch" in note for note in log.notes)


def test_old_loops_and_branches_get_rows_repeated(tmp_path):
    with control_flow_v1(), tf.Graph().as_default(), tf.compat.v1.Session() as session:
        user = tf.compat.v1.placeholder(tf.float32, [None, 4], "user_x")
        c = tf.compat.v1.placeholder(tf.float32, [None, 4], "c")
        zeros = tf.zeros([tf.shape(user)[0], 4])
        loop = tf.compat.v1.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h + user)), (0, zeros))[1]
        chosen = tf.compat.v1.cond(tf.reduce_sum(user) > 0, lambda: tf.identity(user), lambda: tf.identity(c))
        outputs = {"loop": loop + c, "chosen": chosen}
        save_tf1(tmp_path / "model", session, {"serving_default": ({"user_x": user, "c": c}, outputs)})
    model = load(tmp_path / "model")
    rewritten, log = model.copy(), Log()
    broadcast_inputs.run(rewritten, log, "user_*")
    _assert_equal(model, rewritten)
    assert all("does not work row by row" in reason for reason in log.refused.values())


def test_lookups_keep_their_rows(tmp_path):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        user, c = (tf.compat.v1.placeholder(tf.string, [None], name) for name in ("user_word", "c_word"))
        initial = tf.lookup.KeyValueTensorInitializer(tf.constant(["a", "ja"]), tf.constant([0, 1], tf.int64))
        table = tf.lookup.StaticVocabularyTable(initial, 3)
        found = tf.gather(TABLE.numpy(), table.lookup(user))
        outputs = {"y": found * tf.gather(TABLE.numpy(), table.lookup(c)), "u": found}
        session.run(tf.compat.v1.tables_initializer())
        signatures = {"serving_default": ({"user_word": user, "c_word": c}, outputs)}
        save_tf1(tmp_path / "model", session, signatures, main_op=tf.compat.v1.tables_initializer())
    model = load(tmp_path / "model")
    rewritten, log = model.copy(), Log()
    broadcast_inputs.run(rewritten, log, "user_*")
    _assert_equal(model, rewritten)
    assert not log.refused and any("repeated at 1 place," in note for note in log.notes)


@pytest.mark.parametrize("sparse", ["mask", "row_splits"])
def test_features_of_examples(tmp_path, sparse):
    """A history of varying length is selected by its mask, and computed once; by row splits it is sent as before."""
    module, lengths = tf.Module(), [3, 0, 4]

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="examples")])
    def serve(examples):
        spec = {"user_x": tf.io.FixedLenFeature([4], tf.float32), "c": tf.io.FixedLenFeature([4], tf.float32)}
        parsed = tf.io.parse_example(examples, {**spec, "user_history": tf.io.VarLenFeature(tf.int64)})
        dense = tf.sparse.to_dense(parsed["user_history"], default_value=1)
        history = tf.reduce_sum(tf.gather(TABLE, dense), 1)
        return {"y": tf.concat([parsed["user_x"], history, parsed["c"]], 1) @ W[:12], "width": tf.shape(dense)}

    module.serve = serve
    tf.saved_model.save(module, str(tmp_path / "model"), {"serving_default": module.serve})
    model = load(tmp_path / "model")
    rewritten, log = model.copy(), Log()
    fold_constants.run(rewritten, Log())
    compact_signature.run(rewritten, Log(), sparse=sparse)
    broadcast_inputs.run(rewritten, log, "user_*")
    rewritten.check()
    wanted = ["user_x"] if sparse == "row_splits" else ["user_history", "user_history_mask", "user_x"]
    assert rewritten.requests["serving_default"][-1] == {"step": "once", "inputs": wanted}
    assert log.applied["product split into one row and the others"] == 1
    if sparse == "mask":
        assert not {"Where", "SparseToDense"} & {node.op for node in rewritten.graph.nodes.values()}
    else:
        assert log.refused["input sent once", "user_history"] == "its rows have different lengths"
    for length in lengths:
        user = {"user_x": _floats(ROWS["user_x"][0]), "user_history": _integers(range(5, 5 + length))}
        records = [tf.train.Features(feature={**user, "c": _floats(row)}) for row in ROWS["c"]]
        examples = np.array([tf.train.Example(features=record).SerializeToString() for record in records], object)
        with Function(model) as before, Function(rewritten) as after:
            found = difference(
                before("serving_default", {"examples": examples}), after("serving_default", {"examples": examples})
            )
        assert found.broken is None and found.relative < 1e-5, f"{length}: {found}"


def _floats(values) -> tf.train.Feature:
    return tf.train.Feature(float_list=tf.train.FloatList(value=values))


def _integers(values) -> tf.train.Feature:
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))


def test_signatures_that_share_inputs_change_together(tmp_path):
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        user, c, other = (tf.compat.v1.placeholder(tf.float32, [None, 4], name) for name in ("user_x", "c", "other"))
        signatures = {
            "serving_default": ({"user_x": user, "c": c}, {"y": user * c}),
            "again": ({"user_x": user, "c": c, "other": other}, {"y": user + c * other, "u": user}),
            "apart": ({"x": other}, {"y": other * 2.0}),
        }
        save_tf1(tmp_path / "model", session, signatures)
        signatures["apart"] = ({"user_x": user}, {"y": user * 2.0})
        save_tf1(tmp_path / "alone", session, signatures)
    model = load(tmp_path / "model")
    rewritten, log = model.copy(), Log()
    broadcast_inputs.run(rewritten, log, "user_*")
    assert set(rewritten.requests) == {"serving_default", "again"}
    _assert_equal(model, rewritten)
    rows = {"user_x": np.repeat(ROWS["user_x"], 3, 0), "c": ROWS["c"][:3], "other": ROWS["c"][3:6]}
    with Function(model) as function, Function(rewritten) as after:
        assert difference(function("again", rows), after("again", rows)).broken is None
        assert difference(function("apart", {"x": rows["c"]}), after("apart", {"x": rows["c"]})).broken is None

    alone, log = load(tmp_path / "alone"), Log()
    broadcast_inputs.run(alone, log, "user_*")
    assert not log.applied and not alone.requests
    assert "signature 'apart': all its inputs would be sent once" in next(iter(log.refused.values()))


def test_what_cannot_be_done_is_said(tmp_path):
    model, log = _save(tmp_path / "model", ranks_that_differ), Log()
    with pytest.raises(TfoptError, match=r"inputs='item_\*' fits no input; the inputs are c, user_age, user_x"):
        broadcast_inputs.run(model, Log(), "user_*,item_*")
    broadcast_inputs.run(model, log, "*")
    assert "all its inputs would be sent once" in log.refused["input sent once", "serving_default"]
    broadcast_inputs.run(model, log, "")
    assert not log.applied and not model.requests


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([1.0, np.nan, 1.0]), "input 'user_age' is sent once for all rows, but row 1 differs from row 0"),
        (np.array([[1, 2], [1, 2], [1, 3]]), "input 'user_age' is sent once for all rows, but row 2 differs"),
        (np.array([b"a", b"b"], object), "but row 1 differs"),
        (np.zeros((0, 3)), "received none"),
    ],
)
def test_the_client_refuses_rows_that_differ(values, message):
    with pytest.raises(ValueError, match=message):
        encode([{"step": "once", "inputs": ["user_age"]}], {"user_age": values, "c": np.zeros(3)})


def test_the_client_sends_one_row():
    arrays = {"user_age": np.array([np.nan, np.nan]), "user_word": np.array([b"a", b"a"], object), "c": np.arange(2)}
    sent = encode([{"step": "once", "inputs": ["user_age", "user_word"]}], arrays)
    assert {name: array.shape for name, array in sent.items()} == {"user_age": (1,), "user_word": (1,), "c": (2,)}
