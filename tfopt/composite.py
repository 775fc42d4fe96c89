"""Random values for sparse and ragged inputs, whose components must agree with each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from tensorflow.core.framework.tensor_shape_pb2 import TensorShapeProto
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef, TensorInfo
from tensorflow.core.protobuf.struct_pb2 import TypeSpecProto

from tfopt.random_inputs import Draw


def names(signature: SignatureDef) -> frozenset[str]:
    """The inputs `name:component` of a signature's sparse and ragged inputs."""
    return frozenset(name for key, info in signature.inputs.items() for name in _components(key, info))


def probes(signature: SignatureDef, dtypes: dict[str, Any], draw: Draw, rows: int, size: int) -> dict:
    """Draws the components of every sparse and ragged input.

    Args:
      signature: the signature.
      dtypes: of the inputs, by `name:component`, as `Draw` takes them.
      draw: draws the values.
      rows: for an unknown first dimension.
      size: for every other unknown dimension.

    Returns:
      `name:component` -> array.
    """
    arrays: dict[str, np.ndarray] = {}
    for key, info in sorted(signature.inputs.items()):
        parts = _components(key, info)
        if not parts:
            continue
        known = _static_shape(info)
        dims = [-1, -1] if known.unknown_rank else [d.size for d in known.dim]
        shape = [(rows if axis == 0 else size) if d < 0 else d for axis, d in enumerate(dims)]
        if info.WhichOneof("encoding") == "coo_sparse":
            values, indices, dense_shape = parts
        elif info.composite_tensor.type_spec.type_spec_class == TypeSpecProto.SPARSE_TENSOR_SPEC:
            indices, values, dense_shape = parts
        else:
            arrays.update(_ragged(info, parts, dtypes, draw, shape))
            continue
        # Every second cell, in row-major order, as sparse ops want it.
        cells = np.array(list(itertools.islice(np.ndindex(*shape), 0, None, 2)), np.int64).reshape(-1, len(shape))
        arrays[indices] = cells
        arrays[values] = draw(dtypes[values], [len(cells)])
        arrays[dense_shape] = np.array(shape, np.int64)
    return arrays


def _static_shape(info: TensorInfo) -> TensorShapeProto:
    if info.WhichOneof("encoding") == "coo_sparse":
        return info.tensor_shape
    state = info.composite_tensor.type_spec.type_state  # the first item of both specs is the shape
    return state.tuple_value.values[0].tensor_shape_value


def _components(key: str, info: TensorInfo) -> list[str]:
    kind = info.WhichOneof("encoding")
    if kind == "coo_sparse":
        return [f"{key}:{part}" for part in ("values", "indices", "dense_shape")]
    if kind == "composite_tensor":
        return [f"{key}:{index}" for index in range(len(info.composite_tensor.components))]
    return []


def _ragged(
    info: TensorInfo, parts: list[str], dtypes: dict[str, Any], draw: Draw, shape: list[int]
) -> Iterator[tuple[str, np.ndarray]]:
    """Flat values, and the splits of each ragged dimension, outermost first: rows of 1, 2, 0, 1, ... values."""
    count = shape[0]
    for part in parts[1:]:
        lengths = np.resize([1, 2, 0], count)
        yield part, np.concatenate([[0], np.cumsum(lengths)]).astype(dtypes[part])
        count = int(lengths.sum())
    inner = [d.size for d in info.composite_tensor.components[0].tensor_shape.dim[1:]]
    yield parts[0], draw(dtypes[parts[0]], [count, *(3 if d < 0 else d for d in inner)])
