"""The server's life: load, listen, watch, and end when it is told to."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tensorflow_serving.config import model_server_config_pb2

from tfopt.errors import TfoptError
from tfopt.serving.server import grpc_service
from tfopt.serving.server.errors import ServingError
from tfopt.serving.server.manager import Manager, quiet
from tfopt.serving.server.servable import LoadOptions, Servable
from tfopt.serving.server.service import Service

PARENT = "TFOPT_SERVE_PARENT"  # id of the process with which the server is to end, in the environment
GRPC_AT, REST_AT, READY = "Running gRPC ModelServer at ", "Exporting HTTP/REST API at:", "Serving"
_log = logging.getLogger("tfopt.serve")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the flags say; see pipelines/serve.py.

    Attributes:
      address: to listen at.
      port: of gRPC; 0 for a free one.
      rest_port: of REST; 0 for a free one, None for no REST.
      load: how versions are loaded.
    """

    model_name: str = "default"
    model_base_path: str = ""
    address: str = "127.0.0.1"
    port: int = 8500
    rest_port: int | None = None
    poll_s: float = 1.0
    load_threads: int = 0
    grace_s: float = 30.0
    load: LoadOptions = dataclasses.field(default_factory=LoadOptions)


def serve(options: Options) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
      TfoptError: the options are wrong, a model cannot be loaded, or a port is taken.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s", force=True)
    quiet()
    _log.info("tfopt-serve is for trying and for tests; serve in production with tensorflow_model_server")
    manager = Manager(functools.partial(Servable, options=options.load), options.load_threads)
    config = model_server_config_pb2.ModelConfig(name=options.model_name, base_path=options.model_base_path)
    try:
        manager.configure({config.name: config})
    except ServingError as error:
        raise TfoptError(f"Failed to start server. Error: {error.message}") from error
    asyncio.run(_listen(options, manager, Service(manager)))
    _log.info("stopped")


async def _listen(options: Options, manager: Manager, service: Service) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    pool = ThreadPoolExecutor(max(4, 2 * (os.cpu_count() or 1)), "request")
    server = grpc_service.server(service, pool)
    try:
        port = server.add_insecure_port(f"{options.address}:{options.port}")
    except RuntimeError as error:
        raise TfoptError(f"--port={options.port}: cannot listen at {options.address}: is it in use?") from error
    await server.start()
    _log.info("%s%s:%d ...", GRPC_AT, options.address, port)
    _log.info(READY)
    watcher = asyncio.create_task(_watch(options, manager, stop))
    await stop.wait()
    await server.stop(options.grace_s)
    watcher.cancel()
    pool.shutdown()


async def _watch(options: Options, manager: Manager, stop: asyncio.Event) -> None:
    """Looks for new versions, and for the death of the process that wanted the server."""
    parent: Any = os.environ.get(PARENT)
    while True:
        await asyncio.sleep(options.poll_s)
        if parent and os.getppid() != int(parent):
            stop.set()
        await asyncio.to_thread(manager.poll)
