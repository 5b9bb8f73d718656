"""From raw files to the examples and pictures that all else reads."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from dsd.config import Params
from dsd.data.examples import MatchingExample, write_examples
from dsd.data.image_table import ImageTableWriter, StoredImage
from dsd.data.images import Quarantine, image_id, load_image, resize, to_array
from dsd.data.splits import SPLITS
from dsd.datasets import RawExample, benchmark
from dsd.datasets.raw import IMAGES
from dsd.errors import DataError, ImageError, ParamsError, unknown
from dsd.metrics import METRICS
from dsd.progress import progress
from dsd.store import write_atomic

AHEAD = 256  # files that are decoded before the first of them is written


def prepare(name: str, params: Params, source: Path, target: Path) -> dict[str, int]:
    """Prepare a dataset: decode, resize and identify its pictures, and write its examples with their splits.

    Leaves images.parquet, examples.parquet, quarantine.json and, last, summary.json in `target`; the same
    input gives the same bytes. A picture is stored at `images.parity` pixels a side, or at
    `images.resolution` where parity is null. One that cannot be read is quarantined, and what needs it is
    dropped. A picture that comes up again under another name is stored once, and examples of train or
    validation that share one with a later split are left out.

    Args:
        source: the folder that the dataset was downloaded to.

    Returns:
        What summary.json says: examples by split (train, validation, test), `images` stored, `repeated` and
        `quarantined` files, examples `dropped` for a quarantined file, examples `shared` with a later split.

    Raises:
        ParamsError: no such dataset.
        DataError: annotations that cannot be read or make no sense, a split without examples, or a test split that
            lacks a category which its metrics need.
    """
    if name not in params.datasets:
        raise ParamsError(unknown("dataset", name, params.datasets))
    row = params.datasets[name]
    raw = list(benchmark(row.kind).examples(source, row, seed=params.seed))
    for example in raw:
        _check(name, example)
    (target / "summary.json").unlink(missing_ok=True)

    side = params.images.parity or params.images.resolution
    decode = partial(_decode, source / IMAGES, params.images.max_pixels, side)
    files, quarantine = list(dict.fromkeys(file for example in raw for file in example.images)), Quarantine()
    ids: dict[str, str] = {}
    with ImageTableWriter(target / "images.parquet") as writer:
        decoded = _in_threads(decode, files, params.runtime.workers)
        for file, found in progress(decoded, total=len(files), desc=name):
            if isinstance(found, ImageError):
                quarantine.add(file, str(found).removeprefix(f"{source / IMAGES / file}: "))
            else:
                ids[file] = found.id
                writer.add(found)
    quarantine.write(target / "quarantine.json")

    whole = [(e.split, _matching(e, ids)) for e in raw if all(file in ids for file in e.images)]
    apart = _apart(whole)
    counts = Counter(split for split, _ in apart)
    for split in SPLITS:
        if not counts[split] and any(example.split == split for example in raw):
            raise DataError(f"{source}: no example is left for {split}, {len(quarantine)} files quarantined")
    _check_categories(name, row.kind, [example for split, example in apart if split == "test"])
    write_examples(target / "examples.parquet", apart)
    summary: dict[str, int] = {
        **{str(split): counts[split] for split in SPLITS},
        "images": len(set(ids.values())),
        "repeated": len(ids) - len(set(ids.values())),
        "quarantined": len(quarantine),
        "dropped": len(raw) - len(whole),
        "shared": len(whole) - len(apart),
    }
    write_atomic(target / "summary.json", json.dumps(summary, indent=2).encode())
    return summary


def _check(name: str, example: RawExample) -> None:
    images, texts = len(example.images), len(example.texts)
    if not images or not texts:
        raise DataError(f"{name}: example {example.id}: {images} images and {texts} texts, needs both")
    if images * texts == 1:
        raise DataError(f"{name}: example {example.id}: one image and one text leave nothing to choose")
    if not all(text.strip() for text in example.texts):
        raise DataError(f"{name}: example {example.id}: a text is empty")
    if not example.answer and example.split == "train":
        raise DataError(f"{name}: example {example.id}: no right pair, and nothing to learn from it")
    if not all(0 <= i < images and 0 <= t < texts for i, t in example.answer):
        raise DataError(
            f"{name}: example {example.id}: answer {example.answer} outside {images} images × {texts} texts"
        )


def _check_categories(name: str, kind: str, test: Sequence[MatchingExample]) -> None:
    """Before anything is scored: every metric needs an example."""
    if test:
        try:
            METRICS[benchmark(kind).metrics](np.ones(len(test), dtype=int), [example.category for example in test])
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
    """(file, what it decodes to), in order. Pillow decodes outside the interpreter's lock: threads do."""
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(files), AHEAD):
            some = files[start : start + AHEAD]
            yield from zip(some, pool.map(decode, some), strict=True)


def _matching(example: RawExample, ids: dict[str, str]) -> MatchingExample:
    images = tuple(ids[file] for file in example.images)
    return MatchingExample(example.id, images, example.texts, example.answer, example.category)


def _apart(rows: Sequence[tuple[str, MatchingExample]]) -> list[tuple[str, MatchingExample]]:
    """The rows without those that share a picture with a later split: the test set loses none."""
    later: set[str] = set()
    kept: set[str] = set()
    for split in reversed(SPLITS):
        mine = [example for name, example in rows if name == split and not later.intersection(example.images)]
        kept.update(example.id for example in mine)
        later.update(image for example in mine for image in example.images)
    return [(split, example) for split, example in rows if example.id in kept]
