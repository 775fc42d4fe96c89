"""Fake-quant ops in the graph: put in and taken out without a trace, and right to the last bit while they are there."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.quantized_nets import IMAGE, NETS, ROW, answers, build, conv, data, quantized, snr, w
from tfopt.export import saved_model
from tfopt.export.fixed_batch import fix_batch
from tfopt.fake_quant import OPS, PER_CHANNEL, PER_TENSOR, insert, is_quantized, quantized_value, strip
from tfopt.function import Function
from tfopt.graph import split
from tfopt.passes import fold_affine, fold_constants, merge_duplicates, prune_graph
from tfopt.quantization_sites import sites
from tfopt.rewrite import Log


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Name -> (model, rows), made once."""
    folder, made = tmp_path_factory.mktemp("nets"), {}

    def get(name):
        if name not in made:
            net = NETS[name]
            made[name] = build(folder / str(len(made)), net.shape, net.compute), data(net.shape)
        return made[name]

    return get


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NETS)
def test_out_again_is_as_before(nets, name, bits):
    model, rows = nets(name)
    made = quantized(model, rows, bits)
    assert is_quantized(made) and not is_quantized(model)
    wanted = answers(model, rows)
    stripped = strip(made)
    stripped.check()
    assert not is_quantized(stripped)
    np.testing.assert_array_equal(answers(stripped, rows), wanted)
    if name != "embedding":  # whose rows are chosen by an argmax
        assert snr(wanted, answers(made, rows)) > {8: 30, 4: 13}[bits]
    assert made.graph.outputs.keys() == model.graph.outputs.keys()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["conv bias relu", "depthwise", "weight transposed", "scalar constants"])
def test_weights_on_their_grid(nets, name, bits):
    model, rows = nets(name)
    made = quantized(model, rows, bits)
    snapped = strip(made, snap=True)
    for weight in sites(model).weights:
        value = snapped.graph.constant(snapped.graph.nodes[weight.node].input[weight.index])
        original = model.graph.constant(weight.ref)
        assert value.shape == original.shape and value.dtype == np.float32
        width = bits if weight.linear else 8
        if weight.linear:
            channels = value.reshape(-1, 1) if weight.layout == "tensor" else value.reshape(-1, value.shape[-1])
            if weight.layout == "depthwise":
                channels = value.reshape(value.shape[0] * value.shape[1], -1)
            for channel in channels.T:
                steps = channel / (np.abs(channel).max() / (2 ** (width - 1) - 1))
                whole = [steps * k / (2 ** (width - 1) - 1) for k in range(1, 2 ** (width - 1))]
                least = min(float(np.abs(each - np.round(each)).max()) for each in whole)
                assert least < 1e-3  # some step of a symmetric grid explains all values
        assert np.abs(value - original).max() <= np.abs(original).max() * (1.01 / (2**width - 2) if bits == 8 else 0.3)
    assert not is_quantized(snapped)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_snapped_weight_is_what_tensorflow_computes(nets, bits):
    model, rows = nets("conv bias relu")
    made = quantized(model, rows, bits)
    nodes = [node for node in made.graph.nodes.values() if node.op == PER_CHANNEL]
    assert len(nodes) == 2
    for node in nodes:
        value, low, high = (made.graph.constant(ref) for ref in node.input)
        wanted = tf.quantization.fake_quant_with_min_max_vars_per_channel(
            value, low, high, num_bits=bits, narrow_range=True
        )
        np.testing.assert_array_equal(quantized_value(made.graph, node.name), wanted)
        np.testing.assert_array_equal(low, -high)
        grid = high / (2 ** (bits - 1) - 1)
        np.testing.assert_allclose(wanted / grid, np.round(wanted / grid), atol=1e-4)


def test_what_shares_a_range_shares_its_nodes(nets):
    model, rows = nets("concat and pools")
    made = quantized(model, rows)
    (group,) = sites(model).tied
    nodes = [made.graph.nodes[f"{split(ref)[0]}/fake_quant"] for ref in group]
    assert len(nodes) == 4 and len({(node.input[1], node.input[2]) for node in nodes}) == 1
    x = rows.inputs["x"]
    low, high = (float(made.graph.constant(ref)) for ref in nodes[0].input[1:3])
    assert low <= x.min() and high >= x.max()  # the widest of them


