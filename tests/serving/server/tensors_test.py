import numpy as np
import pytest
import tensorflow as tf

from tfopt.serving.server.errors import ServingError
from tfopt.serving.server.tensors import fill, to_array, to_proto

DTYPES = [
    np.float32, np.float64, np.float16, tf.bfloat16.as_numpy_dtype, np.int8, np.int16, np.int32, np.int64, np.uint8,
    np.uint16, np.uint32, np.uint64, np.bool_, np.complex64, np.complex128,
]  # fmt: skip


@pytest.mark.parametrize("as_content", [False, True])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 4), (1, 1, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_tensorflow_reads_what_is_written_and_the_other_way_round(dtype, shape, as_content):
    array = (np.arange(int(np.prod(shape)), dtype=np.float64) * 37 % 120).reshape(shape).astype(dtype)
    proto = to_proto(array, as_content)
    np.testing.assert_array_equal(tf.make_ndarray(proto), array)
    assert tf.make_ndarray(proto).dtype == array.dtype
    for made in (proto, tf.make_tensor_proto(array)):
        back = to_array(made, "x")
        assert back.dtype == array.dtype and back.shape == array.shape
        np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize("shape", [(), (2,), (2, 1), (0,)])
def test_strings(shape):
    array = np.full(shape, b"\x00\xff", object)
    proto = to_proto(array)
    assert list(proto.string_val) == [b"\x00\xff"] * array.size
    assert to_array(proto, "x").tolist() == array.tolist()
    assert to_array(tf.make_tensor_proto(array, tf.string, shape), "x").tolist() == array.tolist()


def test_a_session_gives_scalars_as_python_objects():
    assert to_proto(np.float32(2.5)).float_val == [2.5]
    assert to_proto(b"a").string_val == [b"a"]
    assert to_proto(np.int64(-3)).int64_val == [-3]


def test_answers_have_their_values_in_the_typed_field_that_clients_read():
    assert list(to_proto(np.array([1.5, -2], np.float32)).float_val) == [1.5, -2]
    assert list(to_proto(np.array([1, -2], np.int64)).int64_val) == [1, -2]
    assert list(to_proto(np.array([True, False])).bool_val) == [True, False]
    assert not to_proto(np.ones(3, np.float32)).tensor_content
    assert len(to_proto(np.ones(3, np.float32), as_content=True).tensor_content) == 12


def test_the_last_value_stands_for_those_that_follow():
    proto = tf.make_tensor_proto(np.zeros((2, 3), np.float32))
    proto.ClearField("tensor_content")
    proto.float_val[:] = [1, 2]
    assert to_array(proto, "x").tolist() == [[1, 2, 2], [2, 2, 2]]
    proto.ClearField("float_val")
    assert to_array(proto, "x").tolist() == [[0, 0, 0], [0, 0, 0]]


def broken(change):
    proto = tf.make_tensor_proto(np.zeros((2, 3), np.float32))
    change(proto)
    return proto


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda p: setattr(p, "tensor_content", b"123"), "tensor_content has 3 bytes"),
        (lambda p: setattr(p.tensor_shape.dim[0], "size", -1), "shape is not known"),
        (lambda p: setattr(p.tensor_shape.dim[0], "size", 7), "takes 84"),
        (lambda p: setattr(p.tensor_shape.dim[0], "size", 1 << 60), "more elements than a message can hold"),
        (lambda p: setattr(p.tensor_shape, "unknown_rank", True), "shape is not known"),
        (lambda p: setattr(p, "dtype", 0), "cannot be received"),
        (lambda p: (p.ClearField("tensor_content"), p.float_val.extend([1.0] * 7)), "7 values"),
        (lambda p: (setattr(p, "dtype", 6), p.ClearField("tensor_content"), p.int_val.extend([1000])), "out of bounds"),
    ],
)
def test_what_does_not_fit_together_is_invalid(change, words):
    with pytest.raises(ServingError, match=words) as error:
        to_array(broken(change), "x")
    assert error.value.code.name == "INVALID_ARGUMENT"
    assert error.value.message.startswith("tensor parsing error: x")


def test_fill_of_quantized_dtypes():
    proto = tf.make_tensor_proto(np.array([1, 2], tf.qint8.as_numpy_dtype), tf.qint8)
    made = type(proto)()
    fill(made, tf.make_ndarray(proto))
    assert made.dtype == proto.dtype
