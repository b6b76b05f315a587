"""The process that serves: its socket, its signals and its end. What is served is `app.py`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import signal
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import uvicorn

from cupaged.async_engine import AsyncEngine
from cupaged.errors import InvalidArgument
from cupaged.server.app import Api, ServerOptions

if TYPE_CHECKING:
    from cupaged.llm import LLM

logger = logging.getLogger("cupaged")


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address, before a model is loaded for it; InvalidArgument where that cannot be."""
    if not 0 <= port <= 65535:
        raise InvalidArgument(f"port is {port}; give one from 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        raise InvalidArgument(f"cannot listen on {host} port {port}: {cause}; give another --host or --port") from error
    return bound


def serve(llm: LLM, bound: socket.socket, options: ServerOptions, access_log: bool = False) -> None:
    """Serve until SIGTERM or Ctrl-C: then no more requests are taken, and the running ones get `options.grace` to finish.

    A second signal ends them at once. KeyboardInterrupt is raised at the end if it was Ctrl-C.
    """
    _raise_file_limit()
    api = Api(AsyncEngine(llm), options)
    config = uvicorn.Config(
        api,
        log_config=None,
        log_level="info" if access_log else "critical",  # clients that hang up are no error of ours
        access_log=access_log,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=math.ceil(options.grace) + 2,
        http="h11",
        ws="none",
    )
    server = _Server(config, api)
    host, port = bound.getsockname()[:2]
    server.said = f"serving {options.name} on http://{f'[{host}]' if ':' in host else host}:{port}/v1; Ctrl-C ends"
    try:
        server.run([bound])
    except OSError as error:  # another process was quicker
        raise InvalidArgument(f"cannot listen on {host} port {port}: {error.strerror}; give another --port") from error
    if server.interrupted:
        raise KeyboardInterrupt


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, api: Api) -> None:
        super().__init__(config)
        self.api, self.said, self.interrupted, self.hurries = api, "", False, False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but that a signal is not raised once more at the end: SIGTERM is the way to end, with exit code 0."""
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: object) -> None:
        self.interrupted = self.interrupted or sig == signal.SIGINT
        self.force_exit = self.hurries  # the third time
        self.hurries = self.should_exit  # the second
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        logger.warning(self.said)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.api.draining = True
        ending = asyncio.ensure_future(self._end_requests())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()
            await self.api.engine.close()

    async def _end_requests(self) -> None:
        """After the grace time, or a second signal, what still runs is aborted, so that its clients are told."""
        ends = time.monotonic() + self.api.options.grace
        while time.monotonic() < ends and not self.hurries:
            await asyncio.sleep(0.05)
        self.api.ended.set()
        await self.api.engine.close()


def _raise_file_limit() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):  # Windows has none; some systems refuse
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
