"""Files that a dataset fetches by URL and keeps as published in its folder `raw`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dsd.config import UrlParams
from dsd.data.downloads import content_length, fetch
from dsd.store import digest

RAW = "raw"


def fetch_raw(row: UrlParams, folder: Path, key: str) -> Path:
    """Fetch the file of a row of params unless it is there, and return its path; `key` is the row's key."""
    target = folder / RAW / _name(row, key)
    fetch(row.source, target, key=key, sha256=row.sha256)
    return target


def raw_size(rows: Mapping[str, UrlParams]) -> int:
    """Total size in bytes of the files of rows by key; see `dsd.data.downloads.content_length`."""
    return sum(content_length(row.source, key=key) for key, row in rows.items())


def prune_raw(rows: Mapping[str, UrlParams], folder: Path) -> None:
    """Remove the files that belong to none of these rows by key."""
    keep = {_name(row, key) for key, row in rows.items()}
    for path in (folder / RAW).glob("*"):
        if path.name not in keep:
            path.unlink()


def _name(row: UrlParams, key: str) -> str:
    return f"{key.rpartition('.')[2]}-{digest(row.source)[:12]}"
