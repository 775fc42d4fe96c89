"""What the generator itself can do: requests per second that one process can offer.

It asks a gRPC server in another process that answers each request with nothing, as fast as it can. The server of the
test is Python too, and may be the limit: then the generator's CPU time for each request says what it could offer if it
had a core to itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tfopt.errors import TfoptError
from tfopt.serving.loadtest import server_side
from tfopt.serving.loadtest.engine import Sender
from tfopt.serving.loadtest.plan import CLOSED, Plan, Request, Target
from tfopt.serving.loadtest.run import summary
from tfopt.serving.loadtest.transport import connect


@dataclass(frozen=True)
class Limit:
    """What one process could do.

    Attributes:
      rate: requests per second that were answered.
      cpu_us: the generator's CPU time for each, in microseconds.
      server_cpu: CPUs that the server which does nothing used; near 1, it was the limit.
      lateness_p50, lateness_p99: how late requests were sent at half that rate, in ms.
      request_bytes: size of the requests.
    """

    rate: float
    cpu_us: float
    server_cpu: float
    lateness_p50: float
    lateness_p99: float
    request_bytes: int

    @property
    def text(self) -> str:
        """In words."""
        return (
            f"the generator's own limit: {self.rate:,.0f} requests/s of {self.request_bytes:,} bytes against a server "
            f"that does nothing, {self.cpu_us:.0f} us of CPU each (at most {1e6 / self.cpu_us:,.0f}/s with a core of "
            f"its own; the server took {self.server_cpu:.2f} CPUs); at half that rate requests went out "
            f"{self.lateness_p50:.2f} ms late at p50, {self.lateness_p99:.2f} ms at p99"
        )


def measure(body: bytes = bytes(1000), seconds: float = 3.0, concurrency: int = 32) -> Limit:
    """Measures what one process of this generator can offer over gRPC.

    Args:
      body: of the requests.
      seconds: for each of two runs.
      concurrency: requests in flight.
    """
    requests = [Request("Predict", body)]
    with _noop_server() as (server, pid):
        target = Target(server)
        with connect(target) as transport:
            plan = Plan(mode=CLOSED, concurrency=concurrency, warmup_s=0.5, duration_s=seconds)
            cpu = server_side.cpu_seconds(pid)
            record = Sender(transport, requests, plan, target.timeout_s, None).run(False)
            used = server_side.cpu_seconds(pid) - cpu
            fastest = summary(target, requests, plan, record, server_side.ServerSide())
            if not fastest.answered:
                raise TfoptError(f"--self_test: no answers: {fastest.messages}")
            plan = Plan(rate=fastest.achieved / 2, warmup_s=0.5, duration_s=seconds)
            calm = summary(
                target,
                requests,
                plan,
                Sender(transport, requests, plan, target.timeout_s, None).run(False),
                server_side.ServerSide(),
            )
    return Limit(
        fastest.achieved,
        1e6 * record.cpu_seconds / fastest.sent,
        used / record.seconds,
        calm.lateness.p50,
        calm.lateness.p99,
        len(body),
    )


@contextlib.contextmanager
def _noop_server() -> Iterator[tuple[str, int]]:
    root = str(Path(__file__).resolve().parents[3])
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "tfopt.serving.loadtest.self_test"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ)
    assert process.stdin is not None and process.stdout is not None
    try:
        port = process.stdout.readline().strip()
        if not port:
            raise TfoptError("--self_test: the server that does nothing did not start")
        yield f"127.0.0.1:{port}", process.pid
    finally:
        process.stdin.close()  # it ends when it reads the end of the pipe
        process.wait(10)
        process.stdout.close()


async def _serve() -> None:
    import grpc

    class Nothing(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            return grpc.unary_unary_rpc_method_handler(_answer)

    async def _answer(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
        return b""

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Nothing(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_serve())
