"""What the server tells its operators: metrics for Prometheus, and a line of JSON in the log for each request."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from flows.serving.current import Current

log = logging.getLogger("dsd.requests")
PATH = "/invocations"
SECONDS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)  # upper ends of the classes of latency
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)


class Monitor:
    """The metrics of what is served; an ASGI layer around the application counts and times its requests."""

    def __init__(self, current: Current, app: ASGIApp) -> None:
        self._app, self._registry = app, CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self._requests = Counter(
            "dsd_requests", "Requests by HTTP status; 4xx and 503 are refusals.", ["status"], **own
        )
        self._seconds = Histogram(
            "dsd_request_seconds", "From the head of a request to its answer.", buckets=SECONDS, **own
        )
        self._open = Gauge("dsd_requests_open", "Requests that are received or answered now.", **own)
        waiting = Gauge("dsd_rows_waiting", "Images with their texts that wait for a round.", **own)
        waiting.set_function(lambda: current.service.rounds.waiting.qsize())
        self._fill = Histogram("dsd_round_fill", "Rows of a round as a share of a full batch.", buckets=SHARES, **own)
        self._model = Info("dsd_model", "The model that answers.", **own)
        current.changed = self._changed
        self._changed(current)

    def _changed(self, current: Current) -> None:
        """Describe the version that answers from now on."""
        current.service.rounds.filled = self._fill.observe
        settings = current.service.settings
        described = {"digest": str(settings.backbone.digest), "method": settings.method.scorer}
        self._model.info({"version": current.number, **described})

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH:
            return await self._app(scope, receive, send)
        start, status = time.perf_counter(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            with self._open.track_inprogress():
                await self._app(scope, receive, sent)
        finally:
            seconds = time.perf_counter() - start
            self._requests.labels(str(status)).inc()
            self._seconds.observe(seconds)
            client = (scope.get("client") or ("", 0))[0]
            log.info(
                json.dumps(
                    {"time": round(time.time(), 3), "client": client, "status": status, "seconds": round(seconds, 4)}
                )
            )
