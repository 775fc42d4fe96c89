"""A gRPC server that speaks TensorFlow Serving's protocol and is slow, silent or wrong on demand."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent import futures

import grpc

SERVICE = "/tensorflow.serving.PredictionService/"


class Fake:
    """Answers Predict with `scores` = 2 x, GetModelMetadata with x: float32 (?, 4).

    Attributes:
      delay_s: seconds that every answer takes.
      workers: how many are answered at once; fixed when it starts.
      stall: (seconds after the first request, how long) in which nothing is answered.
      fail: every n-th request fails with UNAVAILABLE.
      answer: what it answers, or None for the model's answer.
      bodies: requests received.
      answer_s: seconds between two answers at the least: its capacity.
    """

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.stall: tuple[float, float] | None = None
        self.fail = 0
        self.answer: bytes | None = None
        self.bodies: list[bytes] = []
        self.answer_s = 0.0
        self.address = ""
        self._first: float | None = None
        self._free_at = 0.0
        self._lock = threading.Lock()

    def reset(self) -> None:
        """As it was at the start."""
        self.delay_s, self.stall, self.fail, self.answer, self.answer_s = 0.0, None, 0, None, 0.0
        self.bodies, self._first, self._free_at = [], None, 0.0

    def predict(self, body: bytes, context: grpc.ServicerContext) -> bytes:
        now = time.monotonic()
        with self._lock:
            self.bodies.append(body)
            count = len(self.bodies)
            self._first = now if self._first is None else self._first
            self._free_at = max(self._free_at, now) + self.answer_s
            until = self._free_at if self.answer_s else now + self.delay_s
        if self.stall and 0 <= now - self._first - self.stall[0] < self.stall[1]:
            until = max(until, self._first + sum(self.stall))
        if until > now:
            time.sleep(until - now)
        if self.fail and count % self.fail == 0:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the queue is full")
        return b"" if self.answer is None else self.answer

    def metadata(self, body: bytes, context: grpc.ServicerContext) -> bytes:
        import tensorflow as tf
        from tensorflow_serving.apis import get_model_metadata_pb2 as protos

        request = protos.GetModelMetadataRequest.FromString(body)
        if request.model_spec.name != "m":
            context.abort(grpc.StatusCode.NOT_FOUND, f"Servable not found: {request.model_spec.name}")
        signatures = protos.SignatureDefMap()
        info = signatures.signature_def["serving_default"].inputs["x"]
        info.dtype = tf.float32.as_datatype_enum
        for size in (-1, 4):
            info.tensor_shape.dim.add(size=size)
        signatures.signature_def["serving_default"].outputs["scores"].CopyFrom(info)
        answer = protos.GetModelMetadataResponse()
        answer.metadata["signature_def"].Pack(signatures)
        return answer.SerializeToString()


@contextlib.contextmanager
def serving(workers: int = 64) -> Iterator[Fake]:
    fake = Fake()

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            method = {"Predict": fake.predict, "GetModelMetadata": fake.metadata}.get(details.method.rpartition("/")[2])
            return method and grpc.unary_unary_rpc_method_handler(method)

    server = grpc.server(futures.ThreadPoolExecutor(workers))
    server.add_generic_rpc_handlers((Handler(),))
    fake.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield fake
    finally:
        server.stop(None)
