"""Files by their addresses: whole or not at all, gone on with after a break, checked, and asked for politely.

A download grows in `.<name>.part` beside its target and takes the target's name when it is complete.
`.<name>.part.json` says of which address and version the part is; without it a part is begun anew.
"""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import IO, TextIO

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from dsd.errors import DataError, DsdError
from dsd.progress import progress
from dsd.store import file_digest

TRIES = 5  # of an address, and of a body that gets no further
BACKOFF = 0.5  # seconds before a further try, twice as many before each one after it
PASSING = (429, 500, 502, 503, 504)  # statuses that may be others the next time
PATIENCE = 300  # seconds that a server may ask us to wait (Retry-After), at most
TIMEOUT = (10, 60)  # seconds to connect, and between two pieces of a body
PIECE = 1 << 16  # bytes that are written at once; of a body cut off, no more than that is lost
THREADS = 8  # downloads at once
RATE = 10.0  # requests a second, all threads together
GIVE_UP = 16  # files in a row that no server answers for: the others would not come either
UNPACKED = 8 << 30  # bytes that an archive may hold
HTML = (b"<!doctype html", b"<html")


class _Failed(Exception):
    """Why an address gives no file; `passing` if it may do so later."""

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


class _Cut(Exception):
    """A body that ended early; what came of it is kept."""


def fetch(source: str, target: Path, *, setting: str, sha256: str | None = None) -> None:
    """Puts the file at a URL (http, https) or a path at `target`.

    A target that is there already came from the same URL: its name must stand for it. It is kept unless its checksum
    is not the one that is asked for. A local file is copied each time.

    Args:
        setting: the key of params.yaml that names the source.
        sha256: of the file, 64 hexadecimal digits, where it is known.

    Raises:
        DataError: there is no such file, it is refused, no server answers, an HTML page or another file comes in its
            place; names the setting and the source.
        DsdError: the disk is full; no target is left behind, and what has come so far is gone on with.
    """
    if target.exists() and _remote(source) and sha256 in (None, file_digest(target)):
        return
    with _session() as session:
        try:
            part = _part(session, source, target)
        except _Failed as failed:
            again = "; try again later, it goes on where it stopped" if failed.passing else ""
            raise DataError(f"{setting}: {source}: {failed}{again}") from failed
    if sha256 is not None and (found := file_digest(part)) != sha256:
        _discard(part)
        raise DataError(f"{setting}.sha256: {sha256[:12]}… expected, {source} has {found[:12]}…; removed")
    _complete(part, target)


def fetch_all(addresses: Mapping[str, Sequence[str]], folder: Path, *, setting: str) -> list[tuple[str, str]]:
    """Fetches the files that are not in the folder yet, each from the first of its addresses that has it.

    Args:
        addresses: URLs or paths by file name, in the order in which they are tried.
        setting: as for `fetch`.

    Returns:
        (name, reason) of each file that none of its addresses gave, in the order of `addresses`.

    Raises:
        DataError: no server answers, for many files in a row.
        DsdError: the disk is full.
    """
    wanted = [name for name in addresses if not (folder / name).exists()]
    missing: list[tuple[str, str]] = []
    unanswered, pace = 0, _Pace(RATE)
    with _session() as session, ThreadPoolExecutor(THREADS) as pool:
        tries = [pool.submit(_first, session, pace, addresses[name], folder / name) for name in wanted]
        try:
            for name, attempt in progress(zip(wanted, tries, strict=True), total=len(wanted), desc=folder.parent.name):
                failed = attempt.result()
                unanswered = unanswered + 1 if failed and failed.passing else 0
                if failed:
                    missing.append((name, str(failed)))
                if unanswered == GIVE_UP:
                    raise DataError(f"{setting}: {GIVE_UP} files in a row, the last {name}: {failed}; try again later")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return missing


