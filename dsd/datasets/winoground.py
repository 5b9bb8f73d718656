"""Winoground: two images and two captions of the same words; which goes with which? (2 × 2)

There is nothing to learn from: all rows are a test. The repository is gated: its terms are accepted on its page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsd.config import WinogroundDataset
from dsd.datasets import parquet
from dsd.datasets.raw import Benchmark, Expected, RawExample
from dsd.datasets.repository import Place, fetch, remote
from dsd.datasets.selection import deal, examples, keep, stem
from dsd.errors import DataError, ParamsError

IMAGES = ("image_0", "image_1")


@dataclass(frozen=True)
class Columns:
    id: int
    caption_0: str
    caption_1: str
    collapsed_tag: str


class Square(NamedTuple):
    id: str
    places: tuple[Place, ...]
    columns: Columns

    @property
    def group(self) -> str:
        return self.id


def _download(row: WinogroundDataset, *, seed: int, folder: Path, workers: int) -> None:
    """See `dsd.datasets.raw.Download`.

    Raises:
        ParamsError, DataError: see `repository.fetch`, `parquet.rows`, `deal` and `keep`; training rows are asked
            for, or two rows have the same id.
    """
    name = folder.name
    for key, value, right in (
        ("few_shot", row.few_shot, 0),
        ("validation", row.validation, 0),
        ("files.train", row.files.train, None),
    ):
        if value != right:
            needed = "null" if right is None else right
            raise ParamsError(f"datasets.{name}.{key}: Winoground is a test alone, must be {needed}, found {value}")
    repository = fetch(name, row, workers=workers)
    squares = [
        Square(f"{row.kind}/{columns.id}", tuple(Place(file, n, image) for image in IMAGES), columns)
        for file in repository.test
        for n, columns in enumerate(parquet.rows(repository, file, Columns))
    ]
    if len({square.id for square in squares}) < len(squares):
        raise DataError(f"datasets.{name}.files.test: {row.files.test} has rows with the same id")
    splits = deal(name, row, None, squares, seed=seed)
    taken = [square for square in squares if square.id in splits]
    found = [
        RawExample(
            square.id,
            "test",
            tuple(stem(place.path) for place in square.places),
            (square.columns.caption_0, square.columns.caption_1),
            ((0, 0), (1, 1)),
            square.columns.collapsed_tag,
        )
        for square in taken
    ]
    wanted = {place: stem(place.path) for square in taken for place in square.places}
    keep(row, folder, found, parquet.pictures(repository, wanted))


BENCHMARK = Benchmark(
    _download,
    examples,
    "winoground",
    citation="Thrush et al., Winoground: Probing Vision and Language Models for Visio-Linguistic Compositionality, "
    "CVPR 2022",
    licence="Meta's research licence, to be accepted on the repository's page; pictures: Getty Images",
    expected=lambda row: Expected(0, row.test or 400, 2, 2),
    remote=remote,
)
