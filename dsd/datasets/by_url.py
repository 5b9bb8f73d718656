"""What datasets share whose files and pictures have addresses: files are kept as published, pictures by number."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsd.config import UrlParams
from dsd.data.downloads import fetch, fetch_all, length
from dsd.datasets.raw import IMAGES, RawExample, write_annotations
from dsd.errors import DataError
from dsd.store import digest

log = logging.getLogger(__name__)

RAW = "raw"  # the folder of the files as published


def fetched(row: UrlParams, folder: Path, key: str) -> Path:
    """The file of a row of params, the part of its `key` after the last dot in its name; what is there is kept."""
    target = folder / RAW / _raw_name(row, key)
    fetch(row.source, target, setting=key, sha256=row.sha256)
    return target


def remote(rows: Mapping[str, UrlParams]) -> int:
    """The bytes of the files of rows of params, by key; see `dsd.data.downloads.length`."""
    return sum(length(row.source, setting=key) for key, row in rows.items())


def prune_raw(rows: Mapping[str, UrlParams], folder: Path) -> None:
    """Removes published files that are of none of these rows, by key."""
    keep = {_raw_name(row, key) for key, row in rows.items()}
    for path in (folder / RAW).glob("*"):
        if path.name not in keep:
            path.unlink()


def _raw_name(row: UrlParams, key: str) -> str:
    return f"{key.rpartition('.')[2]}-{digest(row.source)[:12]}"


def picture(number: int) -> str:
    """The file name of a picture."""
    return f"{number}.jpg"


def complete(
    examples: Sequence[RawExample], addresses: Mapping[str, Sequence[str]], folder: Path, missing: int, *, key: str
) -> None:
    """Fetches the pictures of the examples from their addresses by name, and writes the annotations.

    What is left of other params is removed. Where `missing` pictures or fewer cannot be had, the examples that need
    them are left out.

    Raises:
        DataError: more pictures cannot be had.
    """
    needed, images = dict.fromkeys(name for example in examples for name in example.images), folder / IMAGES
    lost = dict(fetch_all({name: addresses[name] for name in needed}, images, setting=key))
    if lost:
        some = ", ".join(f"{name} ({reason})" for name, reason in list(lost.items())[:3])
        told = f"{len(lost)} of {len(needed)} pictures cannot be had: {some}{', …' if len(lost) > 3 else ''}"
        if len(lost) > missing:
            raise DataError(f"{key}.missing: {missing}, but {told}; with {len(lost)} the run goes on without them")
        log.warning("%s: %s", key, told)
    whole = [example for example in examples if lost.keys().isdisjoint(example.images)]
    if len(whole) < len(examples):
        log.warning("%s: %d of %d examples left out with them", key, len(examples) - len(whole), len(examples))
    for stale in images.glob("*"):
        if stale.name not in needed:
            stale.unlink()
    write_annotations(folder, whole)
