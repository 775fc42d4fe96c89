"""The server's life: load, listen, watch, and end when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import uvicorn
from tensorflow_serving.config import model_server_config_pb2

from tfopt.errors import TfoptError
from tfopt.serving.server import config, grpc_service, rest, warmup
from tfopt.serving.server.errors import ServingError
from tfopt.serving.server.manager import Manager, quiet
from tfopt.serving.server.servable import LoadOptions, log
from tfopt.serving.server.service import Service

PARENT = "TFOPT_SERVE_PARENT"  # id of the process with which the server is to end, in the environment
_BACKLOG = 2048
GRPC_AT, REST_AT, READY = "Running gRPC ModelServer at ", "Exporting HTTP/REST API at:", "Serving"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say; see pipelines/serve.py.

    Attributes:
      model_base_path: of the one model, where there is no config file.
      model_name: of that model.
      model_config_file: a ModelServerConfig in text form.
      config_poll_s: how often to read that again; 0 for once.
      any_label: whether a label may name a version that is not available.
      address: to listen at.
      port: of gRPC; 0 for a free one.
      socket_path: a UNIX socket for gRPC beside the port.
      rest_port: of REST; 0 for a free one, None for no REST.
      rest_timeout_s: after which a REST request is answered 504.
      monitoring_config_file: a MonitoringConfig in text form.
      poll_s: how often to look for versions; 0 for once, at the start.
      load_threads: how many versions are loaded at once.
      request_threads: how many requests are worked on at once; 0: 4 for each core, or more where batches need more.
      threaded: gRPC on threads rather than on grpc.aio.
      as_content: answers hold numbers as `tensor_content`.
      grace_s: how long requests may take to end once the server is told to stop.
      load: how versions are loaded.
    """

    model_base_path: str = ""
    model_name: str = "default"
    model_config_file: str | None = None
    config_poll_s: float = 0
    any_label: bool = False
    address: str = "127.0.0.1"
    port: int = 8500
    socket_path: str | None = None
    rest_port: int | None = None
    rest_timeout_s: float = 30
    monitoring_config_file: str | None = None
    poll_s: float = 1
    load_threads: int = 0
    request_threads: int = 0
    threaded: bool = True
    as_content: bool = False
    grace_s: float = 30
    load: LoadOptions = dataclasses.field(default_factory=LoadOptions)


def serve(options: Options) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
      TfoptError: the options are wrong, a model cannot be loaded, or a port is taken.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True)
    quiet()
    log.info("tfopt-serve is for trying and for tests; serve in production with tensorflow_model_server")
    metrics_path = config.metrics_path(options.monitoring_config_file)
    # The imports stay: collecting an unloaded version's cycles need not look at them, and stalls requests less.
    gc.freeze()
    manager = Manager(functools.partial(warmup.load, options=options.load), options.load_threads, not options.any_label)
    try:
        manager.configure(config.models(_models(options)))
    except ServingError as error:
        raise TfoptError(f"Failed to start server. Error: {error.code.name}: {error.message}") from error
    asyncio.run(_listen(options, manager, metrics_path))
    log.info("stopped")


def _models(options: Options) -> Any:
    if options.model_config_file:
        return config.read(options.model_config_file)
    found = model_server_config_pb2.ModelServerConfig()
    found.model_config_list.config.add(
        name=options.model_name, base_path=options.model_base_path, model_platform="tensorflow"
    )
    return found


def _request_threads(options: Options) -> int:
    """A request blocks its thread until it is answered, so a batch can have no more requests than there are threads."""
    batching = options.load.batching or options.load.batching_per_model
    most = options.load.batching.filled().max_batch_size if options.load.batching else 64
    least = min(2 * (most or 0), 256) if batching else 0
    return options.request_threads or max(4 * (os.cpu_count() or 1), least)


