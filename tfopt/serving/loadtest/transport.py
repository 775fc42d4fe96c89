"""How requests reach a server: one connection of gRPC, or HTTP/1.1 by aiohttp.

A transport sends without waiting, and calls back when the answer is there. Request bytes go out as they are, and
answers come back as bytes: nothing is parsed while the clock runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from tfopt.errors import TfoptError, one_line
from tfopt.serving.loadtest.plan import REST, Request, Target

_CONNECT_S = 5
SERVICE = "/tensorflow.serving.PredictionService/"

# Called once for each request, on a thread of the transport: error code or None, the body, what the server said.
Done = Callable[[str | None, bytes, str], None]


class Transport(Protocol):
    """Sends requests; `send` does not wait."""

    def send(self, request: Request, done: Done) -> None:
        """Sends a request."""


@contextlib.contextmanager
def connect(target: Target) -> Iterator[Transport]:
    """Connects to a server, and disconnects at the end of the block.

    Raises:
      TfoptError: nobody answers there.
    """
    with (_rest if target.protocol == REST else _grpc)(target) as transport:
        yield transport


class _Grpc:
    def __init__(self, channel: Any, timeout_s: float):
        self._channel, self._timeout = channel, timeout_s
        self._calls: dict[str, Any] = {}

    def send(self, request: Request, done: Done) -> None:
        call = self._calls.get(request.method)
        if call is None:
            call = self._calls[request.method] = self._channel.unary_unary(SERVICE + request.method, None, None)
        call.future(request.body, timeout=self._timeout).add_done_callback(lambda answer: _grpc_answer(answer, done))


def _grpc_answer(answer: Any, done: Done) -> None:
    code = answer.code()
    if code.value[0]:
        done(code.name, b"", answer.details() or "")
    else:
        done(None, answer.result(), "")


@contextlib.contextmanager
def _grpc(target: Target) -> Iterator[Transport]:
    import grpc

    with channel(target.server) as opened:
        try:
            grpc.channel_ready_future(opened).result(timeout=_CONNECT_S)
        except grpc.FutureTimeoutError as error:
            raise TfoptError(f"--server={target.server}: no gRPC server answers there") from error
        yield _Grpc(opened, target.timeout_s)


def channel(server: str) -> Any:
    """A gRPC channel without limits on the size of messages; a context manager."""
    import grpc

    options = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    return grpc.insecure_channel(server, options=[*options, ("grpc.enable_http_proxy", 0)])


class _Rest:
    def __init__(self, loop: asyncio.AbstractEventLoop, session: Any, target: Target):
        self._loop, self._session = loop, session
        self._urls = f"http://{target.server}{model_path(target)}:"
        self._running: set[asyncio.Task] = set()

    def send(self, request: Request, done: Done) -> None:
        self._loop.call_soon_threadsafe(self._start, request, done)

    def _start(self, request: Request, done: Done) -> None:
        task = self._loop.create_task(self._ask(request, done))
        self._running.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._running.discard)

    async def _ask(self, request: Request, done: Done) -> None:
        import aiohttp

        try:
            headers = {"Content-Type": "application/json"}
            async with self._session.post(self._urls + request.method, data=request.body, headers=headers) as answer:
                body = await answer.read()
                good = answer.status == 200
                done(
                    None if good else f"HTTP {answer.status}",
                    body,
                    "" if good else body[:500].decode("utf8", "replace"),
                )
        except TimeoutError:
            done("DEADLINE_EXCEEDED", b"", "no answer in time")
        except (aiohttp.ClientError, OSError) as error:
            done("UNAVAILABLE", b"", one_line(error))


def model_path(target: Target) -> str:
    """The path of a model in TensorFlow Serving's REST API."""
    version = "" if target.model_version is None else f"/versions/{target.model_version}"
    return f"/v1/models/{target.model_name}{version}"


@contextlib.contextmanager
def _rest(target: Target) -> Iterator[Transport]:
    import aiohttp

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="loadtest-rest", daemon=True)
    thread.start()

    async def open_session() -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=target.timeout_s)
        # A request in flight needs a connection of its own in HTTP/1.1: no limit, or requests would queue here unseen.
        session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout)
        try:
            async with session.get(f"http://{target.server}{model_path(target)}") as answer:
                await answer.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            await session.close()
            raise TfoptError(f"--server={target.server}: no REST server answers there: {one_line(error)}") from error
        return session

    session = None
    try:
        session = asyncio.run_coroutine_threadsafe(open_session(), loop).result()
        yield _Rest(loop, session, target)
    finally:
        if session is not None:
            asyncio.run_coroutine_threadsafe(session.close(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
