from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import REPO
from tests.serving.server.models import example, half_plus, two_inputs
from tfopt.serving.batching_parameters import BatchingParameters
from tfopt.serving.server import metrics
from tfopt.serving.server.errors import ServingError
from tfopt.serving.server.servable import LoadOptions, Servable

SIZES = BatchingParameters(
    max_batch_size=8, allowed_batch_sizes=(2, 4, 8), batch_timeout_micros=50_000, num_batch_threads=2
)


def value(name, model, signature="serving_default", **more):
    found = metrics.REGISTRY.get_sample_value(name, {"model_name": model, "signature": signature, **more})
    return found or 0.0


@pytest.fixture
def opened():
    servables = []

    def open_(name, path, batching=None, **more):
        servables.append(Servable(name, 1, path, LoadOptions(batching=batching, **more)))
        return servables[-1]

    yield open_
    for servable in servables:
        servable.close()


def concurrently(requests, threads=16):
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda request: request(), requests))


def assert_equal(servable, batched, signature, requests):
    outputs = list(servable.outputs[signature])
    expected = [servable.run(signature, request, outputs) for request in requests]
    found = concurrently([lambda r=request: batched.run(signature, r, outputs) for request in requests])
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if a.dtype.kind == "f":
                np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_array_equal(b, a)


def test_same_answers_in_batches_of_allowed_sizes(opened, tmp_path):
    path = two_inputs(tmp_path)
    random = np.random.default_rng(0)
    requests = [
        {
            "a": random.normal(size=(rows, 3)).astype(np.float32),
            "i": np.arange(rows) + number,
            "text": np.array([b"ja", b"nein", b"wer"] * 3, object)[:rows],
        }
        for number, rows in enumerate([1, 2, 1, 3, 1, 1, 2, 1, 8, 1, 1, 1])
    ]
    assert_equal(opened("plain", path), opened("sized", path, SIZES), "serving_default", requests)
    name = ":tensorflow:serving:batching:processed_batch_size"
    batches, rows = value(f"{name}_count", "sized"), value(f"{name}_sum", "sized")
    assert value("tfopt_batching_rows_total", "sized") == 23
    assert batches < len(requests)  # some were put together
    assert rows == 23 + value("tfopt_batching_padding_rows", "sized")
    sizes = [value(f"{name}_bucket", "sized", le=le) for le in ("1.0", "2.0", "4.0", "8.0", "+Inf")]
    assert sizes[0] == 0 and sizes[-1] == sizes[-2] == batches
    assert value("tfopt_batching_requests", "sized") == 0


def test_reference_variables_and_every_method_of_tf1(opened, tmp_path):
    path = half_plus(tmp_path, 1)
    plain, batched = opened("tf1", path), opened("tf1", path, SIZES)
    assert_equal(plain, batched, "serving_default", [{"x": np.float32([x, 2 * x])} for x in range(8)])
    texts = [np.array([example(x=float(x)).SerializeToString()], object) for x in range(8)]
    for signature in ("classify", "regress"):
        assert_equal(plain, batched, signature, [{"inputs": text} for text in texts])
        assert value("tfopt_batching_rows_total", "tf1", signature) == 8


@pytest.mark.parametrize("model", ["control_flow", "control_flow_switch_merge"])
def test_branches_and_loops(opened, built, model):
    plain = opened(model, built(model))
    batched = opened(model, built(model), BatchingParameters(max_batch_size=64, batch_timeout_micros=0))
    assert batched._batched
    for signature in batched._batched:
        (info,) = plain.signatures[signature].inputs.values()
        shape = [2, *[d.size for d in info.tensor_shape.dim][1:]]
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        (name,) = plain.inputs[signature]
        assert_equal(plain, batched, signature, [{name: x}])


def test_the_example_model(opened):
    path = REPO / "saved_models" / "digits"
    plain, batched = opened("digits", path), opened("digits", path, SIZES)
    ((name, info),) = plain.signatures["serving_default"].inputs.items()
    dims = [d.size for d in info.tensor_shape.dim][1:]
    requests = [{name: np.random.default_rng(i).random((1, *dims)).astype(np.float32)} for i in range(12)]
    assert_equal(plain, batched, "serving_default", requests)


def test_one_wrong_request_does_not_spoil_its_batch(opened, tmp_path):
    batched = opened("poison", half_plus(tmp_path, 1), SIZES)

    def ask(text):
        try:
            return batched.run("regress", {"inputs": np.array([text], object)}, ["outputs"])[0].tolist()
        except ServingError as error:
            return error.code.name

    good = example(x=2.0).SerializeToString()
    answers = concurrently([lambda t=text: ask(t) for text in [good, b"rubbish", good, good]])
    assert answers == [[[3.0]], "INVALID_ARGUMENT", [[3.0]], [[3.0]]]


