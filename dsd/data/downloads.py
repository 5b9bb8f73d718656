"""Atomic, resumable, checksummed, rate-limited downloads.

A download grows in `.<name>.part` next to its target and is renamed to the target when it is complete.
`.<name>.part.json` records the URL and version of the part; without it the download starts from zero.
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

from dsd.data.proxies import check_proxies
from dsd.errors import DataError, DsdError
from dsd.progress import progress
from dsd.store import file_digest

ATTEMPTS = 5  # per request, and per byte position at which a body is cut off
BACKOFF = 0.5  # seconds before the second attempt; doubles with each further one
RETRIED = (429, 500, 502, 503, 504)  # statuses that may be temporary
MAX_RETRY_AFTER = 300  # seconds that a server may request by Retry-After
TIMEOUT = (10, 60)  # seconds to connect, and between two chunks
CHUNK = 1 << 16  # bytes per write; no more is lost when a body is cut off
THREADS = 8  # parallel downloads
RATE = 10.0  # requests per second, over all threads
MAX_UNANSWERED = 16  # consecutive files without an answer before `fetch_all` gives up
MAX_UNPACKED = 8 << 30  # bytes of an unpacked archive
HTML = (b"<!doctype html", b"<html")


class _Failure(Exception):
    """The reason why a URL gives no file; `temporary` if a later attempt may succeed."""

    def __init__(self, reason: str, *, temporary: bool = False) -> None:
        super().__init__(reason)
        self.temporary = temporary


class _CutOff(Exception):
    """The body ended early; the part keeps what was received."""


def fetch(source: str, target: Path, *, key: str, sha256: str | None = None) -> None:
    """Download a URL (http, https) or copy a local file to `target`.

    An existing target is assumed to come from the same URL: its name must identify it. It is kept unless its checksum
    differs from `sha256`. A local file is copied each time.

    Args:
        key: the key of params.yaml that names the source.
        sha256: expected checksum, 64 hexadecimal digits, if known.

    Raises:
        DataError: the file does not exist, is refused, the server does not answer, an HTML page comes instead, or the
            checksum differs; names the setting and the source.
        DsdError: the disk is full; no target is left, and the part is resumed next time.
    """
    if target.exists() and _is_url(source) and (sha256 is None or sha256 == file_digest(target)):
        return
    with _session() as session:
        try:
            part = _part(session, source, target)
        except _Failure as failure:
            hint = "; try again later, it resumes where it stopped" if failure.temporary else ""
            raise DataError(f"{key}: {source}: {failure}{hint}") from failure
    if sha256 is not None and (actual := file_digest(part)) != sha256:
        _discard(part)
        raise DataError(f"{key}.sha256: {sha256[:12]}… expected, {source} has {actual[:12]}…; removed")
    _complete(part, target)


def fetch_all(sources: Mapping[str, Sequence[str]], folder: Path, *, key: str) -> list[tuple[str, str]]:
    """Fetch the files that are not in the folder yet, each from the first of its sources that has it.

    Args:
        sources: URLs or paths by file name, in order of preference.
        key: as for `fetch`.

    Returns:
        (name, reason) of each file that no source has, in the order of `sources`.

    Raises:
        DataError: no server answers for many consecutive files.
        DsdError: the disk is full.
    """
    names = [name for name in sources if not (folder / name).exists()]
    missing: list[tuple[str, str]] = []
    unanswered, limit = 0, _RateLimit(RATE)
    with _session() as session, ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(_fetch_first, session, limit, sources[name], folder / name) for name in names]
        try:
            for name, future in progress(zip(names, futures, strict=True), total=len(names), desc=folder.parent.name):
                failure = future.result()
                unanswered = unanswered + 1 if failure and failure.temporary else 0
                if failure:
                    missing.append((name, str(failure)))
                if unanswered == MAX_UNANSWERED:
                    raise DataError(
                        f"{key}: {MAX_UNANSWERED} files in a row, the last {name}: {failure}; try again later"
                    )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return missing


def content_length(source: str, *, key: str) -> int:
    """Return the size in bytes of a URL, 0 if its server does not report it, or of a local file.

    Raises:
        DataError: as for `fetch`.
    """
    if not _is_url(source):
        if not Path(source).is_file():
            raise DataError(f"{key}: {source}: no such file")
        return Path(source).stat().st_size
    with _session() as session:
        try:
            response = session.head(source, timeout=TIMEOUT, allow_redirects=True)
            _check(response)
        except _Failure as failure:
            raise DataError(f"{key}: {source}: {failure}") from failure
        except requests.RequestException as error:
            raise DataError(f"{key}: {source}: {_no_answer(error)}") from error
    return int(response.headers.get("Content-Length", 0))


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file, or the only file in a .zip, as text.

    Nothing is extracted to disk, so the names in an archive cannot escape the folder.

    Raises:
        DataError: the archive is corrupt, encrypted, has several files or exceeds `MAX_UNPACKED`; or it is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            with _open_member(path, zipfile.ZipFile(file)) if is_zip else file as stream:
                yield io.TextIOWrapper(stream, "utf-8-sig", newline="")
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: corrupt archive: {error}; remove it and download again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _open_member(path: Path, archive: zipfile.ZipFile) -> IO[bytes]:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise DataError(f"{path}: an archive of {len(members)} files; it must contain exactly one")
    (member,) = members
    if member.file_size > MAX_UNPACKED:  # zipfile reads no more than this size
        raise DataError(f"{path}: {member.file_size} bytes unpacked, more than the {MAX_UNPACKED} allowed")
    if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(f"{path}: an archive that is encrypted or uses another method than deflate")
    return archive.open(member)


class _RateLimit:
    """Block callers so that no more than `rate` per second return."""

    def __init__(self, rate: float) -> None:
        self._interval, self._next, self._lock = 1 / rate, 0.0, Lock()

    def __call__(self) -> None:
        with self._lock:
            now = time.monotonic()
            slot = max(now, self._next)
            self._next = slot + self._interval
        time.sleep(slot - now)


def _fetch_first(session: requests.Session, limit: _RateLimit, sources: Sequence[str], target: Path) -> _Failure | None:
    """Fetch a file from the first source that has it; return the reason if none has."""
    failures = []
    for source in sources:
        if _is_url(source):
            limit()
        try:
            _complete(_part(session, source, target), target)
            return None
        except _Failure as failure:
            failures.append(failure)
    reasons = dict.fromkeys(map(str, failures))
    return _Failure("; ".join(reasons) or "no address", temporary=any(failure.temporary for failure in failures))


def _session() -> requests.Session:
    """A session in which urllib3 retries failed connections and temporary statuses, and obeys Retry-After.

    Raises:
        DsdError: a proxy of the environment cannot be used.
    """
    check_proxies()
    retry = Retry(
        total=ATTEMPTS - 1,
        backoff_factor=BACKOFF,
        status_forcelist=RETRIED,
        raise_on_status=False,
        retry_after_max=MAX_RETRY_AFTER,
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=THREADS))
    # A compressed body cannot be resumed by byte position.
    session.headers.update({"User-Agent": "dsd", "Accept-Encoding": "identity"})
    return session


def _is_url(source: str) -> bool:
    return re.match(r"https?://", source, re.IGNORECASE) is not None


def _no_answer(error: requests.RequestException) -> str:
    return f"no answer in {ATTEMPTS} attempts ({type(error).__name__})"


def _part(session: requests.Session, source: str, target: Path) -> Path:
    """Fetch the whole file under its temporary name and return that."""
    part = target.with_name(f".{target.name}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if _is_url(source):
            _download(session, source, part)
        elif "://" in source:
            raise _Failure("neither an http(s) address nor a path")
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
            raise _Failure("an HTML page instead of the file")
    return part


def _copy(source: Path, part: Path) -> None:
    if not source.is_file():
        raise _Failure("no such file")
    with source.open("rb") as content, part.open("wb") as file:
        shutil.copyfileobj(content, file, CHUNK)
        os.fsync(file.fileno())


def _download(session: requests.Session, url: str, part: Path) -> None:
    """Complete the part; give up after `ATTEMPTS` attempts that do not enlarge it."""
    attempts = largest = 0
    while True:
        try:
            return _receive(session, url, part)
        except _CutOff as error:
            size = _size(part)
            attempts, largest = (1, size) if size > largest else (attempts + 1, largest)
            if attempts == ATTEMPTS:
                raise _Failure(f"{error}, {ATTEMPTS} times at byte {size}", temporary=True) from error
        time.sleep(BACKOFF * 2**attempts)


def _receive(session: requests.Session, url: str, part: Path) -> None:
    """Append the rest of the file; start from zero if the file has changed or the server does not support ranges."""
    offset, validator = _resume_point(url, part)
    headers = {"Range": f"bytes={offset}-", "If-Range": validator} if validator else {}
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except requests.RequestException as error:
        raise _Failure(_no_answer(error), temporary=True) from error
    with response:
        received = response.headers.get("Content-Range", "")
        if response.status_code == 416 or (response.status_code == 206 and not received.startswith(f"bytes {offset}-")):
            _discard(part)
            raise _CutOff("another range than requested")
        _check(response)
        if response.status_code == 200 or not offset:
            offset = 0
            _start(url, part, response.headers)
        with part.open("ab") as file:
            try:
                for content in response.iter_content(CHUNK):
                    file.write(content)
            except requests.RequestException as error:
                raise _CutOff(f"cut off ({type(error).__name__})") from error
            file.flush()
            os.fsync(file.fileno())
        length, encoded = response.headers.get("Content-Length"), "Content-Encoding" in response.headers
        if length is not None and not encoded and _size(part) != offset + int(length):
            raise _CutOff("cut off")


def _check(response: requests.Response) -> None:
    """Raise _Failure unless the response is the file or a range of it."""
    status = f"{response.status_code} {response.reason}"
    if response.status_code in RETRIED:
        raise _Failure(f"{status}, {ATTEMPTS} times", temporary=True)
    if response.status_code in (401, 403):
        raise _Failure(f"refused ({status})")
    if response.status_code in (404, 410):
        raise _Failure(f"not found ({status})")
    if response.status_code not in (200, 206):
        raise _Failure(status)
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise _Failure("an HTML page instead of the file")


def _resume_point(url: str, part: Path) -> tuple[int, str]:
    """Size and validator of a part of this URL, (0, "") if there is none."""
    try:
        note = json.loads(_note(part).read_bytes())
        return (_size(part), note["validator"]) if note["url"] == url and _size(part) else (0, "")
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0, ""


def _start(url: str, part: Path, headers: Mapping[str, str]) -> None:
    """Create an empty part, and its note if the server sends a validator for If-Range."""
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
    for path in (_note(part), part):  # the note first: a part without one is never resumed
        path.unlink(missing_ok=True)


def _note(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
