"""A local HTTP server for tests: a folder's files, with all that a server may do to a download."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit


@dataclass
class Server:
    """What is served, and how badly; paths are relative to the folder. Everything may be changed while it runs."""

    folder: Path
    url: str = ""
    token: str | None = None  # asked for as "Authorization: Bearer <token>", 401 without
    ranges: bool = True  # whether Range is heeded
    validators: tuple[str, ...] = ("ETag", "Last-Modified")  # which of them are sent
    headers: dict[str, dict[str, str]] = field(default_factory=dict)  # further ones, or others, by path
    failing: dict[str, tuple[int, int]] = field(default_factory=dict)  # path → (status, how many times still)
    cutting: dict[str, tuple[int, int]] = field(default_factory=dict)  # path → (bytes sent, how many times still)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)  # (method, path, headers), in order
    lock: Lock = field(default_factory=Lock)

    @property
    def counts(self) -> Counter[str]:
        """How often each path was asked for."""
        return Counter(path for _, path, _ in self.requests)

    def strike(self, rules: dict[str, tuple[int, int]], path: str) -> int | None:
        """The value of a rule that still applies to the path, counted down."""
        with self.lock:
            value, times = rules.get(path, (0, 0))
            if times:
                rules[path] = value, times - 1
            return value if times else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    told: Server

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.told.requests.append((self.command, path, dict(self.headers)))
        file = self.told.folder / path
        if self.told.token is not None and self.headers.get("Authorization") != f"Bearer {self.told.token}":
            return self._answer(401, path)
        if (status := self.told.strike(self.told.failing, path)) is not None:
            return self._answer(status, path)
        if not file.is_file():
            return self._answer(404, path)
        body = file.read_bytes()
        known = {"ETag": f'"{hashlib.sha256(body).hexdigest()[:16]}"', "Last-Modified": formatdate(10**9, usegmt=True)}
        headers = {name: known[name] for name in self.told.validators}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if self.told.ranges else None
        if asked is None or self.headers.get("If-Range") not in (None, *headers.values()):
            return self._answer(200, path, body, headers)
        first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
        if first >= len(body):
            return self._answer(416, path, headers={"Content-Range": f"bytes */{len(body)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(body)}"
        return self._answer(206, path, body[first : last + 1], headers)

    do_HEAD = do_GET

    def _answer(self, status: int, path: str, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        own = {"Content-Length": str(len(body)), "Content-Type": "application/octet-stream", **(headers or {})}
        for name, value in (own | self.told.headers.get(path, {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = self.told.strike(self.told.cutting, path) if body else None
        self.wfile.write(body[:sent])
        self.close_connection = self.close_connection or sent is not None

    def log_message(self, *args: object) -> None:
        """Tests print nothing."""


@contextmanager
def serve(folder: Path) -> Iterator[Server]:
    """Serves a folder on a free port of this machine."""
    told = Server(folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"told": told}))
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield told
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
