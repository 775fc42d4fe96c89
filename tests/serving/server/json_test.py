import base64
import json

import numpy as np
import pytest
from tensorflow.core.protobuf import meta_graph_pb2
from tensorflow_serving.apis import input_pb2

from tfopt.serving.server import json_answer, json_request
from tfopt.serving.server.errors import ServingError


def infos(**types):
    return {name: meta_graph_pb2.TensorInfo(dtype=number) for name, number in types.items()}


FLOAT, DOUBLE, INT32, UINT8, STRING, INT64, BOOL, HALF = 1, 2, 3, 4, 7, 9, 10, 19


def read(text, **types):
    body = text.encode()
    document = json_request.parse(body)
    return json_request.tensors(document, infos(**types), b"true" in body or b"false" in body)


@pytest.mark.parametrize(
    "text, types, expected",
    [
        ('{"instances": [1, 2.5, -3e2]}', {"x": FLOAT}, [1, 2.5, -300]),
        ('{"instances": [[1, 2], [3, 4]]}', {"x": DOUBLE}, [[1, 2], [3, 4]]),
        ('{"instances": [{"x": [1]}, {"x": [2]}]}', {"x": INT32}, [[1], [2]]),
        ('{"inputs": [[1, 2], [3, 4]]}', {"x": INT64}, [[1, 2], [3, 4]]),
        ('{"inputs": 7}', {"x": UINT8}, 7),
        ('{"inputs": {"x": [9223372036854775807]}}', {"x": INT64}, [2**63 - 1]),
        ('{"instances": [true, false]}', {"x": BOOL}, [True, False]),
        ('{"instances": ["a", {"b64": "/w=="}, "ü"]}', {"x": STRING}, [b"a", b"\xff", "ü".encode()]),
        ('{"inputs": {"b64": "aGFsbG8="}}', {"x": STRING}, b"hallo"),
        ('{"instances": [[], []]}', {"x": FLOAT}, [[], []]),
    ],
)
def test_values(text, types, expected):
    arrays, rows = read(text, **types)
    assert arrays["x"].tolist() == expected
    assert rows == ("instances" in text)


def test_nan_and_infinity_are_numbers():
    arrays, _ = read('{"instances": [NaN, Infinity, -Infinity]}', x=FLOAT)
    np.testing.assert_array_equal(arrays["x"], np.float32([np.nan, np.inf, -np.inf]))


def test_rows_and_columns_of_several_inputs():
    rows, _ = read('{"instances": [{"a": [1, 2], "s": "x"}, {"s": "y", "a": [3, 4]}]}', a=FLOAT, s=STRING)
    columns, _ = read('{"inputs": {"a": [[1, 2], [3, 4]], "s": ["x", "y"], "more": 1}}', a=FLOAT, s=STRING)
    for name in "as":
        assert rows[name].tolist() == columns[name].tolist()


