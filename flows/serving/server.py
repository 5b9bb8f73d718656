"""`dsd serve`: the HTTP server.

It takes the requests of MLflow's own server and returns the same answers, but only in JSON, and it checks the size of a
request before reading it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from dsd.errors import BusyError, DsdError
from flows.serving.schema import parse_json
from flows.serving.service import FAILED, Service
from flows.stores import uri


def application(service: Service) -> Starlette:
    """POST /invocations and GET /ping, as MLflow's server has them."""

    async def invocations(request: Request) -> Response:
        settings = service.settings
        try:
            async with asyncio.timeout(settings.wait_seconds):
                body = await request.body()
        except TimeoutError:
            raise HTTPException(408, f"the request did not arrive within {settings.wait_seconds:g} seconds") from None
        answers = await asyncio.to_thread(lambda: service.submit(parse_json(body)))
        waiting = [asyncio.wrap_future(answer) for answer in answers]
        _, late = await asyncio.wait(waiting, timeout=settings.wait_seconds)
        if late:
            raise service.cancel(answers)
        return JSONResponse({"predictions": [answer.result() for answer in waiting]})

    async def ping(_: Request) -> Response:
        return Response("\n")

    async def http_error(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"message": error.detail}, error.status_code)

    def error_as(status: int, message: str = "") -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handler(_: Request, error: Exception) -> Response:
            return JSONResponse({"message": message or str(error)}, status)

        return handler

    handlers: dict[Any, Any] = {HTTPException: http_error, BusyError: error_as(503), DsdError: error_as(400)}
    return Starlette(
        routes=[Route("/invocations", invocations, methods=["POST"]), Route("/ping", ping)],
        exception_handlers={**handlers, Exception: error_as(500, FAILED)},
        max_body_size=service.settings.max_bytes,
    )


def serve(model: str, host: str, port: int) -> None:
    """Serve a version, such as models:/dsd-backbone@champion, until the process is stopped.

    Raises:
        DsdError: there is no such version.
        CheckpointError: its checkpoint is missing or has changed.
    """
    import uvicorn

    mlflow.set_tracking_uri(uri())
    try:
        service = mlflow.pyfunc.load_model(model).unwrap_python_model()
    except MlflowException as error:
        raise DsdError(f"--model {model}: {str(error).splitlines()[0]}; `dsd promote` registers versions") from None
    uvicorn.run(
        application(service),
        host=host,
        port=port,
        limit_concurrency=service.settings.max_waiting,
        log_level="warning",
        access_log=False,
    )
