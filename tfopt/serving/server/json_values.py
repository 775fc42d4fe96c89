"""JSON values to arrays, by the rules of TensorFlow Serving's REST API.

A list of numbers is converted as a whole where it is regular and of the right kind; anything else is walked through
value by value, which finds the same array or the message that TensorFlow Serving gives.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any

import grpc
import numpy as np
import tensorflow as tf

from tfopt.serving.server.errors import ServingError, invalid

_INT_LIMITS = {
    name: (int(np.iinfo(name).min), int(np.iinfo(name).max))
    for name in ("int8", "int16", "int32", "int64", "uint8", "uint32", "uint64")
}
# The largest integer that each one holds exactly, and the largest number.
_EXACT = {"float": (2**24 - 1, float(np.finfo(np.float32).max)), "double": (2**53 - 1, float(np.finfo(np.float64).max))}


def at_once(values: list[Any], kind: str, booleans: bool) -> np.ndarray | None:
    """The array of a regular list of numbers; None where it has to be looked at closely."""
    if booleans or (kind not in _EXACT and kind not in _INT_LIMITS):
        return None
    try:
        array = np.array(values)
    except (ValueError, OverflowError):
        return None
    if not array.size or array.dtype.kind not in ("iuf" if kind in _EXACT else "iu"):
        return None
    if kind in _EXACT:
        whole, largest = _EXACT[kind]
        with np.errstate(invalid="ignore"):
            small = np.abs(array.astype(np.float64)) <= (largest if array.dtype.kind == "f" else whole)
            if not bool(np.all(small | ~np.isfinite(array))):
                return None
    else:
        least, most = _INT_LIMITS[kind]
        if int(array.min()) < least or int(array.max()) > most:
            return None
    return array.astype(_numpy(kind))


def tensor(value: Any, kind: str) -> np.ndarray:
    """The array of any JSON value.

    Args:
      value: a number, string, boolean, {"b64": ...}, or lists of them.
      kind: TensorFlow's name of the dtype: float, int32, string, ...

    Raises:
      ServingError: INVALID_ARGUMENT, UNIMPLEMENTED for dtypes that JSON cannot give.
    """
    shape: list[int] = []
    level = value
    while isinstance(level, list):
        shape.append(len(level))
        level = level[0] if level else None
    flat: list[Any] = []
    _collect(value, 0, shape, kind, flat)
    array = np.empty(len(flat), _numpy(kind))
    with np.errstate(over="ignore"):
        array[:] = flat if kind not in _INT_LIMITS else np.array(flat, np.int64 if kind != "uint64" else np.uint64)
    return array.reshape(shape)


def _collect(value: Any, level: int, shape: list[int], kind: str, flat: list[Any]) -> None:
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid(
                f"JSON Value: {show(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        flat.append(_value(value, kind))
        return
    if level >= len(shape):
        raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    for item in value:
        _collect(item, level + 1, shape, kind, flat)


def _value(value: Any, kind: str) -> Any:
    if isinstance(value, dict):
        if kind == "string":
            return decoded(value)
        raise _wrong_type(value, kind)
    if kind == "string":
        if isinstance(value, str):
            return value.encode()
        raise _wrong_type(value, kind)
    if kind == "bool":
        if isinstance(value, bool):
            return value
        raise _wrong_type(value, kind)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong_type(value, kind)
    if kind in _EXACT:
        whole, largest = _EXACT[kind]
        if math.isfinite(value) and abs(value) > (whole if isinstance(value, int) else largest):
            raise invalid(f"Cannot convert JSON value: {show(value)} to {kind} without loss of precision.")
        return value
    if kind not in _INT_LIMITS:
        raise ServingError(grpc.StatusCode.UNIMPLEMENTED, f"Conversion of JSON Value: {show(value)} to type: {kind}")
    least, most = _INT_LIMITS[kind]
    if not isinstance(value, int) or not least <= value <= most:
        raise _wrong_type(value, kind)
    return value


def decoded(value: dict[str, Any]) -> bytes:
    """The bytes of {"b64": ...}; raises ServingError where it is none."""
    if not is_b64(value):
        raise invalid(f"JSON Value: {show(value)} not formatted correctly for base64 data")
    text = value["b64"].strip()
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise invalid("Unable to base64 decode") from error


def is_b64(value: Any) -> bool:
    """Whether it is {"b64": "..."} and nothing else."""
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def _wrong_type(value: Any, kind: str) -> ServingError:
    return invalid(f"JSON Value: {show(value)} Type: {type_of(value)} is not of expected type: {kind}")


def show(value: Any) -> str:
    """A JSON value as messages show it."""
    return json.dumps(value, indent=4, ensure_ascii=False)


def type_of(value: Any) -> str:
    """The JSON type of a value, as messages name it."""
    names = {dict: "Object", list: "Array", str: "String", type(None): "Null"}
    return str(value) if isinstance(value, bool) else names.get(type(value), "Number")


def type_name(number: int) -> str:
    """TensorFlow Serving's name of a DataType: float, double, int32, string, ..."""
    name = tf.as_dtype(number).name
    return {"float32": "float", "float64": "double", "float16": "half"}.get(name, name)


def _numpy(kind: str) -> Any:
    known = {"float": np.float32, "double": np.float64, "string": object, "bool": bool}
    return known.get(kind) or tf.as_dtype(kind).as_numpy_dtype
