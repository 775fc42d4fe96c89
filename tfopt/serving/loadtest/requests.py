"""Requests, serialized before the clock starts: from rows, or from files that hold requests already."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np

from tfopt import data, request_log
from tfopt.errors import TfoptError
from tfopt.readers import tf_records
from tfopt.runtime import Signature
from tfopt.serving.loadtest.engine import Check
from tfopt.serving.loadtest.plan import REST, Request, Target

_MOST = 1000  # different requests; then they are sent again


def from_rows(target: Target, signature: Signature, rows: data.Dataset, per_request: int = 1) -> list[Request]:
    """Makes a request of each `per_request` rows; a remainder is left out, unless it is all there is.

    Args:
      target: its protocol and model.
      signature: its inputs, for REST's row format.
      rows: as `tfopt.data.load` gives them.
      per_request: rows of a request.
    """
    if per_request < 1:
        raise TfoptError(f"--rows_per_request={per_request}: wants at least 1")
    count = len(rows)
    batches = list(islice(rows.batches(per_request), max(1, min(count // per_request, _MOST))))
    make = _rest_request if target.protocol == REST else _grpc_request
    return [make(target, signature, inputs, min(per_request, count)) for inputs in batches]


def load(
    target: Target, signature: Signature | None, source: str | None, per_request: int = 1, seed: int = 0
) -> tuple[list[Request], tuple[str, ...]]:
    """Reads the requests of a load test.

    Args:
      target: whom they are for.
      signature: what it takes, as `signature.read` gives it; None where `holds_requests(source)`.
      source: rows in the forms of `tfopt.data.load`; a TFRecord file of PredictionLogs (warmup requests) or of
        PredictRequests; None: random rows.
      per_request: rows of a request made of rows.
      seed: of random rows.

    Returns:
      The requests, and warnings.

    Raises:
      TfoptError: the source cannot be read, or does not fit the signature.
    """
    if source is not None and holds_requests(source):
        return from_file(target, source), ()
    assert signature is not None
    specs = signature.inputs
    if source is not None:
        rows = data.load(source, specs, limit=_MOST * per_request)
        return from_rows(target, signature, rows, per_request), rows.warnings
    if any(spec.dtype == data.STRING for spec in specs.values()):
        raise TfoptError("--data: the signature takes strings, which random inputs cannot stand for; give real data")
    rows = data.probes(specs, seed, per_request * (1 if data.whole_inputs(specs) == frozenset(specs) else 64))
    warning = "random inputs: latency may depend on real values; give --data"
    return from_rows(target, signature, rows, per_request), (warning,)


def holds_requests(source: str) -> bool:
    """Whether a source is a TFRecord file of PredictionLogs or PredictRequests, and not of tf.Examples."""
    if source.startswith("python:") or source.endswith(".npz"):
        return False
    return request_log.request(tf_records(source, 1)[0]) is not None


def from_file(target: Target, source: str) -> list[Request]:
    """Reads ready requests; they go to the target's model and version, and keep their own signatures.

    Raises:
      TfoptError: one of them is no request that can be sent over the protocol.
    """
    requests = []
    for number, record in enumerate(tf_records(source, _MOST)):
        ready = request_log.request(record)
        if ready is None:
            raise TfoptError(f"{source}: record {number} is neither a PredictionLog nor a PredictRequest")
        method, message = ready
        message.model_spec.name = target.model_name
        message.model_spec.ClearField("version")
        message.model_spec.ClearField("version_label")
        if target.model_version is not None:
            message.model_spec.version.value = target.model_version
        if target.protocol != REST:
            requests.append(Request(method, message.SerializeToString(), _rows(message)))
        elif method == "Predict":
            import tensorflow as tf

            inputs = {name: tf.make_ndarray(tensor) for name, tensor in message.inputs.items()}
            body = {
                "signature_name": message.model_spec.signature_name or "serving_default",
                "inputs": _columns(inputs),
            }
            requests.append(Request("predict", json.dumps(body).encode(), _rows(message)))
        else:
            raise TfoptError(f"{source}: record {number} is a {method} request; over REST only Predict is sent")
    return requests


def checker(signature: Signature, target: Target) -> Check:
    """Returns a check that an answer holds every output of the signature, and no NaN or infinity."""
    wanted = sorted(signature.outputs)

    def grpc_check(_: int, body: bytes) -> str | None:
        import tensorflow as tf
        from google.protobuf.message import DecodeError
        from tensorflow_serving.apis.predict_pb2 import PredictResponse

        try:
            outputs = PredictResponse.FromString(body).outputs
        except DecodeError:
            return "not a PredictResponse"
        if sorted(outputs) != wanted:
            return f"outputs {sorted(outputs)}, wanted {wanted}"
        arrays = {name: tf.make_ndarray(outputs[name]) for name in wanted}
        bad = [n for n, a in arrays.items() if a.dtype.kind == "f" and not np.isfinite(a).all()]
        return f"output {bad[0]!r} is not finite" if bad else None

    def rest_check(_: int, body: bytes) -> str | None:
        try:
            answer = json.loads(body)
        except ValueError:
            return "not JSON"
        if not isinstance(answer, dict) or not ("predictions" in answer or "outputs" in answer):
            return "neither predictions nor outputs"
        return "not finite" if any(word in body for word in (b"NaN", b"Infinity")) else None

    return rest_check if target.protocol == REST else grpc_check


def _rows(message: Any) -> int:
    """Examples in a request: the first dimension of its largest input."""
    if not hasattr(message, "inputs"):
        return len(message.input.example_list.examples) or len(message.input.example_list_with_context.examples) or 1
    shapes = [tensor.tensor_shape.dim for tensor in message.inputs.values()]
    return max((dims[0].size for dims in shapes if dims), default=1)


def _grpc_request(target: Target, _: Signature, inputs: Mapping[str, np.ndarray], rows: int) -> Request:
    import tensorflow as tf
    from tensorflow_serving.apis.predict_pb2 import PredictRequest

    request = PredictRequest()
    request.model_spec.name = target.model_name
    request.model_spec.signature_name = target.signature_name
    if target.model_version is not None:
        request.model_spec.version.value = target.model_version
    for name, array in inputs.items():
        request.inputs[name].CopyFrom(tf.make_tensor_proto(array))
    return Request("Predict", request.SerializeToString(), rows)


def _rest_request(target: Target, signature: Signature, inputs: Mapping[str, np.ndarray], rows: int) -> Request:
    """The row format where all inputs have rows, as most clients send it; else the columnar one."""
    body: dict[str, Any] = {"signature_name": target.signature_name}
    if data.whole_inputs(signature.inputs) or any(spec.shape is None for spec in signature.inputs.values()):
        body["inputs"] = _columns(inputs)
    else:
        columns = _columns(inputs)
        names = list(columns)
        body["instances"] = (
            columns[names[0]] if len(names) == 1 else [{n: columns[n][r] for n in names} for r in range(rows)]
        )
    return Request("predict", json.dumps(body, separators=(",", ":")).encode(), rows)


def _columns(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
    return {name: _json(array) for name, array in inputs.items()}


def _json(array: np.ndarray) -> Any:
    if array.dtype.kind == "O":
        return _strings(array.tolist())
    if array.dtype.kind in "biu":
        return array.tolist()
    # As many digits as the dtype has: 0.1 and not 0.10000000149011612.
    return array.astype("U").astype(np.float64).tolist()


def _strings(value: Any) -> Any:
    if isinstance(value, list):
        return [_strings(item) for item in value]
    return {"b64": base64.b64encode(value if isinstance(value, bytes) else str(value).encode()).decode()}
