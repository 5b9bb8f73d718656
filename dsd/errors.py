"""User errors and failures of the machine: one line with the place, what was found, and what would be right."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path

FULL = 2**20  # bytes: with less free space the disk counts as full
NO_SPACE = re.compile("no space left on device|disk is full|quota exceeded", re.IGNORECASE)  # of libraries too
# Packages of the extras, by what is imported.
EXTRAS = {
    "accelerate": "pipeline", "altair": "pipeline", "cronsim": "pipeline", "datasets": "pipeline", "dvc": "pipeline",
    "mlflow": "pipeline", "prefect": "pipeline", "gradio": "demo", "starlette": "serve", "uvicorn": "serve",
    "ray": "ray", "xformers": "gpu",
}  # fmt: skip


class DsdError(Exception):
    """A user error, in one line; commands print the line without a traceback."""


class ParamsError(DsdError):
    """A parameter that is missing, unknown or out of range."""


class ImageError(DsdError):
    """An image that cannot be read, or whose content does not match its format."""


class CheckpointError(DsdError):
    """A checkpoint that is missing, incomplete or of the wrong kind."""


class DataError(DsdError):
    """A file or row of the data that is missing, malformed or stale."""


class TextError(DsdError):
    """A text that the text encoder cannot encode."""


class RequestError(DsdError):
    """An invalid request to the served model."""


class BusyError(DsdError):
    """A request that timed out."""


def brief(error: object, length: int | None = 160) -> str:
    """Return an error's message in one line, cut to this many characters."""
    return " ".join(str(error).split())[:length]


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """The message for an unknown name.

    `unknown("dataset", "scenes-con", ["scenes-com", "comvg"])` is
    "unknown dataset 'scenes-con': did you mean 'scenes-com'? (choices: comvg, scenes-com)".
    """
    ordered = sorted(choices)
    close = get_close_matches(str(name), ordered, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (choices: {', '.join(ordered) or 'none'})"


def error_line(error: BaseException | None, places: Sequence[Path] = ()) -> str | None:
    """Return the message of a user error, from an exception or its causes; None for a defect.

    places: folders whose disk may be full, besides that of this folder and of temporary files.
    """
    for cause in chain(error):
        if isinstance(cause, DsdError):
            return str(cause)
        if isinstance(cause, ImportError) and (extra := EXTRAS.get((cause.name or "").partition(".")[0])):
            return f"{(cause.name or '').partition('.')[0]} is not installed; it comes with the extra dsd[{extra}]"
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) and cause.filename:
            return f"{cause.filename}: {disk_full(places)}"
        if isinstance(cause, UnicodeEncodeError) and cause.encoding != "utf-8":
            letter = cause.object[cause.start]
            return f"the output's encoding {cause.encoding} lacks {letter!a}; set PYTHONIOENCODING=utf-8"
        if NO_SPACE.search(str(cause)):  # a write error has no file name
            return disk_full(places)
        if isinstance(cause, OSError) and cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{cause.filename or Path.cwd()}: {os.strerror(cause.errno)}; must be writable"
    return None


def disk_full(places: Sequence[Path]) -> str:
    """The reason of an error for which a disk is full."""
    return f"disk full, {', '.join(full_disks(places)) or 'but none of this workspace: check other disks'}"


def full_disks(places: Sequence[Path]) -> list[str]:
    """The folders whose disk is full, with their free space."""
    all_places = (Path(tempfile.gettempdir()), *places, Path())
    free = {
        place.stat().st_dev: (place.resolve(), shutil.disk_usage(place).free) for place in all_places if place.exists()
    }
    return [f"{place} has {left} bytes free" for place, left in free.values() if left < FULL]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and its causes."""
    while error is not None:
        yield error
        error = error.__cause__