@pytest.mark.parametrize(
    "text, types, message",
    [
        ("", {"x": FLOAT}, "JSON Parse error: The document is empty"),
        ("[1]", {"x": FLOAT}, "Is not object"),
        ('{"instances": [1.0,', {"x": FLOAT}, "JSON Parse error: Invalid value. at offset: 19"),
        ("{}", {"x": FLOAT}, "Missing 'inputs' or 'instances' key"),
        ('{"instances": [1], "inputs": [1]}', {"x": FLOAT}, "only one of 'inputs' or 'instances'"),
        ('{"instances": 1}', {"x": FLOAT}, "Excepting 'instances' to be an list/array"),
        ('{"instances": []}', {"x": FLOAT}, "No values in 'instances' array"),
        ('{"instances": ["a"]}', {"x": FLOAT}, 'JSON Value: "a" Type: String is not of expected type: float'),
        ('{"instances": [true, 1.0]}', {"x": FLOAT}, "JSON Value: true Type: True is not of expected type: float"),
        ('{"instances": [null]}', {"x": INT32}, "Type: Null is not of expected type: int32"),
        ('{"instances": [1.5]}', {"x": INT32}, "JSON Value: 1.5 Type: Number is not of expected type: int32"),
        ('{"instances": [1, 2.0]}', {"x": INT64}, "Type: Number is not of expected type: int64"),
        ('{"instances": [3000000000]}', {"x": INT32}, "is not of expected type: int32"),
        ('{"instances": [1]}', {"x": STRING}, "is not of expected type: string"),
        ('{"instances": [16777217]}', {"x": FLOAT}, "Cannot convert JSON value: 16777217 to float without loss"),
        ('{"instances": [1e39]}', {"x": FLOAT}, "to float without loss of precision"),
        ('{"instances": [[1, 2], [3]]}', {"x": FLOAT}, "element: 1 of 'instances' list. Error: INVALID_ARGUMENT: Exp"),
        ('{"instances": [[1], 2]}', {"x": FLOAT}, r"Expecting shape \[1\] but got: \[\]"),
        ('{"inputs": [[1, 2], [3]]}', {"x": FLOAT}, "Encountered list at unexpected size: 1 at level: 1 expected"),
        ('{"inputs": [1, [3]]}', {"x": FLOAT}, "Encountered list at unexpected level: 1 expected < 1"),
        ('{"inputs": [[1], 2]}', {"x": FLOAT}, "found at incorrect level: 2 in the JSON DOM. Expected at level: 2"),
        ('{"instances": [1]}', {"a": FLOAT, "b": FLOAT}, "expecting list of objects as multiple input tensors"),
        ('{"inputs": [1]}', {"a": FLOAT, "b": FLOAT}, "expecting an object as multiple input tensors required"),
        ('{"instances": [{"a": 1}]}', {"a": FLOAT, "b": FLOAT}, "must only have keys: a,b"),
        ('{"instances": [{"c": 1}]}', {"a": FLOAT}, "key: c of .* JSON object: does not have named input: c"),
        ('{"instances": [{"a": 1}, 2]}', {"a": FLOAT}, "Expecting object but got list at item 1"),
        ('{"instances": [1, {"a": 1}]}', {"a": FLOAT}, "Expecting value/list but got object at item 1"),
        ('{"inputs": {"a": 1}}', {"a": FLOAT, "b": FLOAT}, "Missing named input: b in 'inputs' object."),
        ('{"instances": [{"b64": "%%"}]}', {"x": STRING}, "Unable to base64 decode"),
        ('{"inputs": {"x": [{"b64": 1}]}}', {"x": STRING}, "not formatted correctly for base64 data"),
        ('{"signature_name": 1, "instances": [1]}', {"x": FLOAT}, "'signature_name' key must be a string value"),
    ],
)
def test_what_is_wrong_is_said_as_tensorflow_serving_says_it(text, types, message):
    with pytest.raises(ServingError, match=message) as error:
        document = json_request.parse(text.encode())
        json_request.signature_name(document)
        read(text, **types)
    assert error.value.code.name == "INVALID_ARGUMENT"


def test_dtypes_that_json_cannot_give():
    with pytest.raises(ServingError, match="to type: half") as error:
        read('{"inputs": [1.0]}', x=HALF)
    assert error.value.code.name == "UNIMPLEMENTED"
    with pytest.raises(ServingError, match=r"Error: UNIMPLEMENTED: Conversion of JSON Value: 1\.0 to type: half"):
        read('{"instances": [1.0]}', x=HALF)


def test_examples():
    found = input_pb2.Input()
    text = (
        b'{"context": {"c": 1}, "examples": [{"f": [1.5, 2.0], "i": 3, "b": true, "s": "a", "r": {"b64": "/w=="}}, {}]}'
    )
    json_request.examples(json_request.parse(text), found)
    context, examples = found.example_list_with_context.context, found.example_list_with_context.examples
    assert context.features.feature["c"].int64_list.value == [1] and len(examples) == 2
    feature = examples[0].features.feature
    assert feature["f"].float_list.value == [1.5, 2.0]
    assert (feature["i"].int64_list.value, feature["b"].int64_list.value) == ([3], [1])
    assert (feature["s"].bytes_list.value, feature["r"].bytes_list.value) == ([b"a"], [b"\xff"])


