"""`dsd serve`: the HTTP server.

It takes the requests of MLflow's own server and returns the same answers, but only in JSON. What a client can occupy is
bounded: connections by time, bodies by bytes, and work by number. `/ping` needs none of these.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from logging import StreamHandler
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from dsd.errors import BusyError, DsdError
from flows.serving.current import Current, Newer
from flows.serving.monitoring import PATH, Monitor, log
from flows.serving.schema import Answer, ValueCount, parse_json
from flows.serving.service import FAILED

HEAD_SECONDS = 10.0  # for the head of a request, after the connection or after the last answer
IDLE_SECONDS = 5  # without a byte, after the last answer
BODIES = 8  # requests of the maximum size whose bodies are in memory


@dataclass
class Bound:
    """A limit on what all requests together use; a request that exceeds it is refused."""

    limit: int
    used: int = 0

    @contextmanager
    def take(self, amount: int = 1) -> Iterator[None]:
        """Use an amount of the limit within the block; raise BusyError if too little is left."""
        if self.used + amount > self.limit:
            raise BusyError("too many requests at once; try again later")
        self.used += amount
        try:
            yield
        finally:
            self.used -= amount


class Requests:
    """The requests that are being received, parsed and answered."""

    def __init__(self, current: Current) -> None:
        """The bounds on all requests together stay those of the first version."""
        self._current, settings = current, current.service.settings
        self._bytes = Bound(BODIES * settings.max_bytes)
        self._work = Bound(settings.max_waiting)
        self._parser = ThreadPoolExecutor(1, "parser")  # a decoded image takes many times the size of its file

    async def answer(self, request: Request) -> list[Answer]:
        """Receive and answer a request.

        Raises:
            HTTPException: the body did not arrive in time.
            BusyError: too much is being received or computed, or it was not answered in time.
            DsdError: the first invalid row and its error, in one line.
        """
        with ExitStack() as received:
            body = await self._receive(request, received)
            service = self._current.service
            seconds = service.settings.wait_seconds
            with self._work.take():
                answers: list[Future[Answer]] = []
                try:
                    async with asyncio.timeout(seconds):
                        loop = asyncio.get_running_loop()
                        answers = await loop.run_in_executor(self._parser, lambda: service.submit(parse_json(body)))
                        received.close()
                        return list(await asyncio.gather(*map(asyncio.wrap_future, answers)))
                except TimeoutError:
                    raise service.cancel(answers) from None

    async def _receive(self, request: Request, received: ExitStack) -> bytearray:
        """The body of a request, whose bytes count until `received` is closed."""
        settings, body = self._current.service.settings, bytearray()
        seconds, values = settings.wait_seconds, ValueCount(settings)
        try:
            async with asyncio.timeout(seconds):
                async for chunk in request.stream():
                    received.enter_context(self._bytes.take(len(chunk)))
                    values.add(chunk)
                    body += chunk
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {seconds:g} seconds") from None
        return body


def application(current: Current) -> ASGIApp:
    """POST /invocations and GET /ping, as MLflow's server has them; /healthz, /readyz and /metrics for operators."""
    requests = Requests(current)

    async def invocations(request: Request) -> Response:
        return JSONResponse({"predictions": await requests.answer(request)})

    async def ping(_: Request) -> Response:
        return Response("\n")

    async def ready(_: Request) -> Response:
        alive = current.service.rounds.alive
        return Response("ready\n") if alive else Response("a thread of the model has ended\n", 503)

    async def metrics(_: Request) -> Response:
        return Response(monitor.text(), media_type="text/plain; version=0.0.4")

    async def http_error(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"message": error.detail}, error.status_code)

    def error_as(status: int, message: str = "") -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handler(_: Request, error: Exception) -> Response:
            return JSONResponse({"message": message or str(error)}, status)

        return handler

    handlers: dict[Any, Any] = {
        HTTPException: http_error,
        ClientDisconnect: error_as(400),  # nobody reads it
        BusyError: error_as(503),
        DsdError: error_as(400),
    }
    routes = [
        Route(PATH, invocations, methods=["POST"]), Route("/ping", ping), Route("/healthz", ping),
        Route("/readyz", ready), Route("/metrics", metrics),
    ]  # fmt: skip
    app = Starlette(
        routes=routes,
        exception_handlers={**handlers, Exception: error_as(500, FAILED)},
        max_body_size=current.service.settings.max_bytes,
    )
    monitor = Monitor(current, app)
    return monitor


class Connection(H11Protocol):
    """A connection of uvicorn, closed if no head of a request arrives in `HEAD_SECONDS`."""

    _limit: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._restart_limit()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._restart_limit()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_limit()

    def _restart_limit(self) -> None:
        self._stop_limit()
        self._limit = self.loop.call_later(HEAD_SECONDS, self._close_without_request)

    def _stop_limit(self) -> None:
        if self._limit is not None:
            self._limit.cancel()

    def _close_without_request(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def http_server(current: Current, host: str, port: int) -> Server:
    """The server of `dsd serve`, not yet running."""
    return Server(
        Config(
            application(current),
            host=host,
            port=port,
            http=Connection,
            ws="none",
            lifespan="off",
            timeout_keep_alive=IDLE_SECONDS,
            log_level="warning",
            access_log=False,
        )
    )


def serve(newer: Newer, host: str, port: int, refresh: float) -> None:
    """Serve a registered version until the process is stopped; every `refresh` seconds, look whether it is another.

    Raises:
        DsdError: there is no such version.
        CheckpointError: its checkpoint is missing or has changed.
    """
    log.setLevel("INFO")
    log.addHandler(StreamHandler(sys.stdout))  # its lines are JSON, without a prefix
    current = Current.open(newer)
    stop = current.follow(newer, refresh)
    with suppress(KeyboardInterrupt):
        http_server(current, host, port).run()
    stop.set()
