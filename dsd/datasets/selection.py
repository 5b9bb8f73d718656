"""What the published benchmarks share: which of their examples are taken, and how these and their pictures are kept."""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

from PIL import Image

from dsd.config import ClassifiedDataset, FolderDataset, RefcocogDataset, Vqav2Dataset, WinogroundDataset
from dsd.data.images import FORMATS
from dsd.data.splits import Split, split
from dsd.datasets.raw import ANNOTATIONS, IMAGES, RawExample, read_annotations, write_annotations
from dsd.errors import DataError, ImageError, ParamsError
from dsd.progress import progress
from dsd.store import write_atomic

log = logging.getLogger(__name__)

Published = ClassifiedDataset | RefcocogDataset | Vqav2Dataset | WinogroundDataset | FolderDataset
Content = bytes | ImageError  # of a picture, or why there is none
SHOWN = 3  # missing pictures that an error tells of


class Item(Protocol):
    """What may become an example; rows that share a picture share their group."""

    @property
    def id(self) -> str: ...

    @property
    def group(self) -> str: ...


Some = TypeVar("Some", bound=Item)


def apart(name: str, training: Sequence[Some], testing: Sequence[Item]) -> list[Some]:
    """The training rows that share no picture with a test row, whether that is taken or not."""
    shown = {row.group for row in testing}
    left = [row for row in training if row.group not in shown]
    if len(left) < len(training):
        log.warning("%s: %d training rows show a picture of the test: left out", name, len(training) - len(left))
    return left


def deal(
    name: str, row: Published, training: Sequence[Item] | None, testing: Sequence[Item], *, seed: int
) -> dict[str, Split]:
    """The split of every row that is taken, by id; see `dsd.data.splits.split`.

    Args:
        training: rows that may be trained on; None where all splits come from `testing`.
        testing: rows that may be tested on.

    Raises:
        ParamsError: all rows are to be tested on, and some of the same to be trained on.
        DataError: there are too few.
    """
    if training is None and row.test is None and (row.few_shot or row.validation):
        raise ParamsError(
            f"datasets.{name}.test: null takes every example, and none is left for few_shot and validation; "
            "give a number, or both of them as 0"
        )
    tested = len(testing) if row.test is None else row.test
    try:
        if training is None:
            return _split(row, testing, tested, seed)
        found = _split(row.model_copy(update={"few_shot": 0, "validation": 0}), testing, tested, seed)
        return found | _split(row, training, 0, seed)
    except DataError as error:
        raise DataError(f"datasets.{name}: {error}") from None


def _split(row: Published, rows: Sequence[Item], test: int, seed: int) -> dict[str, Split]:
    left = max(0, len(rows) - test)
    few_shot, validation = round(row.few_shot * left), round(row.validation * left)
    groups = [one.group for one in rows]
    found = split(groups, few_shot=few_shot, validation=validation, test=test, seed=seed, sample=row.sample)
    return {one.id: found[one.group] for one in rows if one.group in found}


def stem(place: str) -> str:
    """A file's name, but for its suffix, after an id or a path: it stays in its folder, and no two have the same."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", place)[-80:]
    return plain if plain and plain == place else f"{plain}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


def keep(row: Published, folder: Path, examples: Sequence[RawExample], pictures: Iterable[tuple[str, Content]]) -> None:
    """Leaves pictures and annotations in the folder, the annotations last.

    Pictures are written as the bytes that they came as; one that is there already is left alone, and one that no
    example shows is removed. What shows a missing one is left out.

    Args:
        examples: their `images` are stems of file names.
        pictures: stem and content of every picture that they show.

    Raises:
        DataError: more pictures are missing than the row lets.
    """
    (folder / ANNOTATIONS).unlink(missing_ok=True)
    files: dict[str, str] = {}
    missing: list[str] = []
    total = len({image for example in examples for image in example.images})
    for name, content in progress(pictures, total=total, desc=folder.name):
        try:
            files[name] = _write(folder / IMAGES, name, content)
        except ImageError as error:
            missing.append(str(error))
    if len(missing) > row.missing:
        more = f"; and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
        raise DataError(
            f"datasets.{folder.name}.missing: {row.missing}, but {len(missing)} of {total} pictures are missing: "
            f"{'; '.join(missing[:SHOWN])}{more}"
        )
    kept = set(files.values())
    for file in folder.glob(f"{IMAGES}/*"):
        if file.name not in kept:
            file.unlink()
    whole = [
        replace(example, images=tuple(files[image] for image in example.images))
        for example in examples
        if all(image in files for image in example.images)
    ]
    if missing:
        lost = len(examples) - len(whole)
        log.warning("%s: %d pictures are missing, and %d examples with them", folder.name, len(missing), lost)
    write_annotations(folder, whole)


def _write(images: Path, name: str, content: Content) -> str:
    """Writes a picture under a suffix that tells what it is; returns the file's name."""
    if isinstance(content, ImageError):
        raise content
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:  # the header alone: `prepare` decodes it
            kind = str(image.format).lower()
    except Exception:  # broken bytes lead Pillow's readers to raise almost anything
        raise ImageError(f"{name}: not an image (formats read: {', '.join(FORMATS)})") from None
    path = images / f"{name}.{'jpg' if kind == 'jpeg' else kind}"
    if not (path.is_file() and path.read_bytes() == content):
        write_atomic(path, content)
    return path.name


def examples(folder: Path, row: Published, *, seed: int) -> Iterator[RawExample]:
    """What `keep` annotated; see `dsd.datasets.raw.Examples`.

    Raises:
        DataError: no annotations, broken ones, or annotations of another kind.
    """
    for example in read_annotations(folder):
        if not example.id.startswith(f"{row.kind}/"):
            raise DataError(f"{folder / ANNOTATIONS}: {example.id} is not of {row.kind}; download the dataset again")
        yield example
