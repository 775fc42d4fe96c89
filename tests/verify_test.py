from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf

from tests.origins import ORIGINS, rows, save_tf1, v1
from tfopt import model, passes
from tfopt.errors import TfoptError
from tfopt.optimize import run_pass
from tfopt.verify import BOUNDS, Verifier, difference, input_specs, worst

F32 = np.array([1.0, -4.0], np.float32)


@pytest.mark.parametrize(("dtype", "bound"), BOUNDS.items())
def test_floats_are_compared_on_the_scale_of_the_output(dtype, bound):
    a = np.array([8.0, -0.5], tf.as_dtype(dtype).as_numpy_dtype)
    near = (a.astype(np.complex128) + np.array([0, 8 * bound * 0.4])).astype(a.dtype)
    far = (a.astype(np.complex128) + np.array([0, 8 * bound * 3])).astype(a.dtype)
    assert difference({"y": a}, {"y": near}).broken is None
    found = difference({"y": a}, {"y": far})
    assert found.broken.startswith("output 'y' is off by") and found.relative == pytest.approx(3 * bound, rel=0.6)
    assert found.absolute == pytest.approx(8 * found.relative)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (F32, F32.astype(np.float64), r"changed from float32\[2\] to float64\[2\]"),
        (F32, F32[None], r"changed from float32\[2\] to float32\[1, 2\]"),
        (np.array([1, 2, 3]), np.array([1, 2, 4]), r"\(int64\) is not equal in 1 of 3"),
        (np.array([True, False]), np.array([True, True]), r"\(bool\) is not equal in 1 of 2"),
        (np.array([b"a", b"b"], object), np.array([b"a", b"c"], object), r"\(object\) is not equal in 1 of 2"),
        (np.array([1, np.nan]), np.array([np.nan, 1]), "differs where it is not finite"),
        (np.array([1, np.inf]), np.array([1, -np.inf]), "differs where it is not finite"),
        (np.array([1, 2.0]), np.array([1, np.nan]), "differs where it is not finite"),
        (np.zeros(2), np.array([0, 1e-9]), "off by inf of its scale"),
        (F32, None, "output 'y' is missing"),
    ],
)
def test_what_differs_is_said(a, b, message):
    import re

    found = difference({"y": a}, {} if b is None else {"y": b})
    assert re.search(message, found.broken)


@pytest.mark.parametrize(
    "a",
    [
        np.array([np.nan, np.inf, -np.inf, 2.0]),
        np.zeros((0, 3), np.float32),
        np.zeros(3),
        np.array([b"x", "ü".encode()], object),
        np.array([1 + 2j, np.nan]),
        np.float32(3),
    ],
)
def test_equal_outputs_are_equal_and_no_warning_is_raised(a):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = difference({"y": a}, {"y": np.array(a)})
    assert found.broken is None and found.absolute == found.relative == 0


def test_the_worst_of_several():
    found = worst([difference({"y": F32}, {"y": F32}), difference({"y": F32}, {"y": F32 + 1}), difference({}, {})])
    assert found.absolute == 1 and found.relative == 0.25 and "off by 0.25" in found.broken
    assert worst([]).broken is None


@pytest.mark.parametrize("name", ORIGINS)
def test_probes_run_on_every_model_and_show_no_difference_to_itself(name, built):
    loaded = model.load(built(name))
    verifier = Verifier(loaded, None, 0)
    assert set(verifier.inputs) == set(loaded.signatures) and not verifier.random
    found = verifier.check(loaded.copy())
    assert found.broken is None and found.relative <= 1e-6


def test_probes_are_the_same_for_the_same_seed(built):
    loaded = model.load(built("tf1_sparse"))
    first, again, other = (Verifier(loaded, None, seed).inputs["serving_default"].inputs for seed in (1, 1, 2))
    assert all((first[key] == again[key]).all() for key in first)
    assert (first["s:values"] != other["s:values"]).any()


def test_specs_name_the_components_of_sparse_inputs(built):
    specs = input_specs(model.load(built("tf1_sparse")), "serving_default")
    assert {name: spec.dtype for name, spec in specs.items()} == {
        "s:values": np.float32, "s:indices": np.int64, "s:dense_shape": np.int64
    }  # fmt: skip


def test_state_is_compared_over_several_calls(built):
    loaded = model.load(built("counter"))
    verifier = Verifier(loaded, None, 0)
    assert len(verifier.expected["count"]) == 2
    forgetful = loaded.copy()
    name = next(name for name, value in forgetful.state.items() if value.shape == ())
    forgetful.state[name] = forgetful.state[name] + 1
    found = verifier.check(forgetful)
    assert found.broken and found.relative > 0.1


def test_random_signatures_are_named_and_the_others_still_compared(tmp_path):
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None, 4], "x")
        noisy, calm = x + tf.random.normal([4]), x * 2.0
        save_tf1(tmp_path / "m", session, {"noisy": ({"x": x}, {"y": noisy}), "calm": ({"x": x}, {"y": calm})})
    loaded = model.load(tmp_path / "m")
    verifier = Verifier(loaded, None, 0)
    assert verifier.random == ["noisy"] and list(verifier.expected) == ["calm"]
    broken = loaded.copy()
    broken.graph.outputs["calm:y"] = "x"
    assert "off by" in verifier.check(broken).broken