async def _listen(options: Options, manager: Manager, metrics_path: str | None) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    service = Service(manager, options.as_content)
    pool = ThreadPoolExecutor(_request_threads(options), "request")
    make = grpc_service.threaded if options.threaded else grpc_service.asynchronous
    server: Any = make(service, pool)
    web = None
    if options.rest_port is not None:
        web = _Web(rest.application(service, pool, metrics_path, options.rest_timeout_s), options)
    try:
        port = server.add_insecure_port(f"{options.address}:{options.port}")
        if options.socket_path:
            server.add_insecure_port(f"unix:{options.socket_path}")
    except RuntimeError as error:
        raise TfoptError(f"--port={options.port}: cannot listen at {options.address}: is it in use?") from error
    await (asyncio.to_thread(server.start) if options.threaded else server.start())
    log.info("%s%s:%d ...", GRPC_AT, options.address, port)
    watchers = [asyncio.create_task(_watch(options, manager)), asyncio.create_task(_follow_parent(stop))]
    tasks = []
    if web is not None:
        log.info("%s%s:%d ...", REST_AT, options.address, web.port)
        tasks.append(asyncio.create_task(web.serve()))
    log.info(READY)
    await stop.wait()
    log.info("stopping: requests that are under way have %g s", options.grace_s)
    for task in watchers:
        task.cancel()
    if web is not None:
        web.server.should_exit = True
    if options.threaded:
        await asyncio.to_thread(server.stop(options.grace_s).wait)
    else:
        await server.stop(options.grace_s)
    await asyncio.gather(*tasks, return_exceptions=True)
    pool.shutdown()


class _Web:
    """uvicorn on a port that is known before it runs, inside an event loop that is not its own."""

    def __init__(self, application: Any, options: Options):
        family = socket.AF_INET6 if ":" in options.address else socket.AF_INET
        # asyncio sets TCP_NODELAY only where the protocol is named; without it, each answer waits 40 ms for an ACK.
        self._socket = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._socket.bind((options.address, options.rest_port))
            self._socket.listen(_BACKLOG)  # uvicorn does so later than readiness is announced
        except OSError as error:
            raise TfoptError(
                f"--rest_api_port={options.rest_port}: cannot listen at {options.address}: {error.strerror}"
            ) from error
        self.port = self._socket.getsockname()[1]
        settings = uvicorn.Config(
            application,
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_keep_alive=300,  # a client that pauses between two requests must not find its connection closed
            timeout_graceful_shutdown=int(options.grace_s),
            server_header=False,
        )
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self.server = uvicorn.Server(settings)
        self.server.capture_signals = _no_signals  # type: ignore[method-assign]

    async def serve(self) -> None:
        await self.server.serve(sockets=[self._socket])


@contextlib.contextmanager
def _no_signals() -> Iterator[None]:
    yield


async def _watch(options: Options, manager: Manager) -> None:
    """Looks for new versions and for a new configuration."""
    loop = asyncio.get_running_loop()
    read_config = loop.time()
    known = None
    while waits := [seconds for seconds in (options.poll_s, options.config_poll_s) if seconds > 0]:
        await asyncio.sleep(min(waits))
        if options.model_config_file and 0 < options.config_poll_s <= loop.time() - read_config:
            read_config = loop.time()
            known = await asyncio.to_thread(_reread, options, manager, known)
        if options.poll_s > 0:
            await asyncio.to_thread(manager.poll)


async def _follow_parent(stop: asyncio.Event) -> None:
    """Ends the server with the process that started it for itself (child.py)."""
    parent = os.environ.get(PARENT)
    while parent and os.getppid() == int(parent):
        await asyncio.sleep(1)
    if parent:
        stop.set()


def _reread(options: Options, manager: Manager, known: Any) -> Any:
    """Applies the configuration file if it has changed; what is wrong with it is said, and the server goes on."""
    try:
        found = _models(options)
        if found != known:
            manager.configure(config.models(found))
        return found
    except (TfoptError, ServingError) as error:
        log.error("--model_config_file: %s", error)
        return known