def test_a_weight_that_two_ops_read_in_one_way_is_quantized_once(tmp_path):
    model = build(tmp_path / "m", ROW, lambda x: tf.nn.relu(x @ (k := w(24, 24))) @ k)
    made = quantized(model, data(ROW))
    assert sum(node.op == PER_CHANNEL for node in made.graph.nodes.values()) == 1


@pytest.mark.parametrize("name", ["conv bias relu", "depthwise", "split", "loop", "fixed ranges", "gelu, tanh"])
def test_nothing_folds_the_quantization_away(nets, name):
    model, rows = nets(name)
    made = quantized(model, rows, 4)

    def marks(which):
        return sorted(
            (node.op, node.attr["num_bits"].i, node.attr["narrow_range"].b)
            for node in which.graph.nodes.values()
            if node.op in OPS
        )

    wanted, before = answers(made, rows), marks(made)
    fixed = fix_batch(made, 1)
    assert marks(fixed) == before
    with Function(fixed) as function:
        one = next(iter(function("serving_default", {"x": rows.inputs["x"][:1]}).values()))
    np.testing.assert_allclose(one, wanted[:1], atol=1e-5)
    folded = made.copy()
    for technique in (prune_graph, merge_duplicates, fold_constants, fold_affine, fold_constants):
        technique.run(folded, Log())
    assert marks(folded) == before
    np.testing.assert_allclose(answers(folded, rows), wanted, atol=np.abs(wanted).max() / 100)


def test_a_sum_of_two_stays_an_addition(tmp_path):
    """TensorFlow's optimizer writes AddN, which the converter quantizes no more."""
    model = build(
        tmp_path / "m", IMAGE, lambda x: tf.nn.relu((h := tf.nn.relu(conv(x, 3, 3, 6, 6))) + (conv(h, 1, 1, 6, 6) + h))
    )
    made = fix_batch(quantized(model, data(IMAGE)), 1)
    for each in (model, made):
        assert not any(node.op == "AddN" and node.attr["N"].i == 2 for node in each.graph.nodes.values())


def test_bits_by_node_and_nodes_that_stay(nets):
    model, _ = nets("fixed ranges")
    where = sites(model)
    names = [weight.node for weight in where.weights]
    ranges = {ref: (-1.0, 1.0) for ref, fixed in where.activations.items() if fixed is None}
    made = model.copy()
    insert(made, where, ranges, {names[0]: 4}, skip=[names[1]])
    producers = [made.graph.producer(made.graph.nodes[name].input[1]) for name in names]
    assert [node.attr["num_bits"].i if node.op == PER_CHANNEL else None for node in producers] == [4, None, 8, 8]


def test_activations_without_a_range_have_none(nets):
    model, _ = nets("conv bias relu")
    made = model.copy()
    insert(made, sites(model), {})
    assert {node.op for node in made.graph.nodes.values()} & set(OPS) == {PER_CHANNEL}
    made = model.copy()
    insert(made, sites(model), dict.fromkeys(sites(model).activations, (0.0, 1.0)))
    assert sum(node.op == PER_TENSOR for node in made.graph.nodes.values()) == 3


@pytest.mark.parametrize("shape", [(), (1,)])
def test_scalars_keep_their_shape(shape, tmp_path):
    model = build(tmp_path / "m", ROW, lambda x: tf.nn.relu(x + tf.constant(0.5, shape=shape)) @ w(24, 6))
    made = quantized(model, data(ROW))
    (weight,) = [each for each in sites(model).weights if not each.linear]
    value = strip(made, snap=True).graph.constant(weight.ref)
    assert value.shape == shape and value.item() == pytest.approx(0.5)


def test_a_stripped_model_is_served(nets, tmp_path):
    from tests.conftest import serve_v1

    model, rows = nets("depthwise")
    snapped = strip(quantized(model, rows, 4), snap=True)
    saved_model.save(snapped, tmp_path / "s")
    received = next(iter(serve_v1(tmp_path / "s", rows.inputs).values()))
    np.testing.assert_allclose(received, answers(snapped, rows), atol=1e-5)
    assert snr(answers(model, rows), received) > 15
