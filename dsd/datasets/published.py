"""What benchmarks with real images share: selecting examples by split, and storing their images and annotations."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from dsd.config import PublishedDataset
from dsd.data.downloads import fetch_all
from dsd.data.images import FORMATS
from dsd.data.splits import Split, split_groups
from dsd.datasets.annotations import ANNOTATIONS, IMAGES, RawExample, write_annotations
from dsd.errors import DataError, ImageError, ParamsError
from dsd.progress import progress
from dsd.store import write_atomic

log = logging.getLogger(__name__)

Content = bytes | ImageError  # an image file, or the reason why it is missing
SHOWN = 3  # missing images that a message lists


class Item(Protocol):
    """A possible example. Items that share an image share their group."""

    @property
    def id(self) -> str: ...

    @property
    def group(self) -> str: ...


SomeItem = TypeVar("SomeItem", bound=Item)


def without_test_images(name: str, training: Sequence[SomeItem], testing: Sequence[Item]) -> list[SomeItem]:
    """Drop the training items that share an image with any test item, whether that is selected or not."""
    test_groups = {item.group for item in testing}
    kept = [item for item in training if item.group not in test_groups]
    if len(kept) < len(training):
        log.warning("%s: %d training rows share an image with the test: left out", name, len(training) - len(kept))
    return kept


def assign_splits(
    name: str, row: PublishedDataset, training: Sequence[Item] | None, testing: Sequence[Item], *, seed: int
) -> dict[str, Split]:
    """Return the split of each selected item by id; see `dsd.data.splits.split_groups`.

    Args:
        training: items for train and validation; None if all splits are taken from `testing`.
        testing: items for the test.

    Raises:
        ParamsError: all items are selected for the test, and none are left for train and validation.
        DataError: there are too few items.
    """
    learning = row.few_shot, row.validation
    if training is None and row.test is None and any(learning):
        raise ParamsError(
            f"datasets.{name}.test: null takes every example, and none is left for few_shot and validation; "
            "give a number, or both of them as 0"
        )
    test = len(testing) if row.test is None else row.test
    try:
        if training is None:
            return _split(testing, learning, test, seed, row.sample)
        return _split(testing, (0, 0), test, seed, row.sample) | _split(training, learning, 0, seed, row.sample)
    except DataError as error:
        raise DataError(f"datasets.{name}: {error}") from None


def _split(items: Sequence[Item], shares: tuple[float, float], test: int, seed: int, sample: int) -> dict[str, Split]:
    """Split items; the shares of train and validation are of the items that the test leaves."""
    few_shot, validation = (round(share * max(0, len(items) - test)) for share in shares)
    groups = [item.group for item in items]
    splits = split_groups(groups, few_shot=few_shot, validation=validation, test=test, seed=seed, sample=sample)
    return {item.id: splits[item.group] for item in items if item.group in splits}


def file_stem(location: str) -> str:
    """Return a file name without suffix for an id or path: unique, and without characters that leave the folder."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", location)[-80:]
    return plain if plain and plain == location else f"{plain}-{hashlib.sha256(location.encode()).hexdigest()[:8]}"


def store_images(
    folder: Path, examples: Sequence[RawExample], images: Iterable[tuple[str, Content]], allowed: int
) -> None:
    """Write the images of the examples as the original bytes, then the annotations.

    Images that are already there are kept, and images of no example are removed. Examples with a missing image are
    left out.

    Args:
        examples: their `images` are file stems.
        images: stem and content of every image of the examples.
        allowed: maximum number of missing images.

    Raises:
        DataError: more images are missing, or one of every test example.
    """
    (folder / ANNOTATIONS).unlink(missing_ok=True)
    files: dict[str, str] = {}
    missing: list[str] = []
    total = len({image for example in examples for image in example.images})
    for stem, content in progress(images, total=total, desc=folder.name):
        try:
            files[stem] = _write(folder / IMAGES, stem, content)
        except ImageError as error:
            missing.append(str(error))
    _annotate(folder, examples, files, missing, allowed)


def fetch_images(
    folder: Path, examples: Sequence[RawExample], sources: Mapping[str, Sequence[str]], allowed: int
) -> None:
    """Fetch the images of the examples from their URLs, then write the annotations, as `store_images` does.

    Args:
        examples: their `images` are file names.
        sources: URLs or paths by file name; see `dsd.data.downloads.fetch_all`.
    """
    names = dict.fromkeys(name for example in examples for name in example.images)
    lost = dict(fetch_all({name: sources[name] for name in names}, folder / IMAGES, key=f"datasets.{folder.name}"))
    files = {name: name for name in names if name not in lost}
    _annotate(folder, examples, files, [f"{name} ({reason})" for name, reason in lost.items()], allowed)


def _annotate(
    folder: Path, examples: Sequence[RawExample], files: Mapping[str, str], missing: Sequence[str], allowed: int
) -> None:
    """Remove other files, and write the examples whose images are all in `files`, a file name by image."""
    total = len({image for example in examples for image in example.images})
    more = f"; and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
    problem = f"{len(missing)} of {total} images are missing: {'; '.join(missing[:SHOWN])}{more}"
    if len(missing) > allowed:
        raise DataError(f"datasets.{folder.name}.missing: {allowed}, but {problem}")
    kept = set(files.values())
    for file in folder.glob(f"{IMAGES}/*"):
        if file.name not in kept:
            file.unlink()
    complete = [
        replace(example, images=tuple(files[image] for image in example.images))
        for example in examples
        if all(image in files for image in example.images)
    ]
    if missing:
        lost = len(examples) - len(complete)
        log.warning("%s: %s; %d of %d examples left out", folder.name, problem, lost, len(examples))
    if not any(example.split == "test" for example in complete) and any(e.split == "test" for e in examples):
        raise DataError(f"datasets.{folder.name}: every test example lacks an image; {problem}")
    write_annotations(folder, complete)


def image_format(content: bytes) -> str | None:
    """Return the format that an image file's header names, in lower case; None if it is no image that is read."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # reads the header; `prepare` decodes the rest
            return str(image.format).lower()
    except Exception:  # Pillow's readers raise many types of exception on corrupt bytes
        return None


def _write(images: Path, stem: str, content: Content) -> str:
    """Write an image with the suffix of its format and return the file's name."""
    if isinstance(content, ImageError):
        raise content
    if (kind := image_format(content)) is None:
        raise ImageError(f"{stem}: not an image (formats read: {', '.join(FORMATS)})")
    path = images / f"{stem}.{'jpg' if kind == 'jpeg' else kind}"
    if not (path.is_file() and path.read_bytes() == content):
        write_atomic(path, content)
    return path.name
