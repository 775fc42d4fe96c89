"""What a student is trained on: which tensor of each output, and the numbers of each loss."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tfopt.errors import TfoptError
from tfopt.graph import split
from tfopt.losses import Head, distillation, heads, label_head, prepare_labels, refine
from tfopt.model import load

RANDOM = np.random.default_rng(0)
V = RANDOM.normal(size=(5, 4)).astype(np.float32)
Z = RANDOM.normal(size=(5, 4)).astype(np.float32)


def softmax(x):
    p = np.exp(x - x.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def model(tmp_path, call, width=4):
    net = tf.Module()
    net.call = tf.function(call, input_signature=[tf.TensorSpec((None, width), name="x")])
    tf.saved_model.save(net, str(tmp_path), signatures={"serving_default": net.call})
    return load(tmp_path)


def decomposed(x):
    e = tf.exp(x * 2.0)
    return e / tf.reduce_sum(e, -1, keepdims=True)


@pytest.mark.parametrize(
    ("make", "kind", "op"),
    [
        (lambda x: tf.nn.softmax(x * 2.0), "softmax", "Mul"),
        (lambda x: tf.nn.log_softmax(x * 2.0), "softmax", "Mul"),
        (lambda x: tf.reshape(tf.identity(tf.nn.softmax(x * 2.0)), [-1, 4]), "softmax", "Mul"),
        (lambda x: tf.quantization.fake_quant_with_min_max_vars(tf.nn.softmax(x * 2.0), 0.0, 1.0), "softmax", "Mul"),
        (lambda x: tf.cast(tf.nn.softmax(tf.cast(x * 2.0, tf.bfloat16)), tf.float32), "softmax", "Cast"),
        (lambda x: tf.squeeze(tf.sigmoid(tf.reduce_sum(x, 1, keepdims=True)), 1), "sigmoid", "Sum"),
        (lambda x: tf.tanh(x * 2.0), "value", "Tanh"),
        (decomposed, "value", "RealDiv"),
    ],
)
def test_the_tensor_that_the_loss_is_on(tmp_path, make, kind, op):
    loaded = model(tmp_path, lambda x: {"y": make(x)})
    (head,) = heads(loaded, "serving_default")
    assert head.kind == kind
    node = loaded.graph.nodes[split(head.ref)[0]]
    while node.op == "Identity":
        node = loaded.graph.producer(node.input[0])
    assert node.op == op


def test_several_outputs(tmp_path):
    def call(x):
        logits = x * 2.0
        return {
            **{"logits": logits, "probabilities": tf.nn.softmax(logits), "norm": tf.norm(x, axis=1)},
            **{"class": tf.argmax(x, 1), "text": tf.as_string(x)},
        }

    loaded = model(tmp_path, call)
    assert [(h.output, h.kind) for h in heads(loaded, "serving_default")] == [
        ("norm", "value"),
        ("probabilities", "softmax"),
    ]
    assert len(heads(loaded, "serving_default", every=True)) == 3


def test_no_float_output(tmp_path):
    loaded = model(tmp_path, lambda x: {"class": tf.argmax(x, 1)})
    with pytest.raises(TfoptError, match="'serving_default' has no float output to train on; its outputs are class"):
        heads(loaded, "serving_default")


def test_what_targets_tell():
    value = Head("y", "value", "y")
    assert refine(value, softmax(V)).kind == "probabilities"
    assert refine(value, V).kind == "value"
    assert refine(value, V).variance == pytest.approx(V.var(), rel=1e-5)
    assert refine(value, np.ones((3, 2), np.float32)).variance == 1


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


@pytest.mark.parametrize("t", [1.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "soft", "hard", "labels"),
    [
        (
            "softmax",
            lambda t: t**2 * kl(softmax(V / t), softmax(Z / t)),
            lambda y: -np.log(softmax(Z)[np.arange(5), y]),
            np.array([0, 3, 1, 2, 2], np.int32),
        ),
        (
            "sigmoid",
            lambda t: (
                t**2
                * sum(
                    kl(np.stack(p, -1), np.stack(q, -1)) for p, q in [_bernoulli(V[:, j], Z[:, j], t) for j in range(4)]
                )
                / 4
            ),
            lambda y: -(y * np.log(sigmoid(Z)) + (1 - y) * np.log(sigmoid(-Z))).mean(1),
            RANDOM.integers(0, 2, (5, 4)).astype(np.float32),
        ),
        (
            "value",
            lambda t: ((V - Z) ** 2).mean(1) / 2.5,
            lambda y: ((Z - y) ** 2).mean(1) / 2.5,
            RANDOM.normal(size=(5, 4)).astype(np.float32),
        ),
    ],
)
def test_numbers(kind, soft, hard, labels, t):
    head = Head("y", kind, "y", variance=2.5)
    has = np.float32([1, 0, 1, 1, 0])
    targets = {"y": V, "labels:": labels, "labelled:": has}
    targets = {name: tf.constant(value) for name, value in targets.items()}

    def loss(*args):
        return distillation(*args)({"y": tf.constant(Z)}, targets).numpy()

    np.testing.assert_allclose(loss([head], None, 0.5, t, True), soft(t), rtol=1e-4, atol=1e-6)
    mixed = soft(t) * (1 - 0.3 * has) + 0.3 * has * hard(labels)
    np.testing.assert_allclose(loss([head], head, 0.3, t, True), mixed, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(loss([head], head, 0.3, t, False), hard(labels) * has, rtol=1e-4, atol=1e-6)
    same = distillation([head], None, 0.5, t, True)({"y": tf.constant(V)}, targets)
    np.testing.assert_allclose(same, 0, atol=1e-5)


def _bernoulli(v, z, t):
    p, q = sigmoid(v / t), sigmoid(z / t)
    return (p, 1 - p), (q, 1 - q)


def test_probabilities_are_compared_as_their_logits_are():
    wanted = distillation([Head("y", "softmax", "")], None, 0.5, 2.0, True)(
        {"y": tf.constant(Z)}, {"y": tf.constant(V)}
    )
    got = distillation([Head("y", "probabilities", "")], None, 0.5, 2.0, True)(
        {"y": tf.constant(softmax(Z))}, {"y": tf.constant(softmax(V))}
    )
    np.testing.assert_allclose(got, wanted, rtol=1e-4)


def test_a_high_temperature_keeps_the_size_of_gradients():
    """At high T the gradient is that of half the squared error of centred logits over their number (Hinton, eq. 4)."""
    z = tf.Variable(Z)
    with tf.GradientTape() as tape:
        loss = distillation([Head("y", "softmax", "")], None, 0.5, 100.0, True)({"y": z}, {"y": tf.constant(V)})
    expected = (Z - Z.mean(1, keepdims=True) - V + V.mean(1, keepdims=True)) / 4
    np.testing.assert_allclose(tape.gradient(loss, z), expected, atol=0.02)


def test_outputs_add_up():
    two = [Head("a", "value", "a"), Head("b", "value", "b", variance=4.0)]
    outputs = {"a": tf.constant(Z), "b": tf.constant(Z)}
    targets = {"a": tf.constant(V), "b": tf.constant(V)}
    got = distillation(two, None, 0.5, 1.0, True)(outputs, targets)
    np.testing.assert_allclose(got, 1.25 * ((V - Z) ** 2).mean(1), rtol=1e-5)


SOFT, SIG, VAL = Head("s", "softmax", "s"), Head("g", "sigmoid", "g"), Head("v", "value", "v")
SHAPES = {"s": (6, 3), "g": (6, 1), "v": (6, 4)}
IDS = np.array([0, 1, 2, 2, 1, 0])


@pytest.mark.parametrize(
    ("found", "output", "chosen"),
    [([SOFT], None, "s"), ([SOFT, VAL], None, "s"), ([SIG, VAL], None, "g"), ([SOFT, SIG, VAL], "v", "v")],
)
def test_output_of_the_labels(found, output, chosen):
    assert label_head(found, IDS, SHAPES, output).output == chosen


@pytest.mark.parametrize(("found", "output"), [([VAL, Head("w", "value", "w")], None), ([SOFT], "t")])
def test_no_output_for_the_labels(found, output):
    with pytest.raises(TfoptError, match=r"which output do the labels belong to\? Received .*; choose from"):
        label_head(found, IDS, SHAPES, output)


def test_class_ids_make_logits_of_a_value():
    assert label_head([VAL], IDS, SHAPES, None).kind == "softmax"
    assert label_head([VAL], IDS.astype(np.float32), SHAPES, None).kind == "value"
    assert label_head([VAL], np.zeros((6, 4), int), SHAPES, None).kind == "value"


def test_labels_as_the_loss_takes_them():
    for labels in (IDS, IDS[:, None], np.eye(3)[IDS], IDS.astype(np.float64)):
        got = prepare_labels(SOFT, labels, (6, 3))
        assert got.dtype == np.int32
        assert got.tolist() == IDS.tolist()
    assert prepare_labels(SOFT, np.zeros((6, 5)), (6, 5, 3)).shape == (6, 5)  # steps of a sequence
    assert prepare_labels(SIG, IDS > 0, (6, 1)).tolist() == [[0], [1], [1], [1], [1], [0]]
    assert prepare_labels(VAL, np.ones((6, 4)), (6, 4)).dtype == np.float32


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        (SOFT, np.array([0, 1, 2, 3, 0, 0]), "from 0 to 3: wants class ids below 3"),
        (SOFT, np.array([0, 1, 2, 0.5, 0, 0]), "wants class ids"),
        (SOFT, np.zeros((6, 2)), "wants one class id per row, or one-hot rows"),
        (SIG, IDS, "from 0 to 2: wants labels from 0 to 1"),
        (VAL, IDS, "wants as many values as the output has"),
        (VAL, np.array(["a"] * 6), "wants numbers"),
    ],
)
def test_labels_that_do_not_fit(head, labels, message):
    with pytest.raises(TfoptError, match=message):
        prepare_labels(head, labels, SHAPES[head.output])
