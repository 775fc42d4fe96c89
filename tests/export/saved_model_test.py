from __future__ import annotations

import filecmp
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from tests.origins import ORIGINS, answers, assert_same, memory_answers, original_answers, python_answers, rows, v1
from tfopt import model
from tfopt.export import saved_model

COMPOSITE = ("tf1_sparse", "tf1_ragged")
CONSTANTS, MIXED, VARIABLES = 1 << 29, 8000, 0


def emit(path, out, max_constant_bytes=CONSTANTS):
    saved_model.save(model.load(path), out, max_constant_bytes=max_constant_bytes)
    return SavedModel.FromString((out / "saved_model.pb").read_bytes()).meta_graphs[0]


@pytest.mark.parametrize("max_constant_bytes", [CONSTANTS, MIXED, VARIABLES])
@pytest.mark.parametrize("name", ORIGINS)
def test_what_is_emitted_loads_everywhere_and_gives_what_the_original_gives(name, max_constant_bytes, built, tmp_path):
    inputs, calls = ORIGINS[name].inputs, ORIGINS[name].calls
    expected = original_answers(name, built(name))
    emit(built(name), tmp_path / "out", max_constant_bytes)
    assert_same(expected, answers(tmp_path / "out", inputs, calls))
    if name not in COMPOSITE:
        assert_same(expected, python_answers(tmp_path / "out", inputs, calls))
    assert_same(expected, memory_answers(model.load(tmp_path / "out"), inputs, calls))


@pytest.mark.parametrize("name", ORIGINS)
def test_signatures_keep_names_methods_dtypes_and_shapes(name, built, tmp_path):
    before = SavedModel.FromString((built(name) / "saved_model.pb").read_bytes()).meta_graphs[0]
    after = emit(built(name), tmp_path / "out")
    assert after.meta_info_def.tags == before.meta_info_def.tags
    kept = {key for key in before.signature_def if not key.startswith("__")}
    assert set(after.signature_def) == kept
    for key in kept:
        a, b = before.signature_def[key], after.signature_def[key]
        assert a.method_name == b.method_name
        for x, y in ((a.inputs, b.inputs), (a.outputs, b.outputs)):
            assert set(x) == set(y)
            for tensor in x:
                assert x[tensor].tensor_shape == y[tensor].tensor_shape
                assert x[tensor].dtype % 100 == y[tensor].dtype  # reference types are 100 above
                assert x[tensor].WhichOneof("encoding") == y[tensor].WhichOneof("encoding")


@pytest.mark.parametrize(("budget", "kinds"), [(CONSTANTS, ["Const"] * 2), (2000, ["Const", "ReadVariableOp"])])
def test_the_smallest_weights_become_constants_first(budget, kinds, built, tmp_path):
    meta = emit(built("tf1_ref_variables"), tmp_path / "out", budget)
    assert sorted(node.op for node in meta.graph_def.node if node.name in ("w", "b")) == kinds
    assert ("variables" in meta.collection_def) == (budget == 2000)
    if budget == 2000:
        names = [name for name, _ in tf.train.list_variables(str(tmp_path / "out" / "variables" / "variables"))]
        assert names == ["w"]  # no optimizer slots, no step


def test_shared_weights_are_stored_once(built, tmp_path):
    for budget in (CONSTANTS, VARIABLES):
        emit(built("shared_weights"), tmp_path / str(budget), budget)
        total = sum(file.stat().st_size for file in (tmp_path / str(budget)).rglob("*") if file.is_file())
        assert 9600 < total < 9600 + 9000  # the weight has 4 x 600 x 4 bytes


def test_variables_are_trainable_after_loading_in_python(built, tmp_path):
    emit(built("shared_weights"), tmp_path / "out", VARIABLES)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    (variable,) = loaded.variables
    assert variable.shape == (4, 600) and variable.trainable
    variable.assign(tf.zeros_like(variable))
    assert not loaded.signatures["score"](x=tf.ones((1, 4)))["score"].numpy().any()


def test_assets_and_extra_files_are_kept_byte_for_byte(built, tmp_path):
    path = built("tf1_tables_and_assets")
    emit(path, tmp_path / "out")
    files = ["assets/" + file.name for file in (path / "assets").iterdir()]
    files += ["assets.extra/tf_serving_warmup_requests", "assets.extra/deep/note.txt"]
    assert len(files) == 3
    assert filecmp.cmpfiles(path, tmp_path / "out", files, shallow=False)[0] == files


