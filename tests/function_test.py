from __future__ import annotations

import numpy as np
import pytest

from tests.origins import ORIGINS, assert_same, original_answers, rows
from tfopt import model
from tfopt.errors import TfoptError
from tfopt.function import Function


def test_state_lives_as_long_as_the_function(built):
    loaded = model.load(built("counter"))
    x = ORIGINS["counter"].inputs["count"]
    with Function(loaded) as one, Function(loaded) as other:
        assert [int(one("count", x)["calls"]) for _ in range(3)] == [8, 9, 10]
        assert int(other("count", x)["calls"]) == 8
        total = one("peek", {})["total"]
        np.testing.assert_allclose(total, 2 * (one("count", x)["total"] - x["x"]), rtol=1e-5)
    with Function(loaded) as again:
        assert int(again("count", x)["calls"]) == 8


def test_rewriting_the_model_does_not_change_a_function(built):
    loaded = model.load(built("shared_weights"))
    with Function(loaded) as function:
        before = function("score", {"x": np.ones((1, 4), np.float32)})["score"]
        loaded.graph.set_constant("kernel", np.zeros((4, 600), np.float32))
        after = function("score", {"x": np.ones((1, 4), np.float32)})["score"]
    np.testing.assert_array_equal(before, after)
    assert before.any()


@pytest.mark.parametrize("name", ["static_tables", "mutable_table", "tf1_tables_and_assets"])
def test_tables_are_filled(name, built):
    expected = original_answers(name, built(name))
    with Function(model.load(built(name))) as function:
        received = {key: [function(key, fed)] for key, fed in ORIGINS[name].inputs.items()}
    assert_same(expected, received)


def test_outputs_are_arrays_also_scalar_strings(built):
    with Function(model.load(built("results_that_nothing_computes"))) as function:
        outputs = function("constant", {})
    assert outputs["s"].dtype == object and outputs["s"].item() == b"text"
    np.testing.assert_array_equal(outputs["c"], rows(50, 50, seed=1))


def test_what_cannot_run_ends_in_one_line(built):
    with (
        Function(model.load(built("shared_weights"))) as function,
        pytest.raises(TfoptError, match="signature 'score' cannot be run") as raised,
    ):
        function("score", {"x": np.ones((2, 5), np.float32)})
    assert "\n" not in str(raised.value)


def test_an_op_without_a_kernel_ends_in_one_line(shared):
    loaded = model.load(shared / "models" / "tfx-unsupported-op" / "benchmark_trained")
    from tfopt.verify import Verifier

    with pytest.raises(TfoptError, match="BoostedTrees") as raised:
        Verifier(loaded, None, 0)
    assert "\n" not in str(raised.value)


def test_a_graph_that_tensorflow_rejects_ends_in_one_line(built):
    loaded = model.load(built("shared_weights"))
    node = next(node for node in loaded.graph.nodes.values() if node.op == "MatMul")
    node.attr["T"].type = 3  # int32
    with pytest.raises(TfoptError, match="TensorFlow cannot set the model up") as raised:
        Function(loaded)
    assert "\n" not in str(raised.value)
