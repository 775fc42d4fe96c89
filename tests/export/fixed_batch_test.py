from __future__ import annotations

import numpy as np
import pytest

from tests.origins import ORIGINS, assert_same, memory_answers
from tfopt import model
from tfopt.export.fixed_batch import fix_batch
from tfopt.passes import fold_shapes, prune_graph
from tfopt.rewrite import Log


@pytest.mark.parametrize("batch", [1, 3])
def test_shapes_become_known_and_outputs_stay(batch, built):
    loaded = model.load(built("keras3_export"))
    for chosen in (prune_graph, fold_shapes):
        chosen.run(loaded, Log())
    fixed = fix_batch(loaded, batch)
    signature = fixed.signatures["serving_default"]
    assert [d.size for d in signature.inputs["image"].tensor_shape.dim] == [batch, 8, 8, 1]
    assert [d.size for d in signature.outputs["output_0"].tensor_shape.dim] == [batch, 10]
    inputs = {"serving_default": {"image": ORIGINS["keras3_export"].inputs["serving_default"]["image"][:batch]}}
    assert_same(memory_answers(loaded, inputs), memory_answers(fixed, inputs))
    ops = {node.op for node in fixed.graph.nodes.values()}
    assert not ops & {"Shape", "StridedSlice", "Pack"}, "arithmetic on shapes is left"
    assert [d.size for d in loaded.signatures["serving_default"].inputs["image"].tensor_shape.dim] == [-1, 8, 8, 1]


def test_every_signature_is_fixed_though_they_share_an_input(built):
    fixed = fix_batch(model.load(built("control_flow_switch_merge")), 2)
    for signature in fixed.signatures.values():
        assert [d.size for d in signature.inputs["x"].tensor_shape.dim] == [2, 8]


def test_the_values_of_sparse_inputs_stay_open(built):
    fixed = fix_batch(model.load(built("tf1_sparse")), 1)
    inputs = ORIGINS["tf1_sparse"].inputs
    assert_same(memory_answers(model.load(built("tf1_sparse")), inputs), memory_answers(fixed, inputs))
    assert np.size(inputs["serving_default"]["s:values"]) == 3
