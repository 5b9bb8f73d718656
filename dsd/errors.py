"""User errors: one line that names the place, the value found and what would be correct."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


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