def test_tags_are_kept(tmp_path):
    from tests.origins import save_tf1

    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, [None], "x")
        save_tf1(tmp_path / "in", session, {"serving_default": ({"x": x}, {"y": x + 1.0})}, tags=("serve", "cpu"))
    emit(tmp_path / "in", tmp_path / "out")
    inputs = {"serving_default": {"x": np.array([1.0], np.float32)}}
    (outputs,) = answers(tmp_path / "out", inputs, tags=("serve", "cpu"))["serving_default"]
    np.testing.assert_array_equal(outputs["y"], [2.0])


def test_default_inputs_are_kept(tmp_path):
    three = tf.constant(3.0)

    class Default(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), name="x"), tf.TensorSpec((), name="scale")])
        def serve(self, x, scale=three):
            return {"y": x * scale}

    module = Default()
    tf.saved_model.save(module, str(tmp_path / "in"), {"serving_default": module.serve})
    meta = emit(tmp_path / "in", tmp_path / "out")
    before = SavedModel.FromString((tmp_path / "in" / "saved_model.pb").read_bytes()).meta_graphs[0]
    assert before.signature_def["serving_default"].defaults["scale"].float_val == [3.0]
    assert meta.signature_def["serving_default"].defaults == before.signature_def["serving_default"].defaults


def test_state_never_shares_a_variable_with_a_weight_of_the_same_name(built, tmp_path):
    loaded = model.load(built("counter"))
    expected = memory_answers(loaded, ORIGINS["counter"].inputs, 3)
    (weight,) = loaded.weights
    handle = next(name for name, value in loaded.state.items() if value.shape == (1, 4))
    loaded.graph.nodes[handle].attr["shared_name"].s = weight.encode()
    for budget in (CONSTANTS, VARIABLES):
        saved_model.save(loaded, tmp_path / str(budget), max_constant_bytes=budget)
        assert_same(expected, answers(tmp_path / str(budget), ORIGINS["counter"].inputs, 3))


def test_an_emitted_model_can_be_saved_again_by_its_saver(built, tmp_path):
    """TensorFlow 1 tools that restore, change and save keep working."""
    emit(built("counter"), tmp_path / "out", VARIABLES)
    with tf.Graph().as_default(), v1.Session() as session:
        meta = v1.saved_model.load(session, ["serve"], str(tmp_path / "out"))
        saver = v1.train.Saver(saver_def=meta.saver_def)
        saver.save(session, str(tmp_path / "again"))
    names = {name for name, _ in tf.train.list_variables(str(tmp_path / "again"))}
    assert names == {name for name, _ in tf.train.list_variables(str(tmp_path / "out" / "variables" / "variables"))}


def test_an_existing_directory_is_refused(built, tmp_path):
    (tmp_path / "variables").mkdir()
    with pytest.raises(FileExistsError):
        emit(built("shared_weights"), tmp_path)


@pytest.mark.parametrize(("slice_bytes", "files"), [(5000, 6), (7000, 3), (1000, 24), (1, None)])
def test_the_checkpoint_is_written_in_slices(slice_bytes, files, monkeypatch, tmp_path):
    monkeypatch.setattr(saved_model, "_SLICE_BYTES", slice_bytes)
    values = {f"v{i}": rows(40, 20, seed=i) for i in range(6)} if files else {"v": rows(5, 2, 3), "s": np.float32(3)}
    saved_model._write_checkpoint(tmp_path, values)
    assert files is None or len(list(tmp_path.glob("*.data-*"))) == files
    reader = tf.train.load_checkpoint(str(tmp_path / "variables"))
    for name, value in values.items():
        np.testing.assert_array_equal(reader.get_tensor(name), value)


def test_a_fresh_process_without_tfopt_serves_it(built, tmp_path):
    for name in ("static_tables", "control_flow"):
        emit(built(name), tmp_path / name, MIXED)
    script = textwrap.dedent("""
        import sys
        import numpy as np, tensorflow as tf
        assert "tfopt" not in sys.modules
        tables = tf.saved_model.load(sys.argv[1] + "/static_tables").signatures
        print(tables["file"](x=tf.constant([b"nein", b"?"]))["y"].numpy().tolist())
        print(tables["serving_default"](x=tf.constant([0, 7], tf.int64))["y"].numpy().tolist())
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            meta = tf.compat.v1.saved_model.load(session, ["serve"], sys.argv[1] + "/control_flow")
            signature = meta.signature_def["loop"]
            y = session.run(signature.outputs["y"].name, {signature.inputs["x"].name: np.zeros((1, 8), "f4")})
            print(y.shape)
    """)
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert run.stdout.splitlines() == ["[1, -1]", "[5997, 5976]", "(1, 8)"]
