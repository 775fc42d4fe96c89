"""One computation under two names: in the file once, and callable by both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tfopt import runtime
from tfopt.export import saved_model, tflite, tflite_aliases
from tfopt.export.fixed_batch import fix_batch
from tfopt.model import load
from tfopt.optimize import run_pass

DIGITS = Path(__file__).parents[2] / "saved_models" / "digits"


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    """The digits model, whose `serve` and `serving_default` are one, made ready for conversion."""
    model = load(DIGITS)
    for name in ("prune_graph", "merge_duplicates", "fold_constants", "fold_shapes"):
        model, _ = run_pass(model, name, {}, None)
    directory = tmp_path_factory.mktemp("aliases") / "model"
    saved_model.save(fix_batch(model, 1), directory)
    return directory


def test_serving_default_is_the_one_that_is_converted(emitted):
    assert tflite_aliases.find(emitted) == {"serve": "serving_default"}


def test_signatures_that_differ_are_no_aliases(shared):
    directory = shared / "models" / "tf-serving-testdata" / "saved_model_half_plus_two_cpu" / "00000123"
    assert tflite_aliases.find(directory) == {}


def test_both_names_run_and_the_weights_are_there_once(emitted, tmp_path):
    both = tflite.convert(emitted, ("float32",), tmp_path / "both")[0]
    assert both.path is not None and not both.error
    image = np.random.default_rng(0).random((1, 8, 8, 1), np.float32)
    with runtime.open(both.path) as program, runtime.open(DIGITS) as original:
        assert set(program.signatures) == {"serve", "serving_default"}
        (name,) = program.signatures["serve"].inputs
        expected = original.run("serving_default", {name: image})
        for key in program.signatures:
            for output, value in program.run(key, {name: image}).items():
                np.testing.assert_allclose(value, expected[output], atol=1e-6)
    weights = sum(w.nbytes for w in load(emitted).weights.values())
    assert both.path.stat().st_size < 1.2 * weights


def test_an_alias_of_what_the_file_lacks_is_left_out(emitted, tmp_path):
    made = tflite.convert(emitted, ("float32",), tmp_path)[0]
    before = made.path.read_bytes()
    tflite_aliases.add(made.path, {"other": "absent"})
    with runtime.open(made.path) as program:
        assert set(program.signatures) == {"serve", "serving_default"}
    assert len(made.path.read_bytes()) == len(before)
