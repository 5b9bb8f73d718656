"""One line for user errors, and for failures of the machine and of the servers that a run uses."""

from __future__ import annotations

import errno
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import httpx

from dsd.errors import DsdError
from flows import DATA

FULL = 2**20  # bytes: with less free space the disk counts as full
NO_SPACE = re.compile("no space left on device|disk is full|quota exceeded", re.IGNORECASE)  # of libraries too


def error_line(error: BaseException | None) -> str | None:
    """Return the message of a user error, from an exception or its causes; None for a defect."""
    for cause in _chain(error):
        if isinstance(cause, DsdError):
            return str(cause)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) and cause.filename:
            return f"{cause.filename}: {disk_full()}"
        if isinstance(cause, UnicodeEncodeError) and cause.encoding != "utf-8":
            letter = cause.object[cause.start]
            return f"the output's encoding {cause.encoding} lacks {letter!a}; set PYTHONIOENCODING=utf-8"
        if NO_SPACE.search(str(cause)):  # a write error has no file name
            return disk_full()
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{cause.filename or Path.cwd()}: {os.strerror(cause.errno)}; must be writable"
        if isinstance(cause, sqlite3.OperationalError):  # locked, read-only
            return f"MLflow's database, mlflow.db unless MLFLOW_TRACKING_URI names another: {cause}"
        if _from_prefect(cause):
            reason = disk_full() if full_disks() else str(cause)
            return f"the Prefect server at {os.environ['PREFECT_API_URL']} does not answer: {reason}"
    return None


def exit_with(line: str, error: BaseException) -> NoReturn:
    """End this process with a line and exit status 1.

    If the Prefect server is dead, skip the exit handlers, in which prefect tries for minutes to deliver its events.
    """
    if any(isinstance(cause, httpx.HTTPError) for cause in _chain(error)):
        print(line, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(line)


def disk_full() -> str:
    """The reason of an error for which a disk is full."""
    return f"disk full, {', '.join(full_disks()) or 'but none of this workspace: check other disks'}"


def full_disks() -> list[str]:
    """The folders of this workspace whose disk is full, with their free space."""
    places = (Path(tempfile.gettempdir()), Path(os.environ["PREFECT_HOME"]), Path(".dvc/cache"), DATA, Path())
    free = {place.stat().st_dev: (place.resolve(), shutil.disk_usage(place).free) for place in places if place.exists()}
    return [f"{place} has {left} bytes free" for place, left in free.values() if left < FULL]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _from_prefect(error: BaseException) -> bool:
    """Whether it is an error of a request to the Prefect server."""
    server = os.environ.get("PREFECT_API_URL", "")
    return isinstance(error, httpx.HTTPError) and bool(server) and str(error.request.url).startswith(server)
