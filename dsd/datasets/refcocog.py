"""RefCOCOg: one image, several referring expressions; which one refers to an object in it? (1 × candidates)

A row is an object with its expressions, one of which is chosen at random. The other candidates are expressions of
other images of the split (first paper, section 5.2). Those of the same image are excluded, whatever object they refer
to: they are also true of the image as a whole.

The repository has no training files, so those of its validation are used. Those that share an image with the test are
not trained on.
"""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from random import Random
from typing import NamedTuple

from dsd.config import RefcocogDataset
from dsd.data.hub import Location, fetch_repository, repository_size
from dsd.data.splits import Split
from dsd.datasets import parquet
from dsd.datasets.annotations import RawExample
from dsd.datasets.protocol import Benchmark, Expected
from dsd.datasets.published import assign_splits, file_stem, store_images, without_test_images
from dsd.errors import DataError

log = logging.getLogger(__name__)

IMAGE = "image"


@dataclass(frozen=True)
class Columns:
    answer: tuple[str, ...]
    file_name: str


class Referent(NamedTuple):
    """An object; its group is the number of its image, which also names the image's file."""

    id: str
    group: str
    location: Location
    expressions: tuple[str, ...]


class Pool:
    """Distinct expressions, in an order that does not depend on that of the rows, with the images they are true of."""

    def __init__(self, referents: Sequence[Referent]) -> None:
        self._images: dict[str, set[str]] = defaultdict(set)
        spelling: dict[str, str] = {}
        for text, image in sorted((text, item.group) for item in referents for text in item.expressions):
            self._images[_words(text)].add(image)
            spelling.setdefault(_words(text), text)
        self._texts = list(spelling.values())
        self._per_image = Counter(image for images in self._images.values() for image in images)

    def sample(self, rng: Random, image: str, count: int) -> list[str]:
        """Choose `count` different expressions of other images, fewer if there are no more."""
        texts = rng.sample(self._texts, min(len(self._texts), count + self._per_image[image]))
        return [text for text in texts if image not in self._images[_words(text)]][:count]


def _words(text: str) -> str:
    """Normalise case, spaces and punctuation: expressions of the same words are the same."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _image_number(file_name: str) -> str:
    """Return the image's number, without the object's number that the original annotations append."""
    return re.sub(r"(_\d{12})_\d+$", r"\1", PurePosixPath(file_name).stem)


def _download(row: RefcocogDataset, *, seed: int, folder: Path, workers: int) -> None:
    """Implement `protocol.Download`.

    Raises:
        ParamsError, DataError: see `fetch_repository`, `read_rows`, `assign_splits` and `store_images`; or there are
            too few expressions for the number of candidates.
    """
    name = folder.name
    repository = fetch_repository(name, row, workers=workers)

    def read(files: Sequence[str]) -> list[Referent]:
        referents = [
            Referent(f"{row.kind}/{location.path}", _image_number(columns.file_name), location, columns.answer)
            for file in files
            for n, columns in enumerate(parquet.read_rows(repository, file, Columns))
            for location in [Location(file, n, IMAGE)]
        ]
        return _with_expressions(name, referents)

    testing = read(repository.test)
    training = None if repository.train is None else without_test_images(name, read(repository.train), testing)
    splits = assign_splits(name, row, training, testing, seed=seed)
    examples: list[RawExample] = []
    locations: dict[str, Location] = {}
    pools = _pools(training, testing, splits)
    for item in (*(training or ()), *testing):
        if split := splits.get(item.id):
            examples.append(_example(name, row, item, split, pools[split], seed))
            locations.setdefault(item.group, item.location)
    wanted = {location: file_stem(group) for group, location in locations.items()}
    store_images(folder, examples, parquet.read_images(repository, wanted), row.missing)


def _pools(
    training: Sequence[Referent] | None, testing: Sequence[Referent], splits: Mapping[str, Split]
) -> dict[Split, Pool]:
    """Return disjoint pools, which depend neither on the size nor on the sample of the few-shot split."""
    learning = testing if training is None else training
    return {
        "train": Pool([item for item in learning if splits.get(item.id) in (None, "train")]),
        "validation": Pool([item for item in learning if splits.get(item.id) == "validation"]),
        "test": Pool([item for item in testing if training is not None or splits.get(item.id) == "test"]),
    }


def _with_expressions(name: str, referents: Sequence[Referent]) -> list[Referent]:
    """Drop expressions without words, and objects without expressions."""
    cleaned = [item._replace(expressions=tuple(filter(_words, item.expressions))) for item in referents]
    kept = [item for item in cleaned if item.expressions]
    if len(kept) < len(referents):
        log.warning("%s: %d objects have no expression: left out", name, len(referents) - len(kept))
    return kept


def _example(name: str, row: RefcocogDataset, item: Referent, split: Split, pool: Pool, seed: int) -> RawExample:
    rng = Random(f"{item.id}/{seed}")
    true = rng.choice(item.expressions)
    texts = [true, *pool.sample(rng, item.group, row.candidates - 1)]
    if len(texts) < row.candidates:
        raise DataError(
            f"datasets.{name}.candidates: {row.candidates}, but {split} has only {len(texts) - 1} expressions of other "
            f"images than {item.group}"
        )
    rng.shuffle(texts)
    return RawExample(item.id, split, (file_stem(item.group),), tuple(texts), ((0, texts.index(true)),), "object")


BENCHMARK = Benchmark(
    "refcocog",
    _download,
    "recall",
    citation="Mao et al., CVPR 2016; Yu et al., Modeling Context in Referring Expressions, ECCV 2016",
    licence="annotations: Apache-2.0; images: COCO's, from Flickr, under the terms of each",
    expected=lambda row: Expected(7573, row.test or 5023, 1, row.candidates),
    remote=repository_size,
    seeded=False,
)
