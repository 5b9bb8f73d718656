"""Downloads from a faulty server: a target is complete or absent, and interrupted transfers resume."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsd.data import downloads
from dsd.data.downloads import fetch, fetch_all, open_text
from dsd.errors import DataError, DsdError
from tests.serving import Server, serve

CONTENT = bytes(range(256)) * 40  # 10,240 bytes
KEY = "datasets.mine.list"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "BACKOFF", 0.001)
    monkeypatch.setattr(downloads, "CHUNK", 1000)
    monkeypatch.setattr(downloads, "RATE", 1000.0)
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "file").write_bytes(CONTENT)
    with serve(tmp_path / "served") as served:
        yield served


def get(server: Server, tmp_path: Path, name: str = "file", **options: str) -> bytes:
    target = tmp_path / "there" / name
    fetch(f"{server.url}/{name}", target, key=KEY, **options)
    return target.read_bytes()


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "there").iterdir()}


def test_a_file_is_fetched_once(server: Server, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    assert get(server, tmp_path, sha256=sha256) == CONTENT
    assert get(server, tmp_path, sha256=sha256) == get(server, tmp_path) == CONTENT
    assert server.counts == {"file": 1}
    assert left(tmp_path) == {"file"}


def test_a_target_with_another_checksum_is_fetched_again(server: Server, tmp_path: Path) -> None:
    get(server, tmp_path)
    (server.folder / "file").write_bytes(b"new")
    assert get(server, tmp_path, sha256=hashlib.sha256(b"new").hexdigest()) == b"new"


def test_a_checksum_that_does_not_match(server: Server, tmp_path: Path) -> None:
    found = hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DataError) as raised:
        get(server, tmp_path, sha256="0" * 64)
    line = f"{KEY}.sha256: 000000000000… expected, {server.url}/file has {found[:12]}…; removed"
    assert str(raised.value) == line
    assert left(tmp_path) == set()


def test_a_local_file_is_copied_each_time(tmp_path: Path) -> None:
    source, target = tmp_path / "here", tmp_path / "there" / "file"
    for content in (b"one", b"two"):
        source.write_bytes(content)
        fetch(str(source), target, key=KEY)
        assert target.read_bytes() == content
    with pytest.raises(DataError, match=rf"^{KEY}: {tmp_path}/nowhere: no such file$"):
        fetch(str(tmp_path / "nowhere"), target, key=KEY)
    with pytest.raises(DataError, match=rf"^{KEY}: ftp://host/file: neither an http\(s\) address nor a path$"):
        fetch("ftp://host/file", target, key=KEY)
    assert left(tmp_path) == {"file"}


# Interruptions


@pytest.mark.parametrize("validators", [("ETag",), ("Last-Modified",)])
def test_an_interrupted_body_is_resumed(validators: tuple[str, ...], server: Server, tmp_path: Path) -> None:
    server.validators, server.cutting = validators, {"file": (4000, 2)}
    assert get(server, tmp_path) == CONTENT
    ranges = [headers.get("Range") for _, _, headers in server.requests]
    assert ranges == [None, "bytes=4000-", "bytes=8000-"]
    assert left(tmp_path) == {"file"}


@pytest.mark.parametrize("how", ["no ranges", "no validator", "weak validator"])
def test_a_body_that_cannot_be_resumed_starts_again(how: str, server: Server, tmp_path: Path) -> None:
    server.cutting = {"file": (4000, 2)}
    if how == "no ranges":
        server.ranges = False
    else:
        server.validators = ()
    if how == "weak validator":
        server.headers["file"] = {"ETag": 'W/"weak"'}
    assert get(server, tmp_path) == CONTENT
    ranges = [headers.get("Range") for _, _, headers in server.requests]
    assert ranges == ([None, "bytes=4000-", "bytes=4000-"] if how == "no ranges" else [None, None, None])


def test_a_part_is_kept_after_the_last_attempt(server: Server, tmp_path: Path) -> None:
    server.ranges, server.cutting = False, {"file": (4000, 99)}
    with pytest.raises(DataError, match=rf"^{KEY}: \S+/file: cut off \(\w+\), 5 times at byte 4000; try again later"):
        get(server, tmp_path)
    assert server.counts == {"file": 5}
    assert left(tmp_path) == {".file.part", ".file.part.json"}
    server.ranges, server.cutting = True, {}
    assert get(server, tmp_path) == CONTENT
    assert server.requests[-1][2]["Range"] == "bytes=4000-"
    assert left(tmp_path) == {"file"}


@pytest.mark.parametrize("change", ["content", "address", "note", "longer", "no note"])
def test_a_part_of_another_file_is_not_resumed(change: str, server: Server, tmp_path: Path) -> None:
    server.cutting = {"file": (4000, 99)}
    server.ranges = False
    with pytest.raises(DataError):
        get(server, tmp_path)
    server.ranges, server.cutting = True, {}
    part, expected = tmp_path / "there" / ".file.part", CONTENT
    note = part.with_name(".file.part.json")
    if change == "content":
        expected = CONTENT[::-1]
        (server.folder / "file").write_bytes(expected)
    if change == "address":
        note.write_text(json.dumps(json.loads(note.read_text()) | {"url": f"{server.url}/other"}))
    if change == "note":
        note.write_text("{")
    if change == "longer":
        part.write_bytes(CONTENT + b"more")
    if change == "no note":
        note.unlink()
        part.write_bytes(b"something else")
    assert get(server, tmp_path) == expected
    assert left(tmp_path) == {"file"}


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, len(CONTENT)), times=st.integers(0, 4), ranges=st.booleans(), tagged=st.booleans())
def test_a_target_is_complete_whatever_is_interrupted(
    cut: int, times: int, ranges: bool, tagged: bool, server: Server, tmp_path: Path
) -> None:
    server.ranges, server.validators, server.cutting = ranges, ("ETag",) if tagged else (), {"file": (cut, times)}
    target = tmp_path / "there" / "file"
    target.unlink(missing_ok=True)
    assert get(server, tmp_path) == CONTENT


def full(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_no_target(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(downloads.os, "fsync", full)
        with pytest.raises(
            DsdError, match=r"there: disk full, no room for http\S+/file, \d+ bytes are free$"
        ) as raised:
            get(server, tmp_path)
    assert not isinstance(raised.value, DataError)  # no other address is tried
    assert not (tmp_path / "there" / "file").exists()
    assert get(server, tmp_path) == CONTENT


# Refusals


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (401, r"refused \(401 Unauthorized\)"),
        (403, r"refused \(403 Forbidden\)"),
        (404, r"not found \(404 Not Found\)"),
        (410, r"not found \(410 Gone\)"),
        (418, r"418 I'm a Teapot"),
    ],
)
def test_refused_requests_are_not_retried(status: int, line: str, server: Server, tmp_path: Path) -> None:
    server.failing = {"file": (status, 99)}
    with pytest.raises(DataError, match=rf"(?i)^{KEY}: {server.url}/file: {line}$"):
        get(server, tmp_path)
    assert server.counts == {"file": 1}
    assert left(tmp_path) == set()


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_temporary_failures_are_retried(status: int, server: Server, tmp_path: Path) -> None:
    server.failing = {"file": (status, 3)}
    assert get(server, tmp_path) == CONTENT
    assert server.counts == {"file": 4}


def test_retries_are_limited(server: Server, tmp_path: Path) -> None:
    server.failing = {"file": (503, 99)}
    line = (
        rf"^{KEY}: {server.url}/file: 503 Service Unavailable, 5 times; try again later, it resumes where it stopped$"
    )
    with pytest.raises(DataError, match=line):
        get(server, tmp_path)
    assert server.counts == {"file": 5}


def test_retry_after_is_obeyed(server: Server, tmp_path: Path) -> None:
    server.failing, server.headers = {"file": (429, 1)}, {"file": {"Retry-After": "1"}}
    start = time.monotonic()
    get(server, tmp_path)
    assert time.monotonic() - start >= 1


def test_no_server(server: Server, tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=rf"^{KEY}: http://127\.0\.0\.1:1/file: no answer in 5 attempts \(ConnectionError\)"
    ):
        fetch("http://127.0.0.1:1/file", tmp_path / "there" / "file", key=KEY)


@pytest.mark.parametrize("how", ["header", "body"])
def test_an_html_page_is_not_the_file(how: str, server: Server, tmp_path: Path) -> None:
    if how == "header":
        server.headers["file"] = {"Content-Type": "text/html; charset=utf-8"}
    else:
        (server.folder / "file").write_bytes(b"\n<!DOCTYPE html><title>Sign in</title>")
    with pytest.raises(DataError, match=rf"^{KEY}: \S+/file: an HTML page instead of the file$"):
        get(server, tmp_path)
    assert left(tmp_path) == set()


# Many files


def test_each_file_comes_from_its_first_source_that_has_it(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "images"
    for place, name in (("a", "1.jpg"), ("b", "2.jpg"), ("b", "3.jpg")):
        (server.folder / place).mkdir(exist_ok=True)
        (server.folder / place / name).write_bytes(f"{place}{name}".encode())
    folder.mkdir(parents=True)
    (folder / "3.jpg").write_bytes(b"from before")
    server.headers["b/5.jpg"] = {"Content-Type": "text/html"}
    (server.folder / "b" / "5.jpg").write_bytes(b"page")
    addresses = {f"{n}.jpg": [f"{server.url}/{place}/{n}.jpg" for place in "ab"] for n in range(1, 6)}
    addresses["6.jpg"] = [str(server.folder / "file")]
    addresses["7.jpg"] = []
    assert fetch_all(addresses, folder, key=KEY) == [
        ("4.jpg", "not found (404 Not Found)"),
        ("5.jpg", "not found (404 Not Found); an HTML page instead of the file"),
        ("7.jpg", "no address"),
    ]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "1.jpg": b"a1.jpg", "2.jpg": b"b2.jpg", "3.jpg": b"from before", "6.jpg": CONTENT,
    }  # fmt: skip
    assert server.counts == {**{f"a/{n}.jpg": 1 for n in (1, 2, 4, 5)}, **{f"b/{n}.jpg": 1 for n in (2, 4, 5)}}
    server.requests.clear()
    assert len(fetch_all(addresses, folder, key=KEY)) == 3
    assert set(server.counts) == {"a/4.jpg", "a/5.jpg", "b/4.jpg", "b/5.jpg"}


def test_a_server_that_does_not_answer_is_given_up(tmp_path: Path, server: Server) -> None:
    addresses = {f"{n}.jpg": ["http://127.0.0.1:1/file"] for n in range(400)}
    start = time.monotonic()
    with pytest.raises(DataError, match=rf"^{KEY}: 16 files in a row, the last 15\.jpg: no answer in 5 attempts"):
        fetch_all(addresses, tmp_path / "images", key=KEY)
    assert time.monotonic() - start < 5


def test_a_full_disk_stops_all_downloads(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads.os, "fsync", full)
    with pytest.raises(DsdError, match="disk full"):
        fetch_all({f"{n}.jpg": [f"{server.url}/file"] for n in range(100)}, tmp_path / "images", key=KEY)
    assert server.counts["file"] < 100
    assert not list((tmp_path / "images").glob("*.jpg"))


def test_the_rate_is_kept(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "RATE", 50.0)
    start = time.monotonic()
    fetch_all({f"{n}.jpg": [f"{server.url}/file"] for n in range(26)}, tmp_path / "images", key=KEY)
    assert time.monotonic() - start >= 0.5


# Archives


def packed(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def read(path: Path) -> str:
    with open_text(path) as text:
        return text.read()


def test_plain_and_zipped_text(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes("\ufeffnaïve\r\n".encode())
    assert read(plain) == "naïve\r\n"
    assert read(packed(tmp_path / "a.zip", **{"folder/": b"", "folder/a.json": "naïve".encode()})) == "naïve"


def test_a_name_in_an_archive_cannot_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    path = packed(tmp_path / "inner" / "a.zip", **{"../../escaped": b"text"})
    assert read(path) == "text"
    assert {found.name for found in tmp_path.rglob("*")} == {"inner", "a.zip"}


def test_refused_archives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"two\.zip: an archive of 2 files; it must contain exactly one$"):
        read(packed(tmp_path / "two.zip", a=b"1", b=b"2"))
    whole = packed(tmp_path / "whole.zip", a=bytes(10**6))
    (tmp_path / "short.zip").write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"short\.zip: corrupt archive: .*; remove it and download again$"):
        read(tmp_path / "short.zip")
    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr("a", b"content")
    (tmp_path / "altered.zip").write_bytes(stored.getvalue().replace(b"content", b"contend", 1))
    with pytest.raises(DataError, match=r"altered\.zip: corrupt archive: Bad CRC-32"):
        read(tmp_path / "altered.zip")
    monkeypatch.setattr(downloads, "MAX_UNPACKED", 1000)
    with pytest.raises(DataError, match=r"whole\.zip: 1000000 bytes unpacked, more than the 1000 allowed$"):
        read(whole)


def test_an_archive_with_a_false_size(tmp_path: Path) -> None:
    whole = packed(tmp_path / "bomb.zip", a=bytes(10**6))
    (tmp_path / "bomb.zip").write_bytes(
        whole.read_bytes().replace((10**6).to_bytes(4, "little"), (10).to_bytes(4, "little"))
    )
    with pytest.raises(DataError, match=r"bomb\.zip: corrupt archive: Bad CRC-32"):
        read(tmp_path / "bomb.zip")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"na\xefve")
    with pytest.raises(DataError, match=r"latin: not UTF-8 text: invalid continuation byte at byte 2$"):
        read(tmp_path / "latin")
