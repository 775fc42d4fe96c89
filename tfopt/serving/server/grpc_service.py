"""TensorFlow Serving's gRPC services over a Manager: the real servicers, on grpc.aio.

The event loop parses and serializes; the work in between is done in a pool of threads, since a session run releases
the GIL. What a thread has begun it ends, also where its client has gone: only then is the version free to be unloaded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import grpc
from tensorflow_serving.apis import prediction_service_pb2_grpc

from tfopt.serving.server.errors import ServingError
from tfopt.serving.server.service import Service

# As tensorflow_model_server: no bound on messages. So that two servers on one port are an error, no SO_REUSEPORT.
OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0))


class _Calls:
    """What both servicers share."""

    def __init__(self, service: Service, pool: Executor):
        self._service = service
        self._pool = pool

    async def _answer(self, work: Callable[[Any], Any], request: Any, context: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, work, request)
        except ServingError as error:
            await context.abort(error.code, error.message)


class PredictionService(_Calls, prediction_service_pb2_grpc.PredictionServiceServicer):
    """PredictionService."""

    async def Predict(self, request: Any, context: Any) -> Any:  # noqa: N802, D102
        return await self._answer(self._service.predict, request, context)


def server(service: Service, pool: Executor) -> grpc.aio.Server:
    """A gRPC server without a port; call it inside the event loop that it is to run in."""
    made = grpc.aio.server(options=OPTIONS)
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(PredictionService(service, pool), made)
    return made
