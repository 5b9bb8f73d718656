"""A local mock of the Hugging Face Hub: the endpoints that its client uses to fetch a dataset or a model.

Large files (.parquet, .safetensors, .tar) are served as with LFS: their URLs redirect to another host without commits.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"
LARGE = (".parquet", ".safetensors", ".tar")


@dataclass
class Hub:
    """The content of the server, its faults, and the requests that it received.

    gated: repositories that need `TOKEN` and `accepted` terms.
    broken: files whose next transfer ends after this number of bytes.
    damaged: files that are sent with other bytes than those of their SHA-256.
    down: status and message of all responses, if set.
    """

    repositories: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    accepted: bool = False
    broken: dict[str, int] = field(default_factory=dict)
    damaged: dict[str, bytes] = field(default_factory=dict)
    down: tuple[int, str] | None = None
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> list[str]:
        """The files that were requested, each with its range if there was one."""
        return [request.removeprefix("GET ") for request in self.requests if re.match(r"GET [^/]", request)]


def files_of(folder: Path) -> dict[str, bytes]:
    """The folder as a repository."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@contextmanager
def connected(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve the hub and redirect the client to it: no token, no delays, an empty cache in the folder."""
    with serving(hub):
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        pattern = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", pattern)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/cdn/([0-9a-f]{64})", path):
            self._bytes(*self._large(found[1]))
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._commit(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/auth-check", path):
            if self._allowed(found[1], COMMIT) and self._admitted(found[1]):
                self._answer(200, {}, b"")
        elif found := re.fullmatch(r"/api/(?:datasets|models)/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._listing(*found.groups())
        elif found := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        else:
            self._refuse(404, "EntryNotFound", "no such page")

    def _large(self, sha256: str) -> tuple[str, bytes]:
        files = (item for files in self.hub.repositories.values() for item in files.items())
        return next((path, data) for path, data in files if hashlib.sha256(data).hexdigest() == sha256)

    def _allowed(self, repository: str, revision: str) -> bool:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.hub.requests.append(f"{self.command} {self.path}")
        if self.hub.down:
            self._refuse(self.hub.down[0], None, self.hub.down[1])
        elif token and token != TOKEN:
            self._refuse(401, None, "Invalid credentials in Authorization header")
        elif repository not in self.hub.repositories:
            if token:
                self._refuse(404, "RepoNotFound", "Repository not found")
            else:
                self._refuse(401, None, "Invalid username or password.")
        elif revision not in (COMMIT, "main"):
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return True
        return False

    def _commit(self, repository: str, revision: str) -> None:
        if self._allowed(repository, revision):
            files = [{"rfilename": path, "size": len(data)} for path, data in self.hub.repositories[repository].items()]
            gated = "auto" if repository in self.hub.gated else False
            content = {"id": repository, "sha": COMMIT, "gated": gated, "siblings": files}
            self._answer(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _listing(self, repository: str, revision: str) -> None:
        if not self._allowed(repository, revision):
            return
        entries = []
        for path, data in self.hub.repositories[repository].items():
            entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self._answer(200, {"Content-Type": "application/json"}, json.dumps(entries).encode())

    def _admitted(self, repository: str) -> bool:
        """Whether the request may read a repository that may be gated."""
        token = self.headers.get("Authorization")
        admitted = repository not in self.hub.gated or bool(token and self.hub.accepted)
        if not admitted:
            self._refuse(403 if token else 401, "GatedRepo", f"Access to {repository} is restricted.")
        return admitted

    def _file(self, repository: str, revision: str, path: str) -> None:
        if not self._allowed(repository, revision) or not self._admitted(repository):
            return
        data = self.hub.repositories[repository].get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        if not path.endswith(LARGE):
            return self._bytes(path, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        sha256 = hashlib.sha256(data).hexdigest()
        elsewhere = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{sha256}"
        linked = {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": COMMIT}
        self._answer(302, {"Location": elsewhere, **linked}, b"")

    def _bytes(self, path: str, data: bytes, headers: dict[str, str] | None = None) -> None:
        requested = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if self.command == "GET":
            self.hub.requests.append(f"GET {path}{' ' + requested[0] if requested else ''}")
        whole, data = len(data), self.hub.damaged.get(path, data)
        first = int(requested[1]) if requested else 0
        headers = {**(headers or {}), "Accept-Ranges": "bytes"}
        if requested:
            headers["Content-Range"] = f"bytes {first}-{whole - 1}/{whole}"
        self._answer(206 if requested else 200, headers, data[first:], self.hub.broken.pop(path, None))

    def _answer(self, status: int, headers: dict[str, str], data: bytes, most: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:most])
            self.close_connection = self.close_connection or most is not None

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._answer(status, headers, json.dumps({"error": message}).encode())
