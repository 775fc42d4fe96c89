"""Predict: from a PredictRequest to a PredictResponse."""

from __future__ import annotations

from typing import Any

import grpc
import numpy as np
from tensorflow_serving.apis import predict_pb2

from tfopt.serving.server.errors import ServingError, invalid
from tfopt.serving.server.servable import Servable
from tfopt.serving.server.tensors import fill, to_array

DEFAULT_SIGNATURE = "serving_default"


def predict(servable: Servable, request: Any, as_content: bool = False) -> Any:
    """Answers a PredictRequest.

    Args:
      servable: the version that is to answer.
      request: the message.
      as_content: numbers as `tensor_content` rather than in typed fields.

    Raises:
      ServingError: the request does not fit the signature, or the run failed.
    """
    spec = request.model_spec
    name = spec.signature_name or DEFAULT_SIGNATURE
    known = servable.inputs.get(name)
    if known is None:
        raise ServingError(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{name}" not found.')
    inputs = request.inputs
    if len(inputs) != len(known) or any(key not in inputs for key in known):
        arrays = _with_defaults(servable, name, inputs)
    else:
        arrays = {key: to_array(inputs[key], key) for key in known}
    outputs = _outputs(servable, name, request.output_filter)
    response = predict_pb2.PredictResponse()
    answered = response.model_spec
    answered.name, answered.version.value, answered.signature_name = spec.name, servable.version, name
    for key, array in zip(outputs, servable.run(name, arrays, outputs), strict=True):
        fill(response.outputs[key], array, as_content)
    return response


def _with_defaults(servable: Servable, name: str, inputs: Any) -> dict[str, np.ndarray]:
    """Inputs of a request that does not name exactly those of the signature, where the signature has defaults."""
    known, defaults = servable.inputs[name], servable.signatures[name].defaults
    extra, missing = sorted(set(inputs) - set(known)), sorted(set(known) - set(inputs) - set(defaults))
    if extra or missing:
        absent = sorted(set(known) - set(inputs))
        raise invalid(
            f"input size does not match signature: {len(inputs)}!={len(known)} len({{{','.join(sorted(inputs))}}}) != "
            f"len({{{','.join(sorted(known))}}}). Sent extra: {{{','.join(extra)}}}. "
            f"Missing but required: {{{','.join(absent)}}}."
        )
    return {key: to_array(inputs[key] if key in inputs else defaults[key], key) for key in known}


def _outputs(servable: Servable, name: str, wanted: Any) -> list[str]:
    known = servable.outputs[name]
    if not wanted:
        return list(known)
    for index, key in enumerate(wanted):
        if key not in known:
            expected = ",".join(sorted(known))
            raise invalid(
                f"output tensor alias not found in signature: {key} Outputs expected to be in the set {{{expected}}}."
            )
        if key in wanted[:index]:
            raise invalid(f"duplicate output tensor alias: {key}")
    return list(wanted)
