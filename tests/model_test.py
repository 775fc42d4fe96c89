from __future__ import annotations

import shutil

import numpy as np
import pytest
import tensorflow as tf

from tests import origins
from tests.origins import ORIGINS, REAL_MODELS, assert_same, memory_answers, original_answers
from tfopt import model
from tfopt.errors import TfoptError


@pytest.mark.parametrize("name", ORIGINS)
def test_a_loaded_model_gives_what_the_original_gives(name, built):
    loaded = model.load(built(name))
    loaded.check()
    assert set(loaded.signatures) == set(ORIGINS[name].inputs)
    assert_same(original_answers(name, built(name)), memory_answers(loaded, ORIGINS[name].inputs, ORIGINS[name].calls))


def test_weights_are_apart_from_the_graph_and_shared_by_signatures(built):
    loaded = model.load(built("shared_weights"))
    (weight,) = loaded.weights.values()
    assert weight.shape == (4, 600) and loaded.weight_bytes - weight.nbytes < 100
    assert sum(node.ByteSize() for node in loaded.graph.nodes.values()) < weight.nbytes


@pytest.mark.parametrize(
    ("name", "state", "weights"),
    [
        ("counter", 2, {(4, 4)}),
        ("control_flow", 0, {(8, 8), (40, 40)}),
        ("control_flow_switch_merge", 0, {(8, 8), (8,)}),
        ("tf1_ref_variables", 0, {(4, 300), (300,)}),
        ("tf1_partitioned_variables", 0, {(14, 50), (13, 50)}),
        ("static_tables", 0, {(1500,), (2000,)}),  # keys and values of a table are weights too
        ("keras3_saved_by_tf", 0, {(8, 300), (300,), (300, 3), (3,)}),
    ],
)
def test_what_is_only_read_is_a_weight_and_what_is_assigned_is_state(name, state, weights, built):
    loaded = model.load(built(name))
    assert len(loaded.state) == state
    assert {weight.shape for weight in loaded.weights.values()} == weights


def test_optimizer_slots_and_counters_are_left_out(built):
    assert model.load(built("tf1_ref_variables")).unused == ["b/Momentum", "global_step", "w/Momentum"]


def test_every_dtype_keeps_its_values(built):
    weights = {w.dtype.name: w for w in model.load(built("dtypes")).weights.values() if w.ndim == 2 and w.size}
    assert {"bfloat16", "float16", "float64", "complex64", "int8", "uint16"} == set(weights)
    np.testing.assert_array_equal(weights["int8"], np.arange(1500).reshape(3, 500).astype(np.int8))
    np.testing.assert_array_equal(weights["float16"], origins.rows(4, 300).astype(np.float16))


def test_mutable_tables_bring_their_values(built):
    ((keys, values),) = model.load(built("mutable_table")).tables.values()
    assert dict(zip(keys, values, strict=True)) == {b"a": 1.5, b"b": 2.5}


def test_some_signatures_can_be_asked_for(built):
    loaded = model.load(built("control_flow"), ["loop"])
    assert list(loaded.signatures) == ["loop"]
    assert len(loaded.called()) == 2  # the condition and the body
    with pytest.raises(TfoptError, match=r"has no signature 'lopo'; it has 'cond', 'loop', 'nested'"):
        model.load(built("control_flow"), ["lopo"])


def test_a_copy_can_be_edited_alone(built):
    loaded = model.load(built("shared_weights"))
    copy = loaded.copy()
    copy.signatures["score"].method_name = "changed"
    copy.graph.set_constant("kernel", np.zeros((4, 600), np.float32))
    copy.functions["f"] = None
    assert loaded.signatures["score"].method_name == "tensorflow/serving/predict"
    assert loaded.weights["kernel"].any() and "f" not in loaded.functions


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda path: shutil.rmtree(path), "no such file or directory"),
        (lambda path: (path / "saved_model.pb").unlink(), "holds no saved_model.pb"),
        (lambda path: (path / "saved_model.pb").write_bytes(b""), "holds no MetaGraph"),
        (lambda path: (path / "saved_model.pb").write_bytes(b"\xff" * 100), "cannot be read as a SavedModel"),
        (lambda path: (path / "variables" / "variables.index").unlink(), "checkpoint"),
        (lambda path: shutil.rmtree(path / "variables"), "checkpoint"),
    ],
)
def test_damage_ends_in_one_line_that_names_the_place(break_it, message, built, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(built("shared_weights"), path)
    break_it(path)
    with pytest.raises(TfoptError, match=message) as raised:
        model.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_the_folder_above_a_version_is_told_from_it(built, tmp_path):
    shutil.copytree(built("shared_weights"), tmp_path / "served" / "3")
    with pytest.raises(TfoptError, match=r"did you mean .*/served/3\?"):
        model.load(tmp_path / "served")


def test_an_unknown_op_is_named(built, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(built("shared_weights"), path)
    meta = _edit(path)
    meta.meta_graphs[0].graph_def.node.add(name="strange", op="NobodyHasThisOp")
    (path / "saved_model.pb").write_bytes(meta.SerializeToString())
    with pytest.raises(TfoptError, match="'strange' uses op 'NobodyHasThisOp'"):
        model.load(path)


@pytest.mark.parametrize("filename", ["../outside.txt", "/etc/hostname", "a/../../b"])
def test_assets_outside_the_model_are_refused(filename, built, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(built("static_tables"), path)
    saved = _edit(path)
    saved.meta_graphs[0].asset_file_def[0].filename = filename
    (path / "saved_model.pb").write_bytes(saved.SerializeToString())
    with pytest.raises(TfoptError, match="lies outside the SavedModel"):
        model.load(path)


def test_a_model_without_a_signature_is_refused(tmp_path):
    module = tf.Module()
    module.v = tf.Variable(1.0)
    tf.saved_model.save(module, str(tmp_path / "model"))
    with pytest.raises(TfoptError, match="has no serving signature"):
        model.load(tmp_path / "model")


def _edit(path):
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    return SavedModel.FromString((path / "saved_model.pb").read_bytes())


@pytest.mark.parametrize("name", REAL_MODELS)
def test_real_models_give_what_they_gave(name, shared):
    from tfopt import runtime
    from tfopt.function import Function
    from tfopt.verify import difference, inputs_for

    path = shared / "models" / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    loaded = model.load(path)
    with Function(loaded) as function:
        inputs = inputs_for(loaded, None, 0, function)
    for signature, data in inputs.items():
        with Function(loaded) as function, runtime.open(path) as program:
            for _ in range(2):
                found = difference(program.run(signature, data.inputs), function(signature, data.inputs))
                assert found.broken is None and found.relative <= 3e-5, f"{signature}: {found}"
