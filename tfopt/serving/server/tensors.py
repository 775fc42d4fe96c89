"""TensorProto to NumPy and back, with as few copies and Python objects as the protocol allows.

A request's `tensor_content` is read in place. An answer has its values in the typed fields (`float_val`, ...), which is
what clients of TensorFlow Serving read; those whose wire form is the array's own bytes are written as such bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2, types_pb2

from tfopt.serving.server.errors import invalid

_FIELDS = {
    types_pb2.DT_FLOAT: "float_val",
    types_pb2.DT_DOUBLE: "double_val",
    types_pb2.DT_INT32: "int_val",
    types_pb2.DT_INT16: "int_val",
    types_pb2.DT_UINT16: "int_val",
    types_pb2.DT_INT8: "int_val",
    types_pb2.DT_UINT8: "int_val",
    types_pb2.DT_INT64: "int64_val",
    types_pb2.DT_BOOL: "bool_val",
    types_pb2.DT_UINT32: "uint32_val",
    types_pb2.DT_UINT64: "uint64_val",
    types_pb2.DT_STRING: "string_val",
}
_DTYPES = {n: np.dtype(tf.as_dtype(n).as_numpy_dtype) for n in _FIELDS} | {
    types_pb2.DT_STRING: np.dtype(object),
    types_pb2.DT_HALF: np.dtype(np.float16),
    types_pb2.DT_BFLOAT16: np.dtype(tf.bfloat16.as_numpy_dtype),
    types_pb2.DT_COMPLEX64: np.dtype(np.complex64),
    types_pb2.DT_COMPLEX128: np.dtype(np.complex128),
}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
_MOST = 1 << 31  # elements, as one value may stand for many: a few bytes must not ask for all memory
# Packed repeated fields whose wire form is the little-endian array: field number << 3 | 2.
_AS_BYTES = {types_pb2.DT_FLOAT: b"\x2a", types_pb2.DT_DOUBLE: b"\x32", types_pb2.DT_BOOL: b"\x5a"}


def to_array(proto: Any, name: str) -> np.ndarray:
    """The array of a TensorProto; it may share the message's bytes, and is read only then.

    Args:
      proto: of any dtype that a client can send.
      name: of the input, for messages.

    Raises:
      ServingError: INVALID_ARGUMENT where dtype, shape and values do not fit together.
    """
    dtype = _DTYPES.get(proto.dtype)
    if dtype is None:
        raise invalid(f"tensor parsing error: {name}: dtype {proto.dtype} cannot be received")
    shape = [d.size for d in proto.tensor_shape.dim]
    if proto.tensor_shape.unknown_rank or any(size < 0 for size in shape):
        raise invalid(f"tensor parsing error: {name}: its shape is not known")
    count = 1
    for size in shape:
        count *= size
    if count > _MOST:
        raise invalid(f"tensor parsing error: {name}: shape {shape} has more elements than a message can hold")
    content = proto.tensor_content
    strings = proto.dtype == types_pb2.DT_STRING
    if content and not strings:
        if len(content) != count * dtype.itemsize:
            raise invalid(
                f"tensor parsing error: {name}: tensor_content has {len(content)} bytes, "
                f"shape {shape} of {dtype.name} takes {count * dtype.itemsize}"
            )
        return np.frombuffer(content, dtype).reshape(shape)
    if content or proto.dtype not in _FIELDS:
        try:
            return np.asarray(tf.make_ndarray(proto))
        except (ValueError, TypeError) as error:
            raise invalid(f"tensor parsing error: {name}: {error}") from error
    values = getattr(proto, _FIELDS[proto.dtype])
    given = len(values)
    if given > count:
        raise invalid(f"tensor parsing error: {name}: {given} values for shape {shape}")
    array = np.empty(given, object) if strings else None
    if array is None:
        try:
            array = np.array(values, dtype)
        except (OverflowError, ValueError) as error:
            raise invalid(f"tensor parsing error: {name}: {error}") from error
    else:
        array[:] = values
    if given < count:  # as TensorFlow reads them: the last value stands for those that follow, none at all for 0
        last = array[-1:] if given else np.array([b"" if strings else 0], dtype)
        array = np.concatenate([array, np.repeat(last, count - given)])
    return array.reshape(shape)


def fill(proto: Any, array: Any, as_content: bool = False) -> None:
    """Writes an array into an empty TensorProto.

    Args:
      proto: a TensorProto.
      array: what a session run returned: an array or a NumPy scalar, strings as objects.
      as_content: put the values of numeric arrays into `tensor_content` rather than into the typed field.
    """
    if not isinstance(array, np.ndarray):
        array = np.asarray(array, object if isinstance(array, bytes | str) else None)
    number = _NUMBERS.get(array.dtype)
    if number is None:  # quantized dtypes
        proto.CopyFrom(tf.make_tensor_proto(array))
        return
    proto.dtype = number
    dims = proto.tensor_shape.dim
    for size in array.shape:
        dims.add().size = size
    if not array.size:
        return
    tag = _AS_BYTES.get(number)
    if as_content and number != types_pb2.DT_STRING:
        proto.tensor_content = array.tobytes()
    elif tag is not None:
        data = array.tobytes()
        proto.MergeFromString(tag + _varint(len(data)) + data)
    elif (field := _FIELDS.get(number)) is not None:
        getattr(proto, field).extend(array.ravel().tolist())
    elif number in (types_pb2.DT_HALF, types_pb2.DT_BFLOAT16):
        proto.half_val.extend(array.view(np.uint16).ravel().tolist())
    else:
        proto.tensor_content = array.tobytes()


def to_proto(array: Any, as_content: bool = False) -> tensor_pb2.TensorProto:
    """A new TensorProto of an array; see fill."""
    proto = tensor_pb2.TensorProto()
    fill(proto, array, as_content)
    return proto


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)
