"""TensorFlow Serving's gRPC services: the real servicers, on grpc.aio.

The event loop parses and serializes; the work in between is done in a pool of threads, since a session run releases
the GIL. What a thread has begun it ends, also where its client has gone: only then is the version free to be unloaded.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import Any

import grpc
from tensorflow_serving.apis import model_service_pb2_grpc, prediction_service_pb2_grpc

from tfopt.serving.server.errors import ServingError
from tfopt.serving.server.service import Service

# As tensorflow_model_server: no bound on messages. So that two servers on one port are an error, no SO_REUSEPORT.
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0))

_PREDICTION = ("Predict", "Classify", "Regress", "MultiInference", "GetModelMetadata")
_MODEL = ("GetModelStatus", "HandleReloadConfigRequest")


def server(service: Service, pool: Executor) -> grpc.aio.Server:
    """A gRPC server without a port; call it inside the event loop that it is to run in."""
    made = grpc.aio.server(options=OPTIONS)
    prediction = _servicer(prediction_service_pb2_grpc.PredictionServiceServicer, _PREDICTION, service, pool)
    model = _servicer(model_service_pb2_grpc.ModelServiceServicer, _MODEL, service, pool)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(prediction, made)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(model, made)
    return made


def _servicer(base: type, calls: tuple[str, ...], service: Service, pool: Executor) -> Any:
    """A servicer whose calls are all answered by the service."""

    def method(call: str) -> Any:
        async def answer(_: Any, request: Any, context: Any) -> Any:
            try:
                return await asyncio.get_running_loop().run_in_executor(pool, service.answer, call, request)
            except ServingError as error:
                await context.abort(error.code, error.message)

        return answer

    return type(base.__name__, (base,), {call: method(call) for call in calls})()
