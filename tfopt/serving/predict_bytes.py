"""How many bytes a request takes on the wire: a serialized PredictRequest of TensorFlow Serving."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf.meta_graph_pb2 import SignatureDef

_STRING = b"8 bytes."  # of a string whose length nobody knows


def predict_bytes(signature: str, arrays: Mapping[str, np.ndarray]) -> int:
    """Bytes of a PredictRequest, less the name of the model.

    Args:
      signature: its name.
      arrays: input name -> array.
    """
    from tensorflow_serving.apis.predict_pb2 import PredictRequest  # of the extra `serving`

    request = PredictRequest()
    request.model_spec.signature_name = signature
    for name, array in arrays.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(array, shape=np.shape(array)))
    return request.ByteSize()


def example_arrays(signature: SignatureDef, rows: int) -> dict[str, np.ndarray]:
    """Arrays as a request of this signature has them, of zeros; unknown dimensions beside that of the rows are 1."""
    arrays = {}
    for name, info in signature.inputs.items():
        if info.WhichOneof("encoding") != "name":
            continue
        dims = [d.size for d in info.tensor_shape.dim]
        shape = [(rows if axis == 0 else 1) if size < 0 else size for axis, size in enumerate(dims)]
        dtype = tf.as_dtype(info.dtype)
        arrays[name] = np.full(shape, _STRING, object) if dtype == tf.string else np.zeros(shape, dtype.as_numpy_dtype)
    return arrays
