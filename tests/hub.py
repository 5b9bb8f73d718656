"""A hub on this machine: its addresses, headers and refusals, over a folder of repositories."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# What the hub answers for repositories of these names: status, error code, message.
REFUSALS = {
    "vanished": (404, "RepoNotFound", "Repository not found"),
    "private": (401, "RepoNotFound", "Repository not found"),
    "refused": (401, "", "Invalid credentials in Authorization header"),
    "forbidden": (403, "", "The token lacks a permission"),
    "unpinned": (404, "RevisionNotFound", "Invalid rev id"),
}


class _Hub(BaseHTTPRequestHandler):
    root: Path
    asked: list[str]

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a test's output is its own."""

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._answer(status, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        api = path.startswith("api/models/")
        owner, name, *rest = [*path.removeprefix("api/models/").split("/"), ""]
        files = {file.relative_to(self.root / owner / name).as_posix(): file for file in self._files(owner, name)}
        if name in REFUSALS:
            self._refuse(*REFUSALS[name])
        elif api and rest[0] == "tree":
            listed = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": f"{i:040x}"}
                for i, (n, f) in enumerate(files.items())
            ]
            self._answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        elif api:
            told = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [{"rfilename": n} for n in files]}
            self._answer(200, json.dumps(told).encode())
        elif name == "gated":
            self._refuse(403, "GatedRepo", "Access to this model is restricted")
        elif (file := "/".join(rest[2:-1])) not in files:  # or a client of an earlier server at this port
            self._refuse(404, "EntryNotFound", "no such file")
        else:
            if self.command == "GET":
                self.asked.append(file)
            self._answer(200, files[file].read_bytes(), ETag=f'"{file}"')

    do_HEAD = do_GET

    def _files(self, owner: str, name: str) -> list[Path]:
        return sorted(file for file in (self.root / owner / name).rglob("*") if file.is_file())


@contextmanager
def hub(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """huggingface_hub talks to a server of `<root>/<owner>/<name>/` with an empty cache; yields what was fetched."""
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Hub", (_Hub,), {"root": root, "asked": asked}))
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
