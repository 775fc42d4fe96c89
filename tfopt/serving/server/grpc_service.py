"""TensorFlow Serving's gRPC services: the real servicers, on grpc.aio or on grpc's threads.

What a thread has begun it ends, also where its client has gone: only then is the version free to be unloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent import futures
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


def asynchronous(service: Service, pool: Executor) -> grpc.aio.Server:
    """A grpc.aio server without a port; call it inside the event loop that it is to run in.

    The event loop parses and serializes; the work in between is done in a pool of threads, since a session run releases
    the GIL.
    """

    def method(call: str) -> Any:
        async def answer(_: Any, request: Any, context: Any) -> Any:
            try:
                return await asyncio.get_running_loop().run_in_executor(pool, service.answer, call, request)
            except ServingError as error:
                await context.abort(error.code, error.message)

        return answer

    return _with_services(grpc.aio.server(options=OPTIONS), method)


def threaded(service: Service, pool: futures.ThreadPoolExecutor) -> grpc.Server:
    """A server of the same library that gives each request a thread of the pool, as tensorflow_model_server does."""

    def method(call: str) -> Any:
        def answer(_: Any, request: Any, context: Any) -> Any:
            if not context.is_active():
                return None  # its client has gone, or its time is up, while it waited for a thread
            try:
                return service.answer(call, request)
            except ServingError as error:
                context.abort(error.code, error.message)

        return answer

    return _with_services(grpc.server(pool, options=OPTIONS), method)


def _with_services(server: Any, method: Callable[[str], Any]) -> Any:
    for base, calls, add in (
        (
            prediction_service_pb2_grpc.PredictionServiceServicer,
            _PREDICTION,
            prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server,
        ),
        (
            model_service_pb2_grpc.ModelServiceServicer,
            _MODEL,
            model_service_pb2_grpc.add_ModelServiceServicer_to_server,
        ),
    ):
        add(type(base.__name__, (base,), {call: method(call) for call in calls})(), server)
    return server
