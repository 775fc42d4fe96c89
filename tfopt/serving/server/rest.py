"""TensorFlow Serving's REST API, version 1, and the metrics page, as an ASGI application."""

from __future__ import annotations

import asyncio
import re
from concurrent.futures import Executor
from typing import Any

import grpc
from google.protobuf import json_format
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_pb2,
    regression_pb2,
)

from tfopt.serving.server import json_answer, json_request, metrics
from tfopt.serving.server.errors import ServingError, invalid
from tfopt.serving.server.predict import DEFAULT_SIGNATURE
from tfopt.serving.server.service import SIGNATURE_DEF, Service, counted

_WHICH = r"(?:/versions/(?P<version>\d+)|/labels/(?P<label>[^/:]+))?"
_POST = re.compile(rf"/v1/models/(?P<name>[^/:]+){_WHICH}:(?P<verb>classify|regress|predict)", re.IGNORECASE)
_GET = re.compile(rf"/v1/models(?:/(?P<name>[^/:]+))?{_WHICH}(?:/(?P<verb>metadata))?", re.IGNORECASE)

_C = grpc.StatusCode
_HTTP = {
    _C.CANCELLED: 499, _C.INVALID_ARGUMENT: 400, _C.DEADLINE_EXCEEDED: 504, _C.NOT_FOUND: 404,
    _C.ALREADY_EXISTS: 409, _C.PERMISSION_DENIED: 403, _C.RESOURCE_EXHAUSTED: 429, _C.FAILED_PRECONDITION: 400,
    _C.ABORTED: 409, _C.OUT_OF_RANGE: 400, _C.UNIMPLEMENTED: 501, _C.UNAVAILABLE: 503, _C.UNAUTHENTICATED: 401,
}  # fmt: skip


def application(service: Service, pool: Executor, metrics_path: str | None, timeout_s: float) -> Starlette:
    """The ASGI application.

    Args:
      service: answers.
      pool: of threads, in which JSON is read and written, and models run.
      metrics_path: of the metrics page; None: none.
      timeout_s: after which a request is answered 504; 0 for never.
    """

    async def api(request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)  # which nobody reads
        work = asyncio.get_running_loop().run_in_executor(
            pool, _answer, service, request.method, request.scope["path"], body
        )
        try:
            status, answer = await asyncio.wait_for(work, timeout_s or None)
        except TimeoutError:
            status, answer = 504, json_answer.error("Timed out waiting for notification")
        return Response(answer, status, media_type="application/json")

    async def scrape(_: Request) -> Response:
        return PlainTextResponse(metrics.page())

    routes = [Route("/v1/{rest:path}", api, methods=["GET", "POST", "PUT", "DELETE", "PATCH"])]
    if metrics_path is not None:
        routes.insert(0, Route(metrics_path, scrape))
    return Starlette(routes=routes)


def _answer(service: Service, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    """HTTP status and body."""
    try:
        found = {"POST": _POST, "GET": _GET, "HEAD": _GET}.get(method, re.compile("(?!)")).fullmatch(path)
        if found is None:
            raise invalid(f"Malformed request: {method} {path}")
        if not found["name"]:
            raise invalid("Missing model name in request.")
        verb = (found["verb"] or "status").lower()
        return 200, _VERBS[verb](service, found, body)
    except ServingError as error:
        return _HTTP.get(error.code, 500), json_answer.error(error.message)


def _predict(service: Service, found: re.Match, body: bytes) -> bytes:
    spec = model_pb2.ModelSpec()
    _spec(spec, found)
    with counted(spec.name, "Predict", "REST"):
        document = json_request.parse(body)
        name = json_request.signature_name(document) or DEFAULT_SIGNATURE
        with service.manager.using(spec) as servable:
            signature = servable.signatures.get(name)
            if signature is None:
                raise invalid(f'Serving signature name: "{name}" not found in signature def')
            if not signature.inputs:
                raise invalid(f"Failed to get input map for signature: {document.get('signature_name') or 'DEFAULT'}")
            booleans = b"true" in body or b"false" in body
            arrays, rows = json_request.tensors(document, dict(signature.inputs), booleans)
            outputs = servable.run_all(name, arrays)
        return json_answer.predictions(outputs, rows)


def _classify(service: Service, found: re.Match, body: bytes) -> bytes:
    return json_answer.classifications(
        _of_examples(service, found, body, classification_pb2.ClassificationRequest(), "Classify")
    )


def _regress(service: Service, found: re.Match, body: bytes) -> bytes:
    return json_answer.regressions(_of_examples(service, found, body, regression_pb2.RegressionRequest(), "Regress"))


def _of_examples(service: Service, found: re.Match, body: bytes, request: Any, call: str) -> Any:
    document = json_request.parse(body)
    _spec(request.model_spec, found)
    request.model_spec.signature_name = json_request.signature_name(document)
    json_request.examples(document, request.input)
    return service.answer(call, request, "REST").result


def _status(service: Service, found: re.Match, _: bytes) -> bytes:
    request = get_model_status_pb2.GetModelStatusRequest()
    _spec(request.model_spec, found)
    return _json(service.answer("GetModelStatus", request, "REST")).encode() + b"\n"


def _metadata(service: Service, found: re.Match, _: bytes) -> bytes:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=[SIGNATURE_DEF])
    _spec(request.model_spec, found)
    response = service.answer("GetModelMetadata", request, "REST")
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata[SIGNATURE_DEF].Unpack(signatures)
    spec, found_signatures = _json(response.model_spec), _json(signatures)
    return f'{{\n"model_spec":{spec}\n,\n"metadata": {{"signature_def": {found_signatures}\n}}\n}}\n'.encode()


_VERBS = {
    "predict": _predict,
    "classify": _classify,
    "regress": _regress,
    "status": _status,
    "metadata": _metadata,
}


def _spec(spec: Any, found: re.Match) -> None:
    spec.name = found["name"]
    if found["version"]:
        number = int(found["version"])
        if number >= 2**63:
            raise invalid(f"Failed to convert version: {found['version']} to numeric.")
        spec.version.value = number
    elif found["label"]:
        spec.version_label = found["label"]


def _json(message: Any) -> str:
    return json_format.MessageToJson(
        message, indent=1, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
