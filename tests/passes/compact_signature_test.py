"""compact_signature: the new signature gives on features what the old one gives on the tf.Examples that hold them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tensorflow as tf

from tests.serving import examples
from tfopt import recipe
from tfopt.errors import TfoptError
from tfopt.evaluation import evaluate
from tfopt.export import saved_model
from tfopt.function import Function
from tfopt.model import load
from tfopt.optimize import Options, optimize, run_pass
from tfopt.passes.compact_signature import run
from tfopt.rewrite import Log
from tfopt.serving.encode import columns, encode
from tfopt.verify import Verifier, difference


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return examples.save(tmp_path_factory.mktemp("all_kinds") / "model")


def cleaned(path):
    model = load(path)
    for name, options in recipe.read("lossless").steps:
        model, _ = run_pass(model, name, options, None)
    return model


def outputs(model, signature, records):
    with Function(model) as function:
        return function(signature, {"examples": records})


@pytest.mark.parametrize("count", [1, 4, 13])
@pytest.mark.parametrize("sparse", ["mask", "row_splits"])
def test_every_kind_of_feature(model_path, sparse, count):
    model = cleaned(model_path)
    records = examples.serialize(examples.rows(count))
    expected = outputs(model, "serving_default", records)
    log = Log()
    run(model, log, sparse=sparse)
    model.check()
    assert not [node for node in model.graph.nodes.values() if node.op.startswith("ParseExample")]
    assert set(model.signatures["serving_default"].inputs) == {
        *("age", "words", "day", "history", "fare", "company", "company_present", "clicks", "scores"),
        *(f"{name}_{'mask' if sparse == 'mask' else 'row_splits'}" for name in ("clicks", "scores")),
    }
    found = difference(expected, outputs(model, "serving_default", records))
    assert found.broken is None and found.relative < 1e-6
    assert "never_used" in log.notes[0]


def test_what_clients_send(model_path):
    model = cleaned(model_path)
    run(model, Log())
    steps = model.requests["serving_default"]
    drawn = examples.rows(6)
    by_hand = encode(steps, columns(steps[0]["features"], drawn))
    parsed = encode(steps, {"examples": examples.serialize(drawn)})
    assert by_hand.keys() == parsed.keys() == model.signatures["serving_default"].inputs.keys()
    for name, array in by_hand.items():
        np.testing.assert_array_equal(array, parsed[name])
        wanted = tf.as_dtype(model.signatures["serving_default"].inputs[name].dtype).as_numpy_dtype
        assert array.dtype == wanted, name
    assert by_hand["day"][:, 0].tolist() == [3, 5, 3, 5, 3, 5]
    assert by_hand["words"][0].tolist() == [b"none", b"none"]
    assert by_hand["fare"][:3, 0].tolist() == [-7.0, 3.5, 4.5]
    assert by_hand["company_present"][:, 0].tolist() == [False, True, True, True, False, True]
    assert by_hand["clicks_mask"].sum(axis=1).tolist() == [1, 2, 3, 0, 1, 2]


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, "feature 'age', row 0: wants 1 values, received 0"),
        ({"age": [1.0, 2.0]}, "feature 'age', row 0: wants 1 values, received 2"),
        ({"age": 1.0, "fare": [1.0, 2.0]}, "feature 'fare', row 0: wants 1 values, received 2"),
        ({"age": 1.0, "company": ["a", "b"]}, "input 'company', row 0: takes 1 value, received 2"),
    ],
)
def test_rows_that_do_not_fit(model_path, row, message):
    model = cleaned(model_path)
    run(model, Log())
    steps = model.requests["serving_default"]
    with pytest.raises(ValueError, match=message):
        encode(steps, columns(steps[0]["features"], [row]))


def test_the_old_signature_may_stay(model_path, tmp_path):
    data = examples.write(tmp_path / "rows.tfrecord", examples.rows(9))
    original = cleaned(model_path)
    verifier = Verifier(original, str(data), 0)
    nodes = original.node_count()
    model, step = run_pass(original, "compact_signature", {"keep_example_signature": True}, verifier)
    assert step.status == "applied" and step.max_error < 1e-6
    assert list(model.signatures) == ["serving_default", "serving_default_compact"]
    assert nodes < model.node_count() < 2.2 * nodes  # the inputs' own nodes come on top
    assert model.stands_for == {"serving_default_compact": "serving_default"}
    assert list(model.signatures["serving_default"].inputs) == ["examples"]
    # It is compared: a wrong weight in the copy alone is found.
    node = next(
        n for n in model.graph.nodes.values() if n.name.startswith("compact/") and n.op == "Pack" and len(n.input) == 7
    )
    model.graph.set_input(node.name, 0, node.input[1])
    assert verifier.check(model).broken


def test_saved_loaded_and_optimized(model_path, tmp_path):
    data = examples.write(tmp_path / "rows.tfrecord", examples.rows(9))
    model = load(model_path)
    verifier = Verifier(model, str(data), 0)
    for name, options in (*recipe.read("lossless").steps, ("compact_signature", {}), *recipe.read("lossless").steps):
        model, step = run_pass(model, name, options, verifier)
        assert step.status != "undone", step.notes
    saved_model.save(model, tmp_path / "saved")
    records = examples.serialize(examples.rows(5, seed=1))
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    made = encode(model.requests["serving_default"], {"examples": records})
    received = loaded.signatures["serving_default"](**{name: tf.constant(array) for name, array in made.items()})
    expected = tf.saved_model.load(str(model_path)).signatures["serving_default"](tf.constant(records))
    for name, tensor in expected.items():
        if tensor.dtype == tf.string:
            assert tensor.numpy().tolist() == received[name].numpy().tolist()
        else:
            np.testing.assert_allclose(received[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda x: {"y": tf.strings.length(x)}, "no parsing node|nothing to do|reads the serialized examples"),
        (
            lambda x: {"y": tf.io.parse_example(x, {"a": FLOAT})["a"], "n": tf.strings.length(x)},
            "reads the serialized examples too",
        ),
        (lambda x: {"y": tf.io.parse_example(x, {"a": FLOAT})["a"], "x": x}, "are an output"),
    ],
)
def test_what_is_refused(tmp_path, build, message):
    module = tf.Module()
    module.f = tf.function(build, input_signature=[tf.TensorSpec([None], tf.string)])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.f)
    with pytest.raises(TfoptError, match=message):
        run(load(tmp_path / "m"), Log())


FLOAT = tf.io.FixedLenFeature([], tf.float32)


SEQUENCE_CONTEXT = {"a": FLOAT, "v": tf.io.VarLenFeature(tf.int64)}
SEQUENCE_LISTS = {
    "d": tf.io.FixedLenSequenceFeature([2], tf.float32),
    "s": tf.io.VarLenFeature(tf.int64),
    "r": tf.io.RaggedFeature(tf.int64),
}


def sequence_example(a, v, d, s, r):
    lists = {"d": d, "s": s, "r": r}
    example = tf.train.SequenceExample()
    example.context.feature["a"].float_list.value.append(a)
    example.context.feature["v"].int64_list.value.extend(v)
    for name, steps in lists.items():
        for step in steps:
            feature = example.feature_lists.feature_list[name].feature.add()
            getattr(feature, "float_list" if name == "d" else "int64_list").value.extend(step)
    return example.SerializeToString()


@pytest.mark.parametrize("count", [1, 3])
def test_sequence_examples(tmp_path, count):
    def f(x):
        context, lists, lengths = tf.io.parse_sequence_example(x, SEQUENCE_CONTEXT, SEQUENCE_LISTS)
        return {
            "a": context["a"] + tf.cast(tf.sparse.reduce_sum(context["v"], axis=1), tf.float32),
            "d": tf.reduce_sum(lists["d"], axis=[1, 2]) + tf.cast(lengths["d"], tf.float32),
            "s": tf.sparse.to_dense(lists["s"], -1),
            "r": tf.reduce_sum(lists["r"], axis=2).to_tensor(-5),
        }

    module = tf.Module()
    module.f = tf.function(f, input_signature=[tf.TensorSpec([None], tf.string)])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.f)
    records = [
        sequence_example(1.5, [1, 2], [[1, 2], [3, 4]], [[1], [], [2, 3]], [[7, 8], [9]]),
        sequence_example(2.5, [], [[5, 6]], [[4, 5]], [[], [1]]),
        sequence_example(0, [3], [[7, 8]], [[6]], [[2, 2, 2]]),
    ][:count]
    model = cleaned(tmp_path / "m")
    expected = outputs_of(model, "x", records)
    log = Log()
    run(model, log)
    assert log.applied["feature list"] == 3
    received = outputs_of(model, "x", records)
    for name, array in expected.items():
        np.testing.assert_array_equal(received[name], array)


def outputs_of(model, name, records):
    with Function(model) as function:
        return function("serving_default", {name: np.array(records, object)})


def test_a_single_example(tmp_path):
    def f(x):
        parsed = tf.io.parse_single_example(x, {"a": FLOAT, "v": tf.io.VarLenFeature(tf.int64)})
        return {"y": tf.cast(tf.sparse.to_dense(parsed["v"]), tf.float32) * parsed["a"]}

    module = tf.Module()
    module.f = tf.function(f, input_signature=[tf.TensorSpec([], tf.string)])
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.f)
    example = tf.train.Example()
    example.features.feature["a"].float_list.value.append(2.0)
    example.features.feature["v"].int64_list.value.extend([4, 5])
    model = cleaned(tmp_path / "m")
    expected = outputs_of(model, "x", example.SerializeToString())
    run(model, Log())
    assert [len(i.tensor_shape.dim) for _, i in sorted(model.signatures["serving_default"].inputs.items())] == [0, 1]
    np.testing.assert_array_equal(outputs_of(model, "x", example.SerializeToString())["y"], expected["y"])
    assert expected["y"].tolist() == [8.0, 10.0]


def test_a_model_without_examples_is_an_error(plain_module):
    with pytest.raises(TfoptError, match="nothing to do"):
        run_pass(load(plain_module), "compact_signature", {}, None)


def test_learning_passes_stand_before():
    with pytest.raises(TfoptError, match="put quantize before compact_signature"):
        recipe.parse(
            ["prune_graph", "merge_duplicates", "fold_constants", "fold_affine", "compact_signature", "quantize"],
            "mine",
        )


@pytest.mark.parametrize(
    "name, files, inputs",
    [("tfx-chicago-taxi/estimator_serving", "chicago-taxi/tfexamples/Split-*/*", 12), ("tfx-penguin", None, 4)],
)
def test_real_models(shared, name, files, inputs):
    model = cleaned(shared / "models" / name)
    if files:
        file_names = tf.io.gfile.glob(str(shared / "data" / files))
        records = np.array(list(tf.data.TFRecordDataset(file_names, "GZIP").as_numpy_iterator()), object)
    else:
        records = examples_of_penguins(shared / "data/penguins/penguins_processed.csv")
    expected = {}
    with Function(model) as function:
        for signature, definition in model.signatures.items():
            expected[signature] = function(signature, {next(iter(definition.inputs)): records})
    olds = {signature: next(iter(definition.inputs)) for signature, definition in model.signatures.items()}
    run(model, Log())
    with Function(model) as function:
        for signature, outputs in expected.items():
            assert len(model.signatures[signature].inputs) == inputs
            assert model.signatures[signature].method_name == "tensorflow/serving/predict"
            found = difference(outputs, function(signature, {olds[signature]: records}))
            assert found.broken is None and found.relative < 1e-6


def examples_of_penguins(path):
    lines = [line.split(",") for line in path.read_text().split()]
    names = lines[0]
    records = []
    for line in lines[1:]:
        example = tf.train.Example()
        for key, value in zip(names, line, strict=True):
            if key != "species":
                example.features.feature[key].float_list.value.append(float(value))
        records.append(example.SerializeToString())
    return np.array(records, object)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"broadcast_inputs": "user_*"}, "--broadcast_inputs: recipe lossless has no pass broadcast_inputs"),
        ({"keep_example_signature": True}, "--keep_example_signature: recipe lossless has no pass compact_signature"),
        ({"recipe": "compact_signature"}, "no signature takes serialized tf.Examples"),
    ],
)
def test_what_a_run_refuses(plain_module, tmp_path, options, message):
    with pytest.raises(TfoptError, match=message):
        optimize(plain_module, tmp_path / "out", Options(**options))
    assert not (tmp_path / "out").exists()


def test_files_for_devices_have_a_client_too(tmp_path):
    module, spec = tf.Module(), {name: tf.io.FixedLenFeature([2], tf.float32) for name in "ab"}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, "examples")])
    def signature(examples):
        parsed = tf.io.parse_example(examples, spec)
        return {"y": 2 * parsed["a"] + parsed["b"]}

    tf.saved_model.save(module, str(tmp_path / "m"), signatures=signature)
    done = optimize(tmp_path / "m", tmp_path / "out", Options(recipe="compact_signature", tflite=("float32",)))
    (serving,) = (artifact for artifact in done.report.artifacts if artifact.name == "serving")
    assert any("the handing over of 2 inputs from Python" in note for note in serving.notes)
    device = done.directory / "device"
    assert {path.name for path in (device / "assets.extra").iterdir()} == {"signatures.json", "client.py"}
    with tf.io.TFRecordWriter(str(tmp_path / "rows.tfrecord")) as writer:
        for value in (1.0, 2.5, -3.0):
            floats = tf.train.FloatList(value=[value, -value])
            feature = {name: tf.train.Feature(float_list=floats) for name in "ab"}
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    found = evaluate([tmp_path / "m", device / "float32.tflite"], str(tmp_path / "rows.tfrecord"))
    assert found.rows == 3 and found.results[1].equivalence.max_error == 0 and not found.results[1].failure


def test_what_it_cannot_do_without_ends_the_run(tmp_path):
    module = tf.Module()
    spec = {"a": tf.io.VarLenFeature(tf.float32)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)])
    def total(examples):
        summed = tf.reduce_sum(tf.io.parse_example(examples, spec)["a"].values)
        return {"y": tf.fill(tf.shape(examples), summed)}

    module.f = total
    tf.saved_model.save(module, str(tmp_path / "m"), signatures=module.f)
    asked = Options(recipe="compact_signature", set=("compact_signature.sparse=row_splits",), tflite=())
    with pytest.raises(TfoptError, match="the number of rows is asked for, and no input has one row for each example"):
        optimize(tmp_path / "m", tmp_path / "out", asked)
    assert not (tmp_path / "out").exists()


def test_some_features_are_sent_once(model_path, tmp_path):
    data = examples.write(tmp_path / "rows.tfrecord", examples.rows(9))
    chosen = Options(
        recipe="compact_signature",
        broadcast_inputs="age, day",
        representative_data=str(data),
        measure_latency=False,
    )
    result = optimize(model_path, tmp_path / "out", chosen)
    (serving,) = (a for a in result.report.artifacts if a.name == "serving")
    assert not result.failed and serving.max_rel_error < 1e-5
    described = json.loads((tmp_path / "out/serving/1/assets.extra/signatures.json").read_text())["serving_default"]
    (once,) = (step["inputs"] for step in described["steps"] if step["step"] == "once")
    assert once == ["age", "day"]
    assert 1 in [tensor["shape"][0] for tensor in described["inputs"].values()]