@pytest.mark.parametrize(
    "text, message",
    [
        ("{}", "key 'examples' is expected and was not found"),
        ('{"examples": 1}', "Expecting 'examples' value to be an list/array"),
        ('{"examples": []}', "'examples' value is an empty array"),
        ('{"examples": [1]}', "Example must be JSON object but got JSON Number"),
        ('{"examples": [{"a": [1, 1.5]}]}', "Unexpected element type in feature: a expecting type: int64"),
        ('{"examples": [{"a": null}]}', "Feature: a has element with unexpected JSON type: Null"),
        ('{"examples": [{"a": [[1]]}]}', "Feature: a has element with unexpected JSON type: Array"),
        ('{"examples": [{"a": 9223372036854775808}]}', "has uint64 element. Only int64 is supported"),
        ('{"examples": [{"a": 1e39}]}', "to float without loss of precision"),
    ],
)
def test_examples_that_are_wrong(text, message):
    with pytest.raises(ServingError, match=message):
        json_request.examples(json_request.parse(text.encode()), input_pb2.Input())


def test_answers_in_rows_and_columns():
    a, s = np.float32([[0.2, 1], [3, 4]]), np.array([b"x", b'"y"'], object)
    assert json.loads(json_answer.predictions({"a": a}, rows=True)) == {"predictions": [[0.2, 1], [3, 4]]}
    assert json.loads(json_answer.predictions({"a": a}, rows=False)) == {"outputs": [[0.2, 1], [3, 4]]}
    both = {"a": a, "s": s, "s_bytes": s}
    assert json.loads(json_answer.predictions(both, rows=True))["predictions"] == [
        {"a": [0.2, 1], "s": "x", "s_bytes": {"b64": base64.b64encode(b"x").decode()}},
        {"a": [3, 4], "s": '"y"', "s_bytes": {"b64": base64.b64encode(b'"y"').decode()}},
    ]
    columns = json.loads(json_answer.predictions(both, rows=False))["outputs"]
    assert columns["a"] == [[0.2, 1], [3, 4]] and columns["s"] == ["x", '"y"']
    assert columns["s_bytes"][0] == {"b64": "eA=="}


@pytest.mark.parametrize("shape", [(1,), (2, 3), (2, 0, 3), (2, 3, 0), (1, 1, 1, 1), (2, 2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, np.bool_])
def test_any_shape_comes_back(shape, dtype):
    array = np.random.default_rng(0).normal(size=shape).astype(dtype) * np.array(100).astype(dtype)
    for rows, key in ((True, "predictions"), (False, "outputs")):
        found = np.array(json.loads(json_answer.predictions({"y": array}, rows))[key], dtype)
        np.testing.assert_array_equal(found.reshape(shape), array)


def test_numbers_have_few_digits_and_come_back_exactly():
    values = np.float32([0.2, 1, 1e-7, 9e6, 1 / 3, 16777216, 1e30, -0.0, np.nan, np.inf, -np.inf])
    text = json_answer.predictions({"y": values}, rows=False).decode()
    assert "[0.2, 1.0, 1e-07, 9e+06, 0.333333343, 16777216.0, 1e+30, -0.0, NaN, Infinity, -Infinity]" in text
    np.testing.assert_array_equal(np.float32(json.loads(text)["outputs"]), values)
    exact = np.random.default_rng(0).normal(size=1000)
    for dtype in (np.float32, np.float64):
        found = json.loads(json_answer.predictions({"y": exact.astype(dtype)}, rows=True))["predictions"]
        np.testing.assert_array_equal(np.array(found, dtype), exact.astype(dtype))


@pytest.mark.parametrize(
    "outputs, message",
    [
        ({"y": np.array(1.0)}, "Tensor name: y has no shape information"),
        ({"y": np.zeros((0, 2))}, "Tensor name: y has invalid batch size: 0"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, "b has inconsistent batch size: 3 expecting: 2"),
        ({"y": np.zeros(2, np.complex64)}, "Failed to write JSON value"),
    ],
)
def test_what_has_no_rows_is_an_error(outputs, message):
    with pytest.raises(ServingError, match=message):
        json_answer.predictions(outputs, rows=True)
