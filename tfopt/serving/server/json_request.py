"""JSON request bodies: rows or columns of tensors, and examples, by the rules of TensorFlow Serving's REST API."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from tensorflow.core.example import example_pb2

from tfopt.serving.server.errors import ServingError, invalid
from tfopt.serving.server.json_values import at_once, decoded, is_b64, show, tensor, type_name, type_of

_LARGEST = float(np.finfo(np.float32).max)


def parse(body: bytes) -> dict[str, Any]:
    """The object that a request body holds; NaN and Infinity are numbers.

    Raises:
      ServingError: INVALID_ARGUMENT, with the offset of the error.
    """
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    try:
        document = json.loads(body)
    except json.JSONDecodeError as error:
        raise invalid(f"JSON Parse error: Invalid value. at offset: {error.pos}") from error
    except (UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"JSON Parse error: {type(error).__name__}: {error}") from error
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {show(document)} Is not object")
    return document


def signature_name(document: dict[str, Any]) -> str:
    """What the document asks for; "" where it does not say.

    Raises:
      ServingError: INVALID_ARGUMENT where it is no string.
    """
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid(
            f"JSON Value: {show(document)} not formatted correctly. 'signature_name' key must be a string value."
        )
    return name


def tensors(document: dict[str, Any], infos: dict[str, Any], booleans: bool = True) -> tuple[dict[str, Any], bool]:
    """The input arrays of a :predict request.

    Args:
      document: of the request.
      infos: TensorInfo by input.
      booleans: whether the text holds `true` or `false` anywhere, which NumPy would take for numbers.

    Returns:
      Array by input, and whether they came as rows (`instances`).

    Raises:
      ServingError: INVALID_ARGUMENT.
    """
    if "instances" in document and "inputs" in document:
        raise invalid(
            f"JSON Value: {show(document)} Not formatted correctly expecting only one of 'inputs' or 'instances' "
            "keys to exist "
        )
    types = {name: type_name(info.dtype) for name, info in sorted(infos.items())}
    if "instances" in document:
        instances = document["instances"]
        if not isinstance(instances, list):
            raise invalid(f"JSON Value: {show(document)} Excepting 'instances' to be an list/array")
        if not instances:
            raise invalid(f"JSON Value: {show(document)} No values in 'instances' array")
        return _rows(instances, types, booleans), True
    if "inputs" in document:
        return _columns(document["inputs"], types, booleans), False
    raise invalid("Missing 'inputs' or 'instances' key")


def _rows(instances: list[Any], types: dict[str, str], booleans: bool) -> dict[str, np.ndarray]:
    if not isinstance(instances[0], dict) and len(types) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple input tensors required as per "
            "tensorinfo_map"
        )
    objects = _is_object(instances[0])
    for index, row in enumerate(instances):
        if objects and not _is_object(row):
            raise invalid(f"Expecting object but got list at item {index} of input list")
        if not objects and _is_object(row):
            raise invalid(f"Expecting value/list but got object at item {index} of input list")
    if not objects:
        name, kind = next(iter(types.items()))
        return {name: _column(instances, name, kind, booleans, "")}
    for index, row in enumerate(instances):
        for name in row:
            if name not in types:
                raise _element(index, f" key: {name}", f"JSON object: does not have named input: {name}")
        if row.keys() != types.keys():
            raise invalid(
                f"Failed to process element: {index} of 'instances' list. JSON object: {show(row)} must only have "
                f"keys: {','.join(types)}"
            )
    return {
        name: _column([row[name] for row in instances], name, kind, booleans, f" key: {name}")
        for name, kind in types.items()
    }


def _column(values: list[Any], name: str, kind: str, booleans: bool, key: str) -> np.ndarray:
    """One input's values, row by row: all have one shape."""
    fast = at_once(values, kind, booleans)
    if fast is not None:
        return fast
    arrays: list[np.ndarray] = []
    for index, value in enumerate(values):
        try:
            array = tensor(value, kind)
        except ServingError as error:
            raise _element(index, key, error.message, error.code.name) from error
        if arrays and array.size != arrays[0].size:
            raise _element(index, key, f"Expecting tensor size: {arrays[0].size} but got: {array.size}")
        if arrays and array.shape != arrays[0].shape:
            raise _element(index, key, f"Expecting shape {_shape(arrays[0])} but got: {_shape(array)}")
        arrays.append(array)
    return np.stack(arrays)


def _columns(given: Any, types: dict[str, str], booleans: bool) -> dict[str, np.ndarray]:
    if not _is_object(given):
        if len(types) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple input tensors required as per "
                "tensorinfo_map"
            )
        return {name: _whole(given, kind, booleans) for name, kind in types.items()}
    for name in types:
        if name not in given:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
    return {name: _whole(given[name], kind, booleans) for name, kind in types.items()}


def _whole(value: Any, kind: str, booleans: bool) -> np.ndarray:
    fast = at_once(value, kind, booleans) if isinstance(value, list) else None
    return tensor(value, kind) if fast is None else fast


def examples(document: dict[str, Any], into: Any) -> None:
    """Writes the examples of a :classify or :regress request into an Input.

    Raises:
      ServingError: INVALID_ARGUMENT.
    """
    given = document.get("examples")
    if "examples" not in document:
        raise invalid(
            f"JSON Value: {show(document)} When method is classify, key 'examples' is expected and was not found"
        )
    if not isinstance(given, list):
        raise invalid(f"JSON Value: {show(document)} Expecting 'examples' value to be an list/array")
    if not given:
        raise invalid(f"JSON Value: {show(document)} 'examples' value is an empty array")
    target = into.example_list
    if "context" in document:
        target = into.example_list_with_context
        _example(document["context"], target.context)
    for item in given:
        _example(item, target.examples.add())


def _example(value: Any, into: example_pb2.Example) -> None:
    if not isinstance(value, dict):
        raise invalid(f"Example must be JSON object but got JSON {type_of(value)}")
    for name, content in value.items():
        feature = into.features.feature[name]
        for item in content if isinstance(content, list) else [content]:
            _add(item, name, feature)


def _add(value: Any, name: str, feature: Any) -> None:
    if isinstance(value, str) or is_b64(value):
        kind, item = "bytes_list", decoded(value) if isinstance(value, dict) else value.encode()
    elif isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise invalid(f"Feature: {name} has uint64 element. Only int64 is supported.")
        kind, item = "int64_list", int(value)
    elif isinstance(value, float):
        if math.isfinite(value) and abs(value) > _LARGEST:
            raise invalid(f"Cannot convert JSON value: {show(value)} to float without loss of precision.")
        kind, item = "float_list", value
    else:
        raise invalid(f"Feature: {name} has element with unexpected JSON type: {type_of(value)}")
    known = feature.WhichOneof("kind")
    if known not in (None, kind):
        raise invalid(f"Unexpected element type in feature: {name} expecting type: {known.removesuffix('_list')}")
    getattr(feature, kind).value.append(item)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and not is_b64(value)


def _element(index: int, key: str, message: str, code: str = "INVALID_ARGUMENT") -> ServingError:
    return invalid(f"Failed to process element: {index}{key} of 'instances' list. Error: {code}: {message}")


def _shape(array: np.ndarray) -> str:
    return f"[{','.join(map(str, array.shape))}]"