def test_a_fixed_batch_takes_as_many_rows_as_it_has(tmp_path):
    module = tf.Module()
    module.f = tf.function(lambda x: {"y": 2 * x}, input_signature=[tf.TensorSpec((2, 3), tf.float32, "x")])
    tf.saved_model.save(module, tmp_path / "m", signatures={"serving_default": module.f})
    np.savez(tmp_path / "rows.npz", x=np.ones((7, 3), np.float32))
    verifier = Verifier(model.load(tmp_path / "m"), str(tmp_path / "rows.npz"), 0)
    assert len(verifier.inputs["serving_default"]) == 2


def test_representative_data_is_used_and_must_fit(built, tmp_path):
    loaded = model.load(built("shared_weights"))
    np.savez(tmp_path / "x.npz", x=rows(20, 4, seed=3))
    verifier = Verifier(loaded, str(tmp_path / "x.npz"), 0)
    np.testing.assert_array_equal(
        verifier.inputs["score"].inputs["x"], rows(20, 4, seed=3)[: len(verifier.inputs["score"])]
    )
    np.savez(tmp_path / "wrong.npz", z=rows(20, 4))
    with pytest.raises(TfoptError, match=r"wants 'x' float32 \(\?, 4\); received 'z'"):
        Verifier(loaded, str(tmp_path / "wrong.npz"), 0)


def _break_outputs(loaded, log):
    (weight,) = loaded.weights
    loaded.graph.set_constant(weight, loaded.weights[weight] * 1.001)
    log.applied["wrong"] += 1


def _break_graph(loaded, log):
    loaded.graph.nodes.pop(next(iter(loaded.weights)))
    log.applied["wrong"] += 1


def _break_run(loaded, log):
    loaded.graph.outputs["score:score"] = "kernel"
    log.applied["wrong"] += 1


def _raise(error):
    def run(loaded, log):
        loaded.graph.outputs.clear()
        raise error

    return run


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (_break_outputs, "is off by 0.001 of its scale (bound 0.0001)"),
        (_break_graph, "the pass failed: ValueError: node"),
        (_break_run, "changed from float32[3, 600] to float32[4, 600]"),
        (_raise(KeyError("lost")), "the pass failed: KeyError: 'lost'"),
        (_raise(TypeError("bad type")), "the pass failed: TypeError: bad type"),
        (_raise(tf.errors.InvalidArgumentError(None, None, "first line\nsecond")), "InvalidArgumentError: first line"),
        (_raise(TfoptError("a function is missing")), "a function is missing"),
    ],
)
def test_a_wrong_pass_is_undone_and_reported(run, message, built, monkeypatch):
    monkeypatch.setattr(passes, "get", lambda name: passes.Pass(name, run))
    loaded = model.load(built("shared_weights"))
    verifier = Verifier(loaded, None, 0)
    kept, step = run_pass(loaded, "prune_graph", {}, verifier)
    assert kept is loaded and step.status == "undone" and message in step.notes[-1]
    assert step.nodes_after == step.nodes_before and "\n" not in step.notes[-1]
    assert verifier.check(kept).broken is None


def test_a_pass_that_may_change_outputs_is_measured_and_kept(built, monkeypatch):
    monkeypatch.setattr(passes, "get", lambda name: passes.Pass(name, _break_outputs, lossless=False))
    loaded = model.load(built("shared_weights"))
    kept, step = run_pass(loaded, "prune_graph", {}, Verifier(loaded, None, 0))
    assert kept is not loaded and step.status == "applied" and step.max_error == pytest.approx(1e-3, rel=0.01)


def test_after_a_pass_that_changed_outputs_others_are_compared_with_it(built, monkeypatch):
    get = passes.get
    loaded = model.load(built("shared_weights"))
    verifier = Verifier(loaded, None, 0)
    monkeypatch.setattr(passes, "get", lambda name: passes.Pass(name, _break_outputs, lossless=False))
    lossy, _ = run_pass(loaded, "prune_graph", {}, verifier)
    assert verifier.check(lossy).broken
    monkeypatch.setattr(passes, "get", get)
    kept, step = run_pass(lossy, "merge_duplicates", {}, verifier)
    assert step.status == "applied" and step.max_error == pytest.approx(1e-3, rel=0.01)
    monkeypatch.setattr(passes, "get", lambda name: passes.Pass(name, _break_outputs))
    again, step = run_pass(kept, "prune_graph", {}, verifier)
    assert again is kept and step.status == "undone" and "is off by 0.001 of its scale" in step.notes[-1]


def test_without_verification_a_step_says_so(built):
    loaded = model.load(built("shared_weights"))
    _, step = run_pass(loaded, "prune_graph", {}, None)
    assert step.status == "unverified" and step.max_error is None
    _, step = run_pass(loaded, "fold_shapes", {}, None)
    assert step.status == "no effect"
