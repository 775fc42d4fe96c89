from __future__ import annotations

import numpy as np
import pytest

from tfopt.cost import cost, graph_cost
from tfopt.errors import TfoptError


def _graph(build):
    import tensorflow as tf

    with tf.Graph().as_default() as graph:
        build(tf, tf.compat.v1.placeholder(tf.float32, [None, 8, 8, 4], "x"))
    return graph.as_graph_def()


@pytest.mark.parametrize(
    ("name", "build", "macs", "parameters"),
    [
        ("conv", lambda tf, x: tf.nn.conv2d(x, np.ones((3, 3, 4, 6), "f4"), 2, "SAME"), 16 * 6 * 36, 216),
        ("grouped", lambda tf, x: tf.nn.conv2d(x, np.ones((3, 3, 2, 6), "f4"), 1, "SAME"), 64 * 6 * 18, 108),
        (
            "depthwise",
            lambda tf, x: tf.nn.depthwise_conv2d(x, np.ones((3, 3, 4, 2), "f4"), [1, 1, 1, 1], "VALID"),
            36 * 8 * 9,
            72,
        ),
        (
            "transposed",
            lambda tf, x: tf.nn.conv2d_transpose(x, np.ones((3, 3, 5, 4), "f4"), [1, 16, 16, 5], 2, "SAME"),
            64 * 4 * 45,
            180,
        ),
        ("matmul", lambda tf, x: tf.matmul(tf.reshape(x, [-1, 256]), np.ones((256, 10), "f4")), 2560, 2560),
        (
            "transposed a",
            lambda tf, x: tf.matmul(np.ones((3, 4), "f4"), np.ones((3, 5), "f4"), transpose_a=True),
            60,
            27,
        ),
        ("batch matmul", lambda tf, x: tf.matmul(x, x, transpose_b=True), 8 * 8 * 8 * 4, 0),
        ("einsum", lambda tf, x: tf.einsum("...wc,cd->...wd", x, np.ones((4, 7), "f4")), 64 * 28, 28),
        ("elementwise", lambda tf, x: x * np.arange(4, dtype="f4"), 0, 4),
    ],
)
def test_flops_are_twice_the_multiply_accumulates(name, build, macs, parameters):
    counted = graph_cost(_graph(build))
    assert (counted.flops, counted.parameters) == (2 * macs, parameters)


def test_weights_may_be_placeholders_and_only_what_the_outputs_need_counts():
    def build(tf, x):
        w = tf.compat.v1.placeholder(tf.float32, [256, 10], "w")
        tf.matmul(tf.reshape(x, [-1, 256]), w, name="y")
        tf.matmul(tf.reshape(x, [-1, 256]), np.ones((256, 99), "f4"), name="other")

    counted = graph_cost(_graph(build), outputs=["y:0"], weights={"w"})
    assert (counted.flops, counted.parameters) == (2 * 2560, 2560)


def test_an_unknown_shape_gives_no_number_and_says_where():
    def build(tf, x):
        tf.matmul(tf.compat.v1.placeholder(tf.float32, [None, None], "z"), np.ones((4, 5), "f4"), name="loose")

    counted = graph_cost(_graph(build))
    assert (counted.flops, counted.parameters) == (None, 20)
    assert "loose" in counted.notes[0]


def test_a_saved_model_with_functions_and_variables(plain_module, keras3_convnet):
    assert cost(plain_module, "score").flops == 2 * 12
    assert cost(plain_module, "score").parameters == 12
    macs = 64 * 8 * 9 + 64 * 8 * 9 + 8 * 10
    assert cost(keras3_convnet).flops == 2 * macs


def test_the_same_number_in_every_format(shared):
    model = shared / "models/kws-ds-cnn"
    paths = [model / name for name in ("saved_model", "kws_ref_model.tflite", "kws_ref_model_float32.tflite")]
    assert [cost(path).flops for path in paths] == [5313536] * 3
    assert [cost(path).parameters for path in paths[1:]] == [22604] * 2


def test_what_cannot_be_counted_ends_in_one_line(plain_module, tmp_path):
    (tmp_path / "x.tflite").write_bytes(b"no flatbuffer")
    for path, signature in ((plain_module, "none"), (tmp_path / "x.tflite", "serving_default"), (tmp_path, "a")):
        with pytest.raises(TfoptError) as raised:
            cost(path, signature)
        assert "\n" not in str(raised.value)