def test_inputs_must_share_their_rows(opened, tmp_path):
    batched = opened("rows", two_inputs(tmp_path), SIZES)
    request = {"a": np.ones((2, 3), np.float32), "i": np.arange(3), "text": np.array([b"", b""], object)}
    with pytest.raises(ServingError, match="must have equal 0th-dimension size"):
        batched.run("serving_default", request, ["product"])
    request["i"] = np.array(1)
    with pytest.raises(ServingError, match="must have at least one dimension"):
        batched.run("serving_default", request, ["product"])
    request["a"], request["i"], request["text"] = np.ones((9, 3), np.float32), np.arange(9), np.array([b""] * 9, object)
    with pytest.raises(ServingError, match="Task size 9 is larger than maximum input batch size 8"):
        batched.run("serving_default", request, ["product"])


@pytest.mark.parametrize("allowed", [(), (2, 4), (2, 64)])
def test_large_requests_are_split(opened, tmp_path, allowed):
    parameters = BatchingParameters(
        max_batch_size=64,
        max_execution_batch_size=4,
        enable_large_batch_splitting=True,
        batch_timeout_micros=0,
        allowed_batch_sizes=allowed,
    )
    model = f"split{len(allowed)}{allowed[-1:]}"
    batched = opened(model, half_plus(tmp_path, 1), parameters)
    x = np.arange(30, dtype=np.float32)
    np.testing.assert_array_equal(batched.run("serving_default", {"x": x}, ["y"])[0], x / 2 + 2)
    name = ":tensorflow:serving:batching:processed_batch_size"
    assert value(f"{name}_count", model) == value(f"{name}_bucket", model, le="4.0") == 8


def test_an_empty_request_is_answered(opened, tmp_path):
    batched = opened("empty", half_plus(tmp_path, 1), SIZES)
    assert batched.run("serving_default", {"x": np.zeros(0, np.float32)}, ["y"])[0].shape == (0,)


def test_a_full_queue_is_unavailable(opened, tmp_path):
    parameters = BatchingParameters(max_batch_size=1, max_enqueued_batches=1, num_batch_threads=1)

    class Slow(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="x")])
        def serve(self, x):
            return {"y": tf.while_loop(lambda i, y: i < 30_000, lambda i, y: (i + 1, y + 1e-6), (0, x))[1]}

    module = Slow()
    tf.saved_model.save(module, str(tmp_path / "slow"), {"serving_default": module.serve})
    batched = opened("full", tmp_path / "slow", parameters)

    def ask():
        try:
            return batched.run("serving_default", {"x": np.zeros(1, np.float32)}, ["y"])[0].shape
        except ServingError as error:
            return error.code.name

    answers = concurrently([ask] * 12)
    assert "UNAVAILABLE" in answers and (1,) in answers and set(answers) == {"UNAVAILABLE", (1,)}


@pytest.mark.parametrize(
    "model, signature, words",
    [
        ("counter", "peek", "it has no inputs"),
        ("tf1_sparse", "serving_default", "'s' is not a dense tensor"),
    ],
)
def test_what_cannot_be_batched_is_said_and_served(opened, built, caplog, model, signature, words):
    batched = opened("odd", built(model), SIZES)
    assert signature not in batched._batched
    assert f"signature '{signature}' is not batched: " in caplog.text and words in caplog.text


def test_parameters_of_the_version_itself(opened, tmp_path, caplog):
    path = half_plus(tmp_path, 1)
    (path / "batching_params.pbtxt").write_text("max_batch_size { value: 3 }")
    assert not opened("own", path)._batched
    own = opened("own", path, SIZES, batching_per_model=True)
    assert own._batched["serving_default"].parameters.max_batch_size == 3
    assert opened("own", path, SIZES)._batched["serving_default"].parameters.max_batch_size == 8


def test_inputs_of_variable_length_are_not_padded_here(opened, tmp_path, caplog):
    class Any(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, None), tf.float32, name="x")])
        def serve(self, x):
            return {"y": tf.reduce_sum(x, 1)}

    module = Any()
    tf.saved_model.save(module, str(tmp_path / "any"), {"serving_default": module.serve})
    parameters = BatchingParameters(pad_variable_length_inputs=True)
    assert not opened("any", tmp_path / "any", parameters)._batched
    assert "does not pad_variable_length_inputs" in caplog.text


def test_a_real_estimator_on_its_real_examples(opened, shared):
    path = shared / "models" / "tfx-chicago-taxi" / "estimator_serving"
    files = sorted(map(str, (shared / "data" / "chicago-taxi" / "tfexamples" / "Split-eval").iterdir()))
    records = [r.numpy() for r in tf.data.TFRecordDataset(files[:1], "GZIP").take(60)]
    plain, batched = opened("taxi", path), opened("taxi", path, SIZES)
    requests = [{"inputs": np.array(records[i : i + 1 + i % 3], object)} for i in range(0, 57, 3)]
    assert_equal(plain, batched, "regression", requests)
    assert value(":tensorflow:serving:batching:processed_batch_size_count", "taxi", "regression") < len(requests)
