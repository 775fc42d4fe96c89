"""Classify, Regress and MultiInference: requests of tf.Examples for signatures that take them serialized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
from tensorflow_serving.apis import classification_pb2, inference_pb2, regression_pb2

from tfopt.serving.server.errors import ServingError, invalid
from tfopt.serving.server.predict import DEFAULT_SIGNATURE
from tfopt.serving.server.servable import Servable

CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"
_INPUTS, _CLASSES, _SCORES, _OUTPUTS = "inputs", "classes", "scores", "outputs"


def classify(servable: Servable, request: Any) -> Any:
    """Answers a ClassificationRequest.

    Raises:
      ServingError: the signature is no classifier, the request is empty, or the run failed.
    """
    response = classification_pb2.ClassificationResponse()
    name = _signature(servable, request.model_spec, CLASSIFY, "classification", "No signature was found with the name")
    _classify(servable, name, serialized(request.input), response.result)
    _describe(response.model_spec, servable, request.model_spec, name)
    return response


def regress(servable: Servable, request: Any) -> Any:
    """Answers a RegressionRequest.

    Raises:
      ServingError: the signature is no regression, the request is empty, or the run failed.
    """
    response = regression_pb2.RegressionResponse()
    name = _signature(servable, request.model_spec, REGRESS, "regression", "No signature was found with the name")
    _regress(servable, name, serialized(request.input), response.result)
    _describe(response.model_spec, servable, request.model_spec, name)
    return response


def multi_inference(servable: Servable, request: Any) -> Any:
    """Answers a MultiInferenceRequest: several classifications and regressions of the same examples.

    Raises:
      ServingError: the tasks do not fit together, one cannot be done, the request is empty, or a run failed.
    """
    response = inference_pb2.MultiInferenceResponse()
    work: list[tuple[Callable, str, Any]] = []
    tensors = set()
    for task in request.tasks:
        if task.model_spec.name != request.tasks[0].model_spec.name:
            raise invalid("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        if task.method_name not in (CLASSIFY, REGRESS):
            raise ServingError(grpc.StatusCode.UNIMPLEMENTED, f"Unsupported signature method_name: {task.method_name}")
        kind = "classification" if task.method_name == CLASSIFY else "regression"
        missing = "Requested signature not found in model graph"
        name = _signature(servable, task.model_spec, task.method_name, kind, missing)
        if name in [known for _, known, _ in work]:
            raise invalid(f"Duplicate evaluation of signature: {name}")
        work.append((_classify if task.method_name == CLASSIFY else _regress, name, task))
        tensors.add(servable.inputs[name][_INPUTS])
    if len(tensors) > 1:
        raise invalid("Input tensor must be the same for all Signatures.")
    examples = serialized(request.input)
    for run, name, task in work:
        result = response.results.add()
        field = "classification_result" if run is _classify else "regression_result"
        run(servable, name, examples, getattr(result, field))
        _describe(result.model_spec, servable, task.model_spec, name)
    return response


def serialized(given: Any) -> np.ndarray:
    """The examples of an Input, (n,), each serialized, after the context where there is one: parsers merge the two.

    Raises:
      ServingError: INVALID_ARGUMENT where there are none.
    """
    kind = given.WhichOneof("kind")
    examples = getattr(given, kind).examples if kind else ()
    if not examples:
        raise invalid("Input is empty.")
    context = given.example_list_with_context.context.SerializeToString() if "context" in str(kind) else b""
    array = np.empty(len(examples), object)
    array[:] = [context + example.SerializeToString() for example in examples]
    return array


def _signature(servable: Servable, spec: Any, method: str, kind: str, missing: str) -> str:
    name = spec.signature_name or DEFAULT_SIGNATURE
    signature = servable.signatures.get(name)
    if signature is None:
        raise invalid(f"{missing}: {name}")
    if signature.method_name != method:
        raise invalid(f"Expected {kind} signature method_name to be {method}. Was: {signature.method_name}")
    if len(signature.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    if _INPUTS not in signature.inputs:
        raise _precondition(f"No {kind} inputs found in SignatureDef: {signature}")
    return name


def _classify(servable: Servable, name: str, examples: np.ndarray, result: Any) -> None:
    known = servable.outputs[name]
    wanted = [key for key in (_CLASSES, _SCORES) if key in known]
    if len(known) not in (1, 2):
        raise invalid(f"Expected one or two output Tensors, found {len(known)}")
    if not wanted:
        raise _precondition(
            f'Expected classification signature outputs to contain at least one of "{_CLASSES}" or "{_SCORES}". '
            f"Signature was: {servable.signatures[name]}"
        )
    found = dict(zip(wanted, servable.run(name, {_INPUTS: examples}, wanted), strict=True))
    for key, array in found.items():
        if array.ndim != 2:
            shape = ",".join(map(str, array.shape))
            raise invalid(f"Expected Tensor shape: [batch_size num_classes] but got [{shape}]")
        _check_dtype(array, key, object if key == _CLASSES else np.float32)
        if len(array) != len(examples):
            raise invalid(f"Expected {key} output batch size of {len(examples)}. Got: {len(array)}")
    labels, scores = found.get(_CLASSES), found.get(_SCORES)
    if labels is not None and scores is not None and labels.shape != scores.shape:
        raise invalid(
            f"Tensors class and score should match in dim_size(1). Got {labels.shape[1]} vs. {scores.shape[1]}"
        )
    columns = next(iter(found.values())).shape[1]
    for row in range(len(examples)):
        classes = result.classifications.add().classes
        for column in range(columns):
            classes.add(
                label=labels[row, column] if labels is not None else None,
                score=scores[row, column] if scores is not None else None,
            )


def _regress(servable: Servable, name: str, examples: np.ndarray, result: Any) -> None:
    known = servable.outputs[name]
    if len(known) != 1:
        raise invalid("Expected one output Tensor.")
    if _OUTPUTS not in known:
        raise _precondition(f"No regression outputs found in SignatureDef: {servable.signatures[name]}")
    (array,) = servable.run(name, {_INPUTS: examples}, [_OUTPUTS])
    if array.ndim != 1 and array.shape[1:] != (1,):
        shape = ",".join(map(str, array.shape))
        raise invalid(f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got [{shape}]")
    if len(array) != len(examples):
        raise invalid(f"Input batch size did not match output batch size: {len(examples)} vs. {len(array)}")
    _check_dtype(array, "output", np.float32)
    for value in array.ravel().tolist():
        result.regressions.add(value=value)


def _check_dtype(array: np.ndarray, what: str, dtype: type) -> None:
    if array.dtype != dtype:
        wanted = "DT_STRING" if dtype is object else "DT_FLOAT"
        got = "DT_STRING" if array.dtype == np.dtype(object) else f"DT_{array.dtype.name.upper()}"
        raise invalid(f"Expected {what} Tensor of {wanted}. Got: {got.replace('DT_FLOAT32', 'DT_FLOAT')}")


def _describe(answered: Any, servable: Servable, asked: Any, name: str) -> None:
    answered.name, answered.version.value, answered.signature_name = asked.name, servable.version, name


def _precondition(message: str) -> ServingError:
    return ServingError(grpc.StatusCode.FAILED_PRECONDITION, message)
