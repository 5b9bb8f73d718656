"""Preparation: decode and resize the images of a downloaded dataset, and write its examples with their splits."""

from __future__ import annotations

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from dsd.config import DatasetParams, ImageParams
from dsd.data.examples import MatchingExample, write_examples
from dsd.data.image_table import ImageTableWriter, StoredImage
from dsd.data.images import image_id, load_image, resize, to_array
from dsd.data.splits import SPLITS
from dsd.datasets import benchmark
from dsd.datasets.annotations import IMAGES, RawExample
from dsd.errors import DataError, ImageError
from dsd.metrics import METRICS
from dsd.progress import progress
from dsd.store import write_atomic, write_json

log = logging.getLogger(__name__)

AHEAD = 256  # files that are decoded before the first of them is written


def prepare(
    name: str, row: DatasetParams, source: Path, target: Path, *, images: ImageParams, seed: int, workers: int
) -> dict[str, int]:
    """Decode, resize and identify the images of dataset `name`, and write its examples with their splits.

    Writes images.parquet, examples.parquet, quarantine.json and, last, summary.json to `target`; the same input gives
    the same bytes. An image is stored at `images.parity` pixels a side, or at `images.resolution` if parity is null.
    Unreadable images are quarantined, and their examples dropped. Copies of an image under other names are stored
    once, and examples of train or validation that share an image with a later split are left out.

    Args:
        source: the folder that the dataset was downloaded to.

    Returns:
        The content of summary.json: examples by split (train, validation, test), `images` stored, `repeated` and
        `quarantined` files, examples `dropped` for a quarantined file, examples `shared` with a later split.

    Raises:
        DataError: the annotations are missing or invalid, no example of a split is left, or the test split lacks a
            category that its metrics need.
    """
    kind = benchmark(row.kind)
    raw = list(kind.examples(source, seed=seed))
    for example in raw:
        _check(name, example)
    (target / "summary.json").unlink(missing_ok=True)

    decode = partial(_decode, source / IMAGES, images.max_pixels, images.parity or images.resolution)
    files = list(dict.fromkeys(file for example in raw for file in example.images))
    quarantine: dict[str, str] = {}  # reason by file
    ids: dict[str, str] = {}
    with ImageTableWriter(target / "images.parquet") as writer:
        for file, image in progress(_in_threads(decode, files, workers), total=len(files), desc=name):
            if isinstance(image, ImageError):
                quarantine[file] = str(image).removeprefix(f"{source / IMAGES / file}: ")
                log.warning("quarantined %s: %s", file, quarantine[file])
            else:
                ids[file] = image.id
                writer.add(image)
    reasons = [{"name": file, "reason": quarantine[file]} for file in sorted(quarantine)]
    write_json(target / "quarantine.json", reasons, indent=2)

    readable = [
        (e.split, MatchingExample(e.id, tuple(ids[file] for file in e.images), e.texts, e.answer, e.category))
        for e in raw
        if all(file in ids for file in e.images)
    ]
    disjoint = _disjoint(readable)
    counts = Counter(split for split, _ in disjoint)
    for split in SPLITS:
        if not counts[split] and any(example.split == split for example in raw):
            shared = sum(name == split for name, _ in readable)
            more = f", {shared} examples with an image of a later split" if shared else ""
            raise DataError(f"{source}: no example is left for {split}, {len(quarantine)} files quarantined{more}")
    _check_categories(name, kind.metrics, [example for split, example in disjoint if split == "test"])
    write_examples(target / "examples.parquet", disjoint)
    summary: dict[str, int] = {
        **{str(split): counts[split] for split in SPLITS},
        "images": len(set(ids.values())),
        "repeated": len(ids) - len(set(ids.values())),
        "quarantined": len(quarantine),
        "dropped": len(raw) - len(readable),
        "shared": len(readable) - len(disjoint),
    }
    write_atomic(target / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def _check(name: str, example: RawExample) -> None:
    images, texts = len(example.images), len(example.texts)
    if not images or not texts:
        raise DataError(f"{name}: example {example.id}: {images} images and {texts} texts, needs both")
    if images * texts == 1:
        raise DataError(f"{name}: example {example.id}: one image and one text are only one candidate")
    if not all(text.strip() for text in example.texts):
        raise DataError(f"{name}: example {example.id}: a text is empty")
    if any("\0" in text for text in example.texts):
        raise DataError(f"{name}: example {example.id}: a text has a NUL character")
    if not example.answer and example.split == "train":
        raise DataError(f"{name}: example {example.id}: no right pair, so it cannot be trained on")
    if not all(0 <= i < images and 0 <= t < texts for i, t in example.answer):
        raise DataError(
            f"{name}: example {example.id}: answer {example.answer} outside {images} images × {texts} texts"
        )


def _check_categories(name: str, metrics: str, test: Sequence[MatchingExample]) -> None:
    """Check, before anything is scored, that every metric has an example."""
    if test:
        try:
            METRICS[metrics](np.ones(len(test), dtype=int), [example.category for example in test])
        except ValueError as error:
            raise DataError(f"{name}: the test split: {error}; raise datasets.{name}.test") from None


def _decode(folder: Path, max_pixels: int, side: int, file: str) -> StoredImage | ImageError:
    try:
        image = resize(load_image(folder / file, max_pixels=max_pixels), parity=None, resolution=side)
    except ImageError as error:
        return error
    png = io.BytesIO()
    image.save(png, "PNG")
    return StoredImage(image_id(to_array(image)), png.getvalue())


def _in_threads(
    decode: Callable[[str], StoredImage | ImageError], files: Sequence[str], workers: int
) -> Iterator[tuple[str, StoredImage | ImageError]]:
    """Yield (file, decoded image) in order. Threads suffice: Pillow releases the interpreter's lock."""
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(files), AHEAD):
            batch = files[start : start + AHEAD]
            yield from zip(batch, pool.map(decode, batch), strict=True)


def _disjoint(rows: Sequence[tuple[str, MatchingExample]]) -> list[tuple[str, MatchingExample]]:
    """Drop the examples that share an image with a later split; the test loses none."""
    later: set[str] = set()
    kept: set[str] = set()
    for split in reversed(SPLITS):
        examples = [example for name, example in rows if name == split and not later.intersection(example.images)]
        kept.update(example.id for example in examples)
        later.update(image for example in examples for image in example.images)
    return [(split, example) for split, example in rows if example.id in kept]
