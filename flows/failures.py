"""One line for failures of the servers that a run uses, besides those of `dsd.errors`."""

from __future__ import annotations

import os
import sqlite3
import sys
from pathlib import Path
from typing import NoReturn

import httpx

from dsd import errors
from dsd.errors import chain
from flows import DATA


def error_line(error: BaseException | None) -> str | None:
    """Return the message of a user error, from an exception or its causes; None for a defect."""
    if (line := errors.error_line(error, _places())) is not None:
        return line
    for cause in chain(error):
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
    if any(isinstance(cause, httpx.HTTPError) for cause in chain(error)):
        print(line, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.exit(line)


def disk_full() -> str:
    return errors.disk_full(_places())


def full_disks() -> list[str]:
    return errors.full_disks(_places())


def _places() -> list[Path]:
    return [Path(os.environ["PREFECT_HOME"]), Path(".dvc/cache"), DATA]


def _from_prefect(error: BaseException) -> bool:
    """Whether it is an error of a request to the Prefect server."""
    server = os.environ.get("PREFECT_API_URL", "")
    return isinstance(error, httpx.HTTPError) and bool(server) and str(error.request.url).startswith(server)
