"""Quantization-aware training: 4 bits recover, file and graph agree, and nothing gets worse."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tensorflow as tf

from tests.passes.quantize_test import classes, device_file, digits, graph_classes, learning
from tests.quantized_nets import ROW, answers, build, data, w
from tfopt.data import Dataset
from tfopt.errors import TfoptError
from tfopt.export.tflite_file import TfliteFile
from tfopt.fake_quant import OPS, PER_CHANNEL, is_quantized, strip
from tfopt.passes import Data, quantize, train_quantized
from tfopt.rewrite import Log

__all__ = ["digits"]  # the fixture
FAST = {"epochs": 3, "learning_rate": 5e-4, "calibrator": "minmax"}


def trained(net, given, **options):
    made, log = net.copy(), Log()
    train_quantized.run(made, log, given, **{**FAST, **options})
    made.check()
    return made, log


def losses(log) -> tuple[float, float]:
    """On rows held back: before the training, and after."""
    (note,) = [note for note in log.notes if note.startswith("loss on ")]
    before, after = re.findall(r": ([\d.e-]+) before training, ([\d.e-]+) after", note)[0]
    return float(before), float(after)


@pytest.mark.parametrize("bits", [8, 4])
def test_file_and_graph_agree_after_training_without_labels(digits, bits, tmp_path):
    net, (train, _, held, labels) = digits
    given = learning(net, train)
    made, log = trained(net, given, bits=bits)
    before, after = losses(log)
    assert after <= before
    result = device_file(made, tmp_path, {8: "int8", 4: "int4"}[bits], trained=True)
    file, graph, plain = (classes(result.path, held), graph_classes(made, held), graph_classes(net, held))
    assert len(held) >= 400 and np.mean(file == graph) >= 0.995
    assert np.mean(plain == labels) - np.mean(file == labels) <= {8: 0.005, 4: 0.01}[bits]
    assert TfliteFile(result.path).weights("INT4") == (log.applied["weight in 4 bits"] if bits == 4 else 0)


def test_4_bits_recover(digits):
    net, (train, labels, held, _) = digits
    rounded = net.copy()
    quantize.run(rounded, Log(), learning(net, train[:200]), bits=4, calibrator="minmax", correct_biases=False)
    rows = Dataset({"image": held}, None, "digits")

    def error(model):
        return float(np.abs(answers(model, rows) - answers(net, rows)).mean())

    unlabelled, log = trained(net, learning(net, train), bits=4)
    assert losses(log)[1] < 0.5 * losses(log)[0]
    assert error(unlabelled) < 0.8 * error(rounded)
    labelled = Dataset({"image": train}, labels, "digits")
    both, log = trained(net, learning(net, train[:200], labelled=labelled), bits=4)
    assert losses(log)[1] <= losses(log)[0]
    assert error(both) <= error(rounded)


def test_labels_are_learned(digits):
    """Labels that are all one class further: what the original says, and what is wanted, are different things."""
    net, (train, labels, held, truth) = digits
    labelled = Dataset({"image": train}, (labels + 1) % 10, "digits")
    options = {"bits": 4, "epochs": 12, "learning_rate": 5e-3}
    given = Data("serving_default", net.copy(), labelled=labelled)
    made, log = trained(net, given, alpha=1.0, **options)
    assert losses(log)[1] < 0.2 * losses(log)[0]
    assert np.mean(graph_classes(made, held) == (truth + 1) % 10) > 0.9
    deaf, _ = trained(net, given, alpha=0.0, **{**options, "epochs": 1, "learning_rate": 5e-4})
    assert np.mean(graph_classes(deaf, held) == truth) > 0.9


def test_one_seed_gives_one_result(digits):
    net, (train, *_) = digits
    one, two, other = (trained(net, learning(net, train[:256], seed=seed), bits=4, epochs=1)[0] for seed in (3, 3, 4))

    def difference(a, b):
        return max(float(np.abs(a.weights[name] - b.weights[name]).max()) for name in a.weights)

    assert difference(one, two) == 0 < difference(one, other)


def test_what_does_not_help_is_not_kept(digits):
    """A rate at which everything breaks: the weights are those of the beginning."""
    net, (train, *_) = digits
    given = learning(net, train[:256])
    made, log = trained(net, given, epochs=1, learning_rate=100.0)
    before, after = losses(log)
    assert after <= before
    start = net.copy()
    quantize.run(start, Log(), given, calibrator="minmax", correct_biases=False)
    rows = Dataset({"image": train[:256]}, None, "digits")
    assert np.abs(answers(made, rows) - answers(start, rows)).max() < 1e-4


def test_weights_stay_symmetric_and_tied_ranges_one(digits):
    net, (train, *_) = digits
    made, _ = trained(net, learning(net, train[:256]), bits=4, epochs=1)
    for node in made.graph.nodes.values():
        if node.op == PER_CHANNEL:
            low, high = (made.graph.constant(ref) for ref in node.input[1:3])
            np.testing.assert_array_equal(low, -high)
            assert (high > 0).all()
        elif node.op in OPS:
            low, high = (float(made.graph.constant(ref)) for ref in node.input[1:3])
            assert low <= 0 <= high and low < high
    assert is_quantized(made)
    snapped = strip(made, snap=True)
    assert not is_quantized(snapped) and not {name for name in snapped.weights if "fake_quant" in name}


def test_bad_options_and_missing_rows_end_in_one_line(tmp_path):
    net = build(tmp_path / "m", ROW, lambda x: tf.nn.relu(x @ w(24, 8)))
    with pytest.raises(TfoptError, match="train_quantized learns from data: give --representative_data"):
        train_quantized.run(net.copy(), Log(), Data("serving_default", net))
    with pytest.raises(TfoptError, match="option 'bits' must be 8 or 4, received 3"):
        train_quantized.run(net.copy(), Log(), Data("serving_default", net, data(ROW)), bits=3)
    without = build(tmp_path / "n", ROW, lambda x: tf.nn.relu(x))
    with pytest.raises(TfoptError, match="nothing to quantize"):
        train_quantized.run(without, Log(), Data("serving_default", net, data(ROW)))
