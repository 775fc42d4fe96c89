"""Small nets for the tests of quantization, each with what the TFLite int8 specification makes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from tests.origins import rows, save_tf1, v1
from tfopt import calibration, fake_quant, model, recipe
from tfopt.data import Dataset
from tfopt.function import Function
from tfopt.passes import get
from tfopt.quantization_sites import DEPTHWISE, LAST, TENSOR, Sites, sites
from tfopt.rewrite import Log

IMAGE, ROW, SEQUENCE = (None, 8, 8, 6), (None, 24), (None, 6, 16)


@dataclasses.dataclass(frozen=True)
class Net:
    """A net.

    Attributes:
      shape: of its input.
      compute: from the input.
      weights: (op, layout) of those that become integers, in any order.
      activations: ops whose results have a range.
      tied: ops of each group with one range.
      left: ops that stay in float.
      kernels: of the int8 file, beside RESHAPE, QUANTIZE, DEQUANTIZE and their kin; None: not checked.
    """

    shape: tuple[int | None, ...]
    compute: Callable
    weights: list[tuple[str, str]]
    activations: list[str]
    tied: list[list[str]] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)
    kernels: list[str] | None = None


def w(*shape: int, seed: int = 1) -> tf.Tensor:
    return tf.constant(rows(*shape, seed=seed) / np.float32(np.sqrt(max(1, np.prod(shape[:-1])))))


def conv(x, *shape, seed=1):
    return tf.nn.conv2d(x, w(*shape, seed=seed), 1, "SAME")


def with_itself(x):
    h = tf.nn.relu(conv(x, 3, 3, 6, 6))
    return tf.nn.relu(h + conv(h, 1, 1, 6, 6))


def gelu(approximate):
    return lambda x: tf.nn.gelu(x @ w(24, 8), approximate=approximate) @ w(8, 6)


def gelu_erfc(x):
    h = x @ w(24, 8)
    return 0.5 * h * tf.math.erfc(-h * np.float32(np.sqrt(0.5))) @ w(8, 6)


def hard_swish(x):
    h = x @ w(24, 8)
    return h * tf.nn.relu6(h + 3.0) * (1 / 6) @ w(8, 6)


def layer_norm(x):
    h = x @ w(16, 16)
    mean = tf.reduce_mean(h, -1, keepdims=True)
    variance = tf.reduce_mean(tf.math.squared_difference(h, mean), -1, keepdims=True)
    return ((h - mean) * tf.math.rsqrt(variance + 1e-5) * w(16, seed=5) + w(16, seed=6)) @ w(16, 8)


def attention(x):
    q, k, v = (x @ w(16, 16, seed=seed) for seed in (1, 2, 3))
    return x + tf.nn.softmax(tf.matmul(q, k, transpose_b=True) * 0.25) @ v @ w(16, 16, seed=4)


def split(x):
    a, b, c = tf.split(x @ w(24, 24), 3, -1)
    return tf.nn.relu(a * b) @ w(8, 6) + c @ w(8, 6, seed=2)


def loop(x):
    kernel = v1.get_variable("loop", initializer=rows(40, 40) / 7)
    return tf.while_loop(lambda i, h: i < 3, lambda i, h: (i + 1, tf.tanh(h @ kernel)), (0, x @ w(24, 40)))[1]


CONV, DENSE = ("Conv2D", LAST), ("MatMul", LAST)
PRODUCT = ("BatchMatMulV2", LAST)
NORM = ["AddV2", "Mean", "Mean", "Mul", "Mul", "Rsqrt", "SquaredDifference", "Sub"]
NETS = {
    "conv bias relu": Net(
        IMAGE,
        lambda x: tf.nn.relu(conv(x, 3, 3, 6, 8) + w(8)) @ w(8, 4),
        [CONV, PRODUCT],
        ["Placeholder", "Relu", "BatchMatMulV2"],
        kernels=["CONV_2D", "CONV_2D"],
    ),
    "depthwise": Net(
        IMAGE,
        lambda x: tf.nn.relu6(tf.nn.depthwise_conv2d(x, w(3, 3, 6, 2), [1] * 4, "SAME") + w(12)),
        [("DepthwiseConv2dNative", DEPTHWISE)],
        ["Placeholder", "Relu6"],
        kernels=["DEPTHWISE_CONV_2D"],
    ),
    "residual": Net(
        IMAGE,
        with_itself,
        [CONV, CONV],
        ["Placeholder", "Relu", "Conv2D", "Relu"],
        kernels=["ADD", "CONV_2D", "CONV_2D"],
    ),
    "concat and pools": Net(
        IMAGE,
        lambda x: tf.concat(
            [tf.nn.relu(conv(x, 3, 3, 6, 4)), tf.nn.max_pool2d(x, 3, 1, "SAME"), tf.nn.avg_pool2d(x, 3, 1, "SAME")], -1
        ),
        [CONV],
        ["Placeholder", "Relu", "AvgPool", "ConcatV2"],
        [["AvgPool", "ConcatV2", "Placeholder", "Relu"]],
        kernels=["AVERAGE_POOL_2D", "CONCATENATION", "CONV_2D", "MAX_POOL_2D"],
    ),
    "max pool behind relu": Net(
        IMAGE,
        lambda x: tf.nn.max_pool2d(tf.nn.relu(conv(x, 3, 3, 6, 4) + w(4)), 2, 2, "SAME") @ w(4, 8),
        [CONV, PRODUCT],
        ["Placeholder", "Relu", "BatchMatMulV2"],
        kernels=["CONV_2D", "CONV_2D", "MAX_POOL_2D"],
    ),
    "fixed ranges": Net(
        ROW,
        lambda x: tf.nn.softmax(tf.sigmoid(x @ w(24, 8)) @ w(8, 8)) @ w(8, 6) + tf.tanh(x @ w(24, 6, seed=2)),
        [DENSE] * 4,
        ["Placeholder", *["MatMul"] * 4, "Tanh", "Sigmoid", "Softmax", "AddV2"],
        kernels=["ADD", *["CONV_2D"] * 4, "LOGISTIC", "SOFTMAX", "TANH"],
    ),
    "last softmax": Net(
        ROW, lambda x: tf.nn.softmax(x @ w(24, 8) + w(8)), [DENSE], ["Placeholder", "BiasAdd"], left=["Softmax"]
    ),
    **{
        f"gelu, {name}": Net(
            ROW,
            compute,
            [DENSE, DENSE],
            ["Placeholder", "MatMul", "Mul", "MatMul"],
            kernels=["CONV_2D", "CONV_2D", "GELU"],
        )
        for name, compute in {"erf": gelu(False), "tanh": gelu(True), "erfc": gelu_erfc}.items()
    },
    "hard swish": Net(
        ROW,
        hard_swish,
        [DENSE, ("AddV2", TENSOR), ("Mul", TENSOR), DENSE],
        ["Placeholder", "MatMul", "Relu6", "Mul", "Mul", "MatMul"],
        kernels=["ADD", "CONV_2D", "CONV_2D", "MUL", "MUL"],
    ),
    "layer norm": Net(
        SEQUENCE,
        layer_norm,
        [PRODUCT, PRODUCT],
        ["Placeholder", "BatchMatMulV2", "Mul", "AddV2"],
        left=NORM,
    ),
    "attention": Net(
        SEQUENCE,
        attention,
        [PRODUCT] * 4,
        ["Placeholder", *["BatchMatMulV2"] * 6, "Softmax", "AddV2"],
        kernels=["ADD", "BATCH_MATMUL", "BATCH_MATMUL", *["CONV_2D"] * 4, "SOFTMAX"],
    ),
    "transposed convolution": Net(
        IMAGE,
        lambda x: tf.nn.relu(tf.nn.conv2d_transpose(x, w(3, 3, 5, 6), (tf.shape(x)[0], 16, 16, 5), 2, "SAME") + w(5)),
        [("Conv2DBackpropInput", TENSOR)],
        ["Placeholder", "BiasAdd", "Relu"],
        kernels=["RELU", "TRANSPOSE_CONV"],
    ),
    "input transposed": Net(
        SEQUENCE,
        lambda x: tf.transpose(x @ w(16, 8), [0, 2, 1]) @ w(6, 4),
        [PRODUCT, PRODUCT],
        ["Placeholder", "BatchMatMulV2", "BatchMatMulV2"],
        kernels=["CONV_2D", "CONV_2D", "TRANSPOSE"],
    ),
    "weight transposed": Net(
        ROW,
        lambda x: tf.nn.relu(tf.matmul(x, w(8, 24), transpose_b=True) + w(8)) @ w(8, 6),
        [("MatMul", TENSOR), DENSE],
        ["Placeholder", "Relu", "MatMul"],
        kernels=["CONV_2D", "FULLY_CONNECTED"],
    ),
    "weight of three axes": Net(
        SEQUENCE,
        lambda x: tf.matmul(tf.reshape(x, [-1, 2, 3, 16]), w(2, 16, 5)),
        [("BatchMatMulV2", TENSOR)],
        ["Placeholder", "BatchMatMulV2"],
        kernels=["BATCH_MATMUL"],
    ),
    "einsum": Net(
        SEQUENCE,
        lambda x: tf.einsum("abcd,cde->abe", tf.reshape(tf.nn.relu(x @ w(16, 16)), [-1, 6, 4, 4]), w(4, 4, 8)),
        [PRODUCT, ("Einsum", TENSOR)],
        ["Placeholder", "Relu", "Einsum"],
        kernels=["CONV_2D", "FULLY_CONNECTED"],
    ),
    "einsum in batches": Net(
        SEQUENCE,
        lambda x: tf.einsum("abcd,cde->abce", tf.reshape(tf.nn.relu(x @ w(16, 16)), [-1, 6, 4, 4]), w(4, 4, 3)),
        [PRODUCT, ("Einsum", TENSOR)],
        ["Placeholder", "Relu", "Einsum"],
        kernels=["BATCH_MATMUL", "CONV_2D", "TRANSPOSE", "TRANSPOSE"],
    ),
    "shared weights": Net(
        ROW,
        lambda x: tf.nn.relu(x @ (k := w(24, 24))) + tf.nn.relu(tf.matmul(x, k, transpose_b=True)),
        [DENSE, ("MatMul", TENSOR)],
        ["Placeholder", "Relu", "Relu", "AddV2"],
        kernels=["ADD", "CONV_2D", "FULLY_CONNECTED"],
    ),
    "scalar constants": Net(
        ROW,
        lambda x: tf.nn.relu(tf.nn.relu(x * 0.5 - 1.25) + 0.5) @ w(24, 6),
        [("AddV2", TENSOR), ("AddV2", TENSOR), DENSE],
        ["Placeholder", "Relu", "Relu", "MatMul"],
    ),
    "split": Net(
        ROW,
        split,
        [DENSE] * 3,
        ["Placeholder", *["MatMul"] * 3, "Relu", "AddV2"],
        kernels=["ADD", *["CONV_2D"] * 3, "MUL", "SPLIT"],
    ),
    "input that is an output": Net(
        ROW,
        lambda x: tf.concat([x, x @ w(24, 4)], -1),
        [DENSE],
        ["Placeholder", "MatMul", "ConcatV2"],
        [["ConcatV2", "MatMul", "Placeholder"]],
        kernels=["CONCATENATION", "CONV_2D"],
    ),
    "squeeze and excite": Net(
        IMAGE,
        lambda x: (h := tf.nn.relu(conv(x, 3, 3, 6, 8)))
        * tf.sigmoid(conv(tf.reduce_mean(h, [1, 2], keepdims=True), 1, 1, 8, 8)),
        [CONV, CONV],
        ["Placeholder", "Relu", "Mean", "Conv2D", "Sigmoid", "Mul"],
        kernels=["CONV_2D", "CONV_2D", "LOGISTIC", "MEAN", "MUL"],
    ),
    "elu": Net(
        ROW,
        lambda x: tf.nn.elu(x @ w(24, 6) + w(6)) @ w(6, 6),
        [DENSE, DENSE],
        ["Placeholder", "BiasAdd", "Elu", "MatMul"],
        left=["Elu"],
    ),
    "embedding": Net(
        SEQUENCE,
        lambda x: tf.gather(w(10, 6), tf.argmax(x, -1) % 10) @ w(6, 4),
        [("GatherV2", TENSOR), PRODUCT],
        ["Placeholder", "GatherV2", "BatchMatMulV2"],
    ),
    "loop": Net(
        ROW, loop, [DENSE, ("StatelessWhile", LAST)], ["Placeholder", "MatMul"], left=["StatelessWhile"]
    ),
}  # fmt: skip


def build(path: Path, shape: tuple[int | None, ...], compute: Callable) -> model.Model:
    """A model of `x` and `y` that went through the lossless recipe."""
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, shape, "x")
        y = tf.identity(compute(x), "y")
        session.run(v1.global_variables_initializer())
        save_tf1(path, session, {"serving_default": ({"x": x}, {"y": y})})
    return lossless(path)


def lossless(path: Path) -> model.Model:
    loaded = model.load(path)
    for name, options in recipe.read("lossless").steps:
        get(name).run(loaded, Log(), **options)
    return loaded


def data(shape: tuple[int | None, ...], count: int = 32, seed: int = 0) -> Dataset:
    return Dataset({"x": rows(count, *(size or 1 for size in shape[1:]), seed=seed)}, None, "rows")


def quantized(net: model.Model, given: Dataset, bits: int = 8, where: Sites | None = None) -> model.Model:
    """A copy with fake-quant ops, by extremes."""
    where = where or sites(net)
    refs = [ref for ref, fixed in where.activations.items() if fixed is None]
    made = net.copy()
    ranges = calibration.ranges(net, "serving_default", refs, given)
    fake_quant.insert(made, where, ranges, bits, "max" if bits == 8 else "mse")
    made.check()
    return made


def answers(net: model.Model, given: Dataset, signature: str = "serving_default") -> np.ndarray:
    with Function(net) as function:
        return next(iter(function(signature, given.inputs).values()))


def snr(wanted: np.ndarray, received: np.ndarray) -> float:
    """Signal to noise, in dB."""
    noise = np.sum((wanted.astype(np.float64) - received) ** 2)
    return float(10 * np.log10(np.sum(wanted.astype(np.float64) ** 2) / max(noise, 1e-30)))