def length(source: str, *, setting: str) -> int:
    """The bytes of the file at a URL, 0 where its server does not say; of a path, which is copied, as well.

    Raises:
        DataError: as for `fetch`.
    """
    if not _remote(source):
        if not Path(source).is_file():
            raise DataError(f"{setting}: {source}: no such file")
        return Path(source).stat().st_size
    with _session() as session:
        try:
            response = session.head(source, timeout=TIMEOUT, allow_redirects=True)
            _check(response)
        except _Failed as failed:
            raise DataError(f"{setting}: {source}: {failed}") from failed
        except requests.RequestException as error:
            raise DataError(f"{setting}: {source}: no answer in {TRIES} tries ({type(error).__name__})") from error
    return int(response.headers.get("Content-Length", 0))


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """The text of a file or, of a .zip, that of the only file in it.

    Nothing is extracted to the disk, so no name in an archive leads anywhere.

    Raises:
        DataError: an archive that is broken, encrypted, of several files or of more than `UNPACKED` bytes; no UTF-8.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            with _member(path, zipfile.ZipFile(file)) if packed else file as stream:
                yield io.TextIOWrapper(stream, "utf-8-sig", newline="")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: a broken archive: {error}; remove it and download again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _member(path: Path, archive: zipfile.ZipFile) -> IO[bytes]:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise DataError(f"{path}: an archive of {len(members)} files; one with the one file is needed")
    (member,) = members
    if member.file_size > UNPACKED:  # no more than this is read, whatever comes
        raise DataError(f"{path}: {member.file_size} bytes unpacked, more than the {UNPACKED} allowed")
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{path}: an archive that is encrypted or of another method than deflate")
    return archive.open(member)


class _Pace:
    """Lets its callers pass one by one, so many a second."""

    def __init__(self, rate: float) -> None:
        self._gap, self._next, self._lock = 1 / rate, 0.0, Lock()

    def __call__(self) -> None:
        with self._lock:
            now = time.monotonic()
            turn = max(now, self._next)
            self._next = turn + self._gap
        time.sleep(turn - now)


def _first(session: requests.Session, pace: _Pace, sources: Sequence[str], target: Path) -> _Failed | None:
    """Fetches a file from the first source that has it; answers why none has."""
    failures = []
    for source in sources:
        if _remote(source):
            pace()
        try:
            _complete(_part(session, source, target), target)
            return None
        except _Failed as failed:
            failures.append(failed)
    reasons = dict.fromkeys(map(str, failures))
    return _Failed("; ".join(reasons) or "no address", passing=any(failed.passing for failed in failures))


def _session() -> requests.Session:
    """Connections and passing statuses are tried again by urllib3, which also waits as long as a server asks."""
    retry = Retry(
        total=TRIES - 1,
        backoff_factor=BACKOFF,
        status_forcelist=PASSING,
        raise_on_status=False,
        retry_after_max=PATIENCE,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=THREADS))
    # A packed body could not be gone on with in the middle.
    session.headers.update({"User-Agent": "dsd", "Accept-Encoding": "identity"})
    return session


def _remote(source: str) -> bool:
    return re.match(r"https?://", source, re.IGNORECASE) is not None


def _part(session: requests.Session, source: str, target: Path) -> Path:
    """The whole file under its temporary name."""
    part = target.with_name(f".{target.name}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if _remote(source):
            _download(session, source, part)
        elif "://" in source:
            raise _Failed("neither an http(s) address nor a path")
        else:
            _copy(Path(source), part)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(part.parent).free
        raise DsdError(f"{part.parent}: disk full, no room for {source}, {free} bytes are free") from error
    with part.open("rb") as file:
        if file.read(256).lstrip().lower().startswith(HTML):
            _discard(part)
            raise _Failed("an HTML page came in place of the file")
    return part


def _copy(source: Path, part: Path) -> None:
    if not source.is_file():
        raise _Failed("no such file")
    with source.open("rb") as content, part.open("wb") as file:
        shutil.copyfileobj(content, file, PIECE)
        os.fsync(file.fileno())


def _download(session: requests.Session, url: str, part: Path) -> None:
    """Fills the part, trying again as long as it grows and `TRIES` times where it does not."""
    tries = largest = 0
    while True:
        try:
            return _receive(session, url, part)
        except _Cut as cut:
            size = _size(part)
            tries, largest = (1, size) if size > largest else (tries + 1, largest)
            if tries == TRIES:
                raise _Failed(f"{cut}, {TRIES} times at byte {size}", passing=True) from cut
        time.sleep(BACKOFF * 2**tries)


def _receive(session: requests.Session, url: str, part: Path) -> None:
    """Adds to the part what it lacks, or all of a file that is another one by now or cannot be sent in pieces."""
    had, validator = _begun(url, part)
    headers = {"Range": f"bytes={had}-", "If-Range": validator} if validator else {}
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise _Failed(f"no answer in {TRIES} tries ({type(error).__name__})", passing=True) from error
    with response:
        piece = response.headers.get("Content-Range", "")
        if response.status_code == 416 or (response.status_code == 206 and not piece.startswith(f"bytes {had}-")):
            _discard(part)
            raise _Cut("another piece than was asked for")
        _check(response)
        if response.status_code == 200 or not had:
            had = 0
            _begin(url, part, response.headers)
        with part.open("ab") as file:
            try:
                for content in response.iter_content(PIECE):
                    file.write(content)
            except requests.RequestException as error:
                raise _Cut(f"cut off ({type(error).__name__})") from error
            file.flush()
            os.fsync(file.fileno())
        length, packed = response.headers.get("Content-Length"), "Content-Encoding" in response.headers
        if length is not None and not packed and _size(part) != had + int(length):
            raise _Cut("cut off")


def _check(response: requests.Response) -> None:
    """What is not the file, or a piece of it, is told by its status."""
    status = f"{response.status_code} {response.reason}"
    if response.status_code in PASSING:
        raise _Failed(f"{status}, {TRIES} times", passing=True)
    if response.status_code in (401, 403):
        raise _Failed(f"refused ({status})")
    if response.status_code in (404, 410):
        raise _Failed(f"not there ({status})")
    if response.status_code not in (200, 206):
        raise _Failed(status)
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise _Failed("an HTML page came in place of the file")


def _begun(url: str, part: Path) -> tuple[int, str]:
    """The bytes of a part of this address, and what tells its version; 0 and nothing where there is none."""
    try:
        note = json.loads(_note(part).read_bytes())
        return (_size(part), note["validator"]) if note["url"] == url and _size(part) else (0, "")
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0, ""


def _begin(url: str, part: Path, headers: Mapping[str, str]) -> None:
    """An empty part, and the note of its version where the server tells one that a later request can name."""
    _discard(part)
    part.touch()
    etag = headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    if validator and "Content-Encoding" not in headers:
        _note(part).write_text(json.dumps({"url": url, "validator": validator}))


def _complete(part: Path, target: Path) -> None:
    os.replace(part, target)
    _note(part).unlink(missing_ok=True)


def _discard(part: Path) -> None:
    for path in (_note(part), part):  # the note first: a part without one is never gone on with
        path.unlink(missing_ok=True)


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
