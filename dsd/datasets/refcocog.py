"""RefCOCOg: one image, several referring expressions; which one is of something in it? (1 × candidates)

A row is an object with its expressions, of which one is drawn. The others come from the expressions of the split's
other pictures, the pool of the first paper's section 5.2: those of the same picture, of whatever object in it, are just
as true of the picture as a whole.

The home of the data has no training files: those of its validation stand for them. They show pictures of the test too,
which are not trained on.
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
from dsd.data.splits import Split
from dsd.datasets import parquet
from dsd.datasets.raw import Benchmark, Expected, RawExample
from dsd.datasets.repository import Place, fetch, remote
from dsd.datasets.selection import apart, deal, examples, keep, stem
from dsd.errors import DataError

log = logging.getLogger(__name__)

IMAGE = "image"


@dataclass(frozen=True)
class Columns:
    answer: tuple[str, ...]
    file_name: str


class Referred(NamedTuple):
    """An object; its group is its picture's number, which is what the picture's file is named after."""

    id: str
    group: str
    place: Place
    expressions: tuple[str, ...]


class Pool:
    """Expressions in an order that does not hang on that of the rows, and the pictures that each is true of."""

    def __init__(self, rows: Sequence[Referred]) -> None:
        self._pictures: dict[str, set[str]] = defaultdict(set)
        spelled: dict[str, str] = {}
        for text, picture in sorted((text, row.group) for row in rows for text in row.expressions):
            self._pictures[_words(text)].add(picture)
            spelled.setdefault(_words(text), text)
        self._texts = list(spelled.values())
        self._own = Counter(picture for pictures in self._pictures.values() for picture in pictures)

    def draw(self, rng: Random, picture: str, count: int) -> list[str]:
        """So many expressions, all different, of objects in other pictures; fewer where there are no more."""
        drawn = rng.sample(self._texts, min(len(self._texts), count + self._own[picture]))
        return [text for text in drawn if picture not in self._pictures[_words(text)]][:count]


def _words(text: str) -> str:
    """Expressions of the same words are the same, however they are spelled."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _picture(file_name: str) -> str:
    """The number of the picture, without that of the object which stands behind it in the original annotations."""
    return re.sub(r"(_\d{12})_\d+$", r"\1", PurePosixPath(file_name).stem)


def _download(row: RefcocogDataset, *, seed: int, folder: Path, workers: int) -> None:
    """See `dsd.datasets.raw.Download`.

    Raises:
        ParamsError, DataError: see `repository.fetch`, `parquet.rows`, `deal` and `keep`; and too few expressions
            for so many candidates.
    """
    name = folder.name
    repository = fetch(name, row, workers=workers)

    def read(files: Sequence[str]) -> list[Referred]:
        return [
            Referred(f"{row.kind}/{place.path}", _picture(columns.file_name), place, columns.answer)
            for file in files
            for n, columns in enumerate(parquet.rows(repository, file, Columns))
            for place in [Place(file, n, IMAGE)]
        ]

    testing = _told(name, read(repository.test))
    training = None if repository.train is None else apart(name, _told(name, read(repository.train)), testing)
    splits = deal(name, row, training, testing, seed=seed)
    found: list[RawExample] = []
    places: dict[str, Place] = {}
    pools = _pools(training, testing, splits)
    for referred in (*(training or ()), *testing):
        if split := splits.get(referred.id):
            found.append(_example(name, row, referred, split, pools[split], seed))
            places.setdefault(referred.group, referred.place)
    keep(row, folder, found, parquet.pictures(repository, {place: stem(group) for group, place in places.items()}))


def _pools(
    training: Sequence[Referred] | None, testing: Sequence[Referred], splits: Mapping[str, Split]
) -> dict[Split, Pool]:
    """Disjoint ones, which do not hang on how many objects are learned from, nor on which."""
    learned_from = testing if training is None else training
    return {
        "train": Pool([one for one in learned_from if splits.get(one.id) in (None, "train")]),
        "validation": Pool([one for one in learned_from if splits.get(one.id) == "validation"]),
        "test": Pool([one for one in testing if training is not None or splits.get(one.id) == "test"]),
    }


def _told(name: str, rows: Sequence[Referred]) -> list[Referred]:
    told = [row._replace(expressions=tuple(filter(_words, row.expressions))) for row in rows]
    kept = [row for row in told if row.expressions]
    if len(kept) < len(rows):
        log.warning("%s: %d objects have no expression: left out", name, len(rows) - len(kept))
    return kept


def _example(name: str, row: RefcocogDataset, referred: Referred, split: Split, pool: Pool, seed: int) -> RawExample:
    rng = Random(f"{referred.id}/{seed}")
    true = rng.choice(referred.expressions)
    texts = [true, *pool.draw(rng, referred.group, row.candidates - 1)]
    if len(texts) < row.candidates:
        raise DataError(
            f"datasets.{name}.candidates: {row.candidates}, but {split} has only {len(texts) - 1} expressions of other "
            f"pictures than {referred.group}"
        )
    rng.shuffle(texts)
    return RawExample(referred.id, split, (stem(referred.group),), tuple(texts), ((0, texts.index(true)),), "object")


BENCHMARK = Benchmark(
    _download,
    examples,
    "recall",
    citation="Mao et al., CVPR 2016; Yu et al., Modeling Context in Referring Expressions, ECCV 2016",
    licence="annotations: Apache-2.0; pictures: COCO's, from Flickr, under the terms of each",
    expected=lambda row: Expected(7573, row.test or 5023, 1, row.candidates),
    remote=remote,
)
