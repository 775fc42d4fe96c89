"""Calibration on Beam: what one process sees of tensors, to the last bit, and the same quantized models."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("apache_beam", reason="make test-tfx runs it")

import apache_beam as beam
import tensorflow as tf

from tests.calibration_test import Net, data, node
from tests.conftest import REPO
from tests.origins import save_module, spec
from tfopt import calibration, model, passes, recipe, run_data
from tfopt.beam import calibrate
from tfopt.errors import TfoptError
from tfopt.optimize import Options
from tfopt.passes import quantize
from tfopt.quantization_sites import sites
from tfopt.rewrite import Log

DIGITS = REPO / "saved_models" / "digits"
IMAGES = np.random.default_rng(0).random((400, 8, 8, 1), np.float32)
TWO = "--direct_running_mode=multi_processing --direct_num_workers=2"


def same(one, two) -> bool:
    """Whether two results of `observe` are equal to the last bit."""
    return list(one) == list(two) and all(
        (a.low, a.high, a.zeros, a.width) == (b.low, b.high, b.zeros, b.width)
        and np.array_equal(a.negative, b.negative)
        and np.array_equal(a.positive, b.positive)
        for a, b in zip(one.values(), two.values(), strict=True)
    )


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("calibration") / "net"
    save_module(path, Net(), "open", "fixed")
    return model.load(path)


@pytest.fixture(scope="module")
def digits():
    loaded = model.load(DIGITS)
    for name, _ in recipe.read("lossless").steps:
        passes.get(name).run(loaded, Log())
    return loaded


def npz(folder, rows) -> str:
    np.savez(folder / "rows.npz", **rows.inputs)
    return str(folder / "rows.npz")


def records(folder, rows) -> str:
    """The rows in three TFRecord files, of which none ends where a batch does."""
    x = rows.inputs["x"]
    for part, some in enumerate(np.split(x, [len(x) // 5, len(x) // 2])):
        with tf.io.TFRecordWriter(str(folder / f"{part}.tfrecord")) as writer:
            for row in some:
                feature = tf.train.Feature(float_list=tf.train.FloatList(value=row))
                example = tf.train.Example(features=tf.train.Features(feature={"x": feature}))
                writer.write(example.SerializeToString())
    return str(folder / "*.tfrecord")


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize("written", [npz, records])
@pytest.mark.parametrize(("signature", "op"), [("open", "MatMul"), ("fixed", "Relu")])
def test_tensors_have_the_values_of_one_process(signature, op, written, counts, net, tmp_path):
    rows = data(301, 4, low=-3)
    refs = [n.name for n in net.graph.nodes.values() if n.op == op and (op != "Relu" or "MatMul" not in n.input[0])]
    wanted = calibration.observe(net, signature, refs, rows, counts)
    assert bool(wanted[refs[0]].width) == counts
    assert same(calibrate.observe(net, signature, refs, written(tmp_path, rows), "", counts), wanted)


def test_all_ranges_of_a_real_model_with_two_workers(digits, tmp_path):
    """The model goes through --temp_location, and does not stay there."""
    refs = [ref for ref, fixed in sites(digits, False, "serving_default").activations.items() if fixed is None]
    rows = calibration.Dataset({"image": IMAGES}, None, "rows")
    source, place = npz(tmp_path, rows), tmp_path / "shared"
    place.mkdir()
    found = calibrate.observe(digits, "serving_default", refs, source, f"{TWO} --temp_location={place}")
    assert len(refs) > 3 and same(found, calibration.observe(digits, "serving_default", refs, rows))
    assert list(place.iterdir()) == []


def test_what_cannot_be_calibrated_ends_in_one_line(net, tmp_path):
    product, log = node(net, "MatMul"), node(net, "Log")
    rows = data(300, 4)
    rows.inputs["x"][250, 0] = 0
    with pytest.raises(TfoptError, match=f"^tensor '{log}' becomes NaN or infinite on row 250 of .*rows.npz, whose"):
        calibrate.observe(net, "open", [product, log], npz(tmp_path, rows), "")
    rows.inputs["x"][200, 0] = np.nan
    with pytest.raises(TfoptError, match=r"rows.npz: input 'x' holds NaN or infinity in row 200: no range"):
        calibrate.observe(net, "open", [product], npz(tmp_path, rows), "")
    with pytest.raises(TfoptError, match="there is no tensor 'nowhere'"):
        calibrate.observe(net, "open", ["nowhere"], npz(tmp_path, rows), "")
    with pytest.raises(TfoptError, match="no signature 'none'"):
        calibrate.observe(net, "none", [product], npz(tmp_path, rows), "")


@pytest.mark.parametrize(("brought", "seen"), [([1, 2, 3, 4], 472), ([0, 1, 2, 2, 3, 4], 728)])
@pytest.mark.parametrize("counts", [False, True])
def test_rows_that_a_runner_loses_or_doubles_are_missed(brought, seen, counts, net, tmp_path, monkeypatch):
    class Runner(calibrate.ReadRows):
        def expand(self, start):
            every = list(self.batches)
            return start | beam.Create([every[k] for k in brought]) | beam.Reshuffle()

    monkeypatch.setattr(calibrate, "ReadRows", Runner)
    with pytest.raises(TfoptError, match=f"the runner lost or doubled rows: {seen} were seen of 600"):
        calibrate.observe(net, "open", [node(net, "MatMul")], npz(tmp_path, data(600, 4)), "", counts)


def test_state_is_refused(tmp_path):
    class Counter(tf.Module):
        def __init__(self):
            super().__init__()
            self.count = tf.Variable(0.0)

        @tf.function(input_signature=[spec(None, 4)])
        def serve(self, x):
            return {"y": x * self.count.assign_add(1.0)}

    save_module(tmp_path / "counter", Counter(), "serve")
    counter = model.load(tmp_path / "counter")
    with pytest.raises(TfoptError, match=r"the model has state \(.*\): calibrate it without --beam_args"):
        calibrate.observe(counter, "serve", [node(counter, "Mul")], npz(tmp_path, data(8, 4)), "")


def test_quantize_sets_the_same_ranges(digits, tmp_path):
    source = npz(tmp_path, calibration.Dataset({"image": IMAGES}, None, ""))
    made = []
    for beam_args in (None, ""):
        options = Options(recipe="device_int8", representative_data=source, beam_args=beam_args)
        quantized, log = digits.copy(), Log()
        quantize.run(quantized, log, run_data.learning_data(digits, None, DIGITS, options))
        made.append((quantized.graph, log.notes))
    (here, notes), (there, words) = made
    assert there.nodes == here.nodes != digits.graph.nodes
    assert there.weights.keys() == here.weights.keys()
    assert all(np.array_equal(value, here.weights[name]) for name, value in there.weights.items())
    assert words == [f"values of activations were seen on all rows of {source}, by Beam", *notes]


def test_what_needs_rows_in_memory_gets_the_first(net, tmp_path, monkeypatch):
    rows = data(300, 4, low=-3)
    source, product = npz(tmp_path, rows), node(net, "MatMul")
    one = net.copy()
    one.signatures = {"open": one.signatures["open"]}
    monkeypatch.setattr(run_data, "ROWS_IN_MEMORY", 50)
    for beam_args, count, words in [
        (None, 300, None),
        ("", 50, "the first 50 rows of the representative data; ranges"),
    ]:
        options = Options(representative_data=source, beam_args=beam_args)
        given = run_data.learning_data(one, None, "net", options)
        assert len(given.rows) == len(run_data.representative_rows(one, one, source, options)["open"]) == count
        assert (run_data.learned_on(given, options) or "").startswith(words or "") and bool(words) == (count == 50)
        assert same(
            given.observe(one, "open", [product], given.rows, True), calibration.observe(one, "open", [product], rows)
        )
