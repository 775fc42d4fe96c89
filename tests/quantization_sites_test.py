"""What the TFLite int8 specification quantizes is found, op by op, in nets of every kind."""

from __future__ import annotations

from collections import Counter

import pytest
import tensorflow as tf

from tests.origins import rows, save_module, spec
from tests.quantized_nets import IMAGE, NETS, ROW, build, data, lossless, quantized, w
from tfopt.fake_quant import insert
from tfopt.quantization_sites import FIXED, sites


@pytest.mark.parametrize("name", NETS)
def test_what_is_quantized(name, tmp_path):
    net = NETS[name]
    model = build(tmp_path / "m", net.shape, net.compute)
    nodes = [node.SerializeToString() for node in model.graph.nodes.values()]
    where = sites(model)

    def ops(refs):
        return sorted(model.graph.producer(ref).op for ref in refs)

    assert sorted((model.graph.nodes[each.node].op, each.layout) for each in where.weights) == sorted(net.weights)
    assert ops(where.activations) == sorted(net.activations)
    assert sorted(map(ops, where.tied)) == net.tied
    assert ops(where.left) == sorted(net.left)
    for ref, limits in where.activations.items():
        assert limits == FIXED.get(model.graph.producer(ref).op)
    assert nodes == [node.SerializeToString() for node in model.graph.nodes.values()]  # nothing is changed


def test_every_reason_is_given(tmp_path):
    reasons = {
        "last softmax": "the last softmax is exact and faster in float",
        "layer norm": "part of a layer norm, whose variance spans too many magnitudes for 8 bits",
        "elu": "Elu has no int8 kernel that tfopt uses",
        "loop": "StatelessWhile computes in float; the matrices that it reads have fewer bits",
    }
    assert reasons.keys() == {name for name, net in NETS.items() if net.left}
    for name, reason in reasons.items():
        found = sites(build(tmp_path / name, NETS[name].shape, NETS[name].compute)).left
        assert set(found.values()) == {reason}


def test_the_last_softmax_is_quantized_where_results_are_integers(tmp_path):
    model = build(tmp_path / "m", NETS["last softmax"].shape, NETS["last softmax"].compute)
    where = sites(model, integer_outputs=True)
    assert not where.left
    assert [limits for ref, limits in where.activations.items() if model.graph.producer(ref).op == "Softmax"] == [
        (0.0, 255 / 256)
    ]


@pytest.mark.parametrize(
    ("name", "op", "low"),
    [
        ("transposed convolution", "Conv2DBackpropInput", False),
        ("weight of three axes", "BatchMatMulV2", False),
        ("einsum in batches", "Einsum", False),
        ("einsum", "Einsum", True),
        ("depthwise", "DepthwiseConv2dNative", True),
        ("weight transposed", "MatMul", True),
    ],
)
def test_weights_have_4_bits_where_a_kernel_takes_them(name, op, low, tmp_path):
    model = build(tmp_path / "m", NETS[name].shape, NETS[name].compute)
    made = quantized(model, data(NETS[name].shape), bits=4)
    (weight,) = [each for each in sites(model).weights if model.graph.nodes[each.node].op == op][:1]
    assert weight.low == low
    node = made.graph.producer(made.graph.nodes[weight.node].input[weight.index])
    if node.op == "Reshape":
        node = made.graph.producer(node.input[0])
    assert node.attr["num_bits"].i == (4 if low else 8) and node.attr["narrow_range"].b


class Two(tf.Module):
    """Two signatures with inputs of their own, and a kernel in common."""

    def __init__(self):
        super().__init__()
        self.kernel = tf.Variable(rows(24, 48))

    @tf.function(input_signature=[spec(None, 24)])
    def score(self, x):
        return {"score": tf.nn.relu(x @ self.kernel)}

    @tf.function(input_signature=[spec(None, 24), spec(None, 48, name="z")])
    def both(self, x, z):
        return {"both": tf.concat([x @ self.kernel, z], -1), "z": z}


def test_several_signatures(tmp_path):
    save_module(tmp_path / "m", Two(), "score", "both")
    model = lossless(tmp_path / "m")
    where = sites(model)
    ops = Counter(model.graph.producer(ref).op for ref in where.activations)
    assert ops == {"Placeholder": 2, "Relu": 1, "MatMul": 1, "ConcatV2": 1}
    assert len(where.weights) == 1  # both read the same product of the same input
    made = model.copy()
    insert(made, where, dict.fromkeys(where.activations, (-1.0, 1.0)))
    made.check()
    kernels = [node.name for node in made.graph.nodes.values() if node.op.endswith("PerChannel")]
    assert len(kernels) == 1  # what is shared stays shared
    assert {made.graph.producer(ref).op for ref in made.graph.outputs.values()} == {"FakeQuantWithMinMaxVars"}


def test_channels_first(tmp_path):
    """No kernel for devices reads them: the axes of weights are the same, and results are right."""

    def compute(x):
        y = tf.nn.conv2d(tf.transpose(x, [0, 3, 1, 2]), w(3, 3, 6, 8), 1, "SAME", data_format="NCHW")
        return tf.transpose(tf.nn.relu(tf.nn.bias_add(y, w(8), data_format="NCHW")), [0, 2, 3, 1])

    model = build(tmp_path / "m", IMAGE, compute)
    where = sites(model)
    assert [each.layout for each in where.weights] == ["last axis"]
    assert sorted(model.graph.producer(ref).op for ref in where.activations) == ["Placeholder", "Relu"]
    insert(model, where, dict.fromkeys(where.activations, (-1.0, 1.0)))
    model.check()


def test_a_group_with_a_fixed_range_keeps_it(tmp_path):
    model = build(tmp_path / "m", ROW, lambda x: tf.stack([x @ w(24, 6), tf.sigmoid(x @ w(24, 6, seed=2))], 1))
    where = sites(model)
    by_op = {model.graph.producer(ref).op: limits for ref, limits in where.activations.items()}
    assert by_op["Sigmoid"] == (0.0, 255 / 256)
    assert [sorted(model.graph.producer(ref).op for ref in group) for group in where.tied] == [["MatMul", "Pack"]]
