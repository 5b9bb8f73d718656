"""One family for every mistake of a user's: one line that says what, where, and what would be right."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class DsdError(Exception):
    """A user's mistake, told in one line; a command shows the line and no traceback."""


class ParamsError(DsdError):
    """A parameter that is missing, unknown or out of range."""


class ImageError(DsdError):
    """An image that cannot be read or is not what it says."""


class CheckpointError(DsdError):
    """A checkpoint that is missing, incomplete or of another kind."""


class DataError(DsdError):
    """A dataset whose files or rows are not what its reader expects."""


class TextError(DsdError):
    """A text that the text encoder cannot take."""


class RequestError(DsdError):
    """A request to the served model that it cannot take."""


class BusyError(DsdError):
    """A request that was not answered in time."""


def unknown(kind: str, name: str, choices: Iterable[str]) -> str:
    """The message for a lookup that missed.

    `unknown("dataset", "scenes-con", ["scenes-com", "comvg"])` is
    "unknown dataset 'scenes-con': did you mean 'scenes-com'? (choices: comvg, scenes-com)".
    """
    ordered = sorted(choices)
    close = get_close_matches(name, ordered, n=1)
    hint = f": did you mean {close[0]!r}?" if close else ""
    return f"unknown {kind} {name!r}{hint} (choices: {', '.join(ordered) or 'none'})"
