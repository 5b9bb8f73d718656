"""Winoground: two images and two captions of the same words; which goes with which? (2 × 2)

All rows are test examples. The repository is gated: accept its terms on its page.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsd.config import WinogroundDataset
from dsd.data.hub import Location, fetch_repository, repository_size
from dsd.datasets import parquet
from dsd.datasets.annotations import RawExample
from dsd.datasets.protocol import Benchmark, Expected
from dsd.datasets.published import assign_splits, file_stem, store_images
from dsd.errors import DataError, ParamsError

IMAGE_COLUMNS = ("image_0", "image_1")


@dataclass(frozen=True)
class Columns:
    id: int
    caption_0: str
    caption_1: str
    collapsed_tag: str


class Square(NamedTuple):
    id: str
    locations: tuple[Location, ...]
    columns: Columns

    @property
    def group(self) -> str:
        return self.id


def _download(row: WinogroundDataset, *, seed: int, folder: Path, workers: int) -> None:
    """Implement `protocol.Download`.

    Raises:
        ParamsError, DataError: see `fetch_repository`, `read_rows`, `assign_splits` and `store_images`; or the row has
            training settings, or two rows of the file have the same id.
    """
    name = folder.name
    for key, value, required in (
        ("few_shot", row.few_shot, 0),
        ("validation", row.validation, 0),
        ("files.train", row.files.train, None),
    ):
        if value != required:
            needed = "null" if required is None else required
            raise ParamsError(f"datasets.{name}.{key}: Winoground has only a test, must be {needed}, found {value}")
    repository = fetch_repository(name, row, workers=workers)
    squares = [
        Square(f"{row.kind}/{columns.id}", tuple(Location(file, n, image) for image in IMAGE_COLUMNS), columns)
        for file in repository.test
        for n, columns in enumerate(parquet.read_rows(repository, file, Columns))
    ]
    if len({square.id for square in squares}) < len(squares):
        raise DataError(f"datasets.{name}.files.test: {row.files.test} has rows with the same id")
    splits = assign_splits(name, row, None, squares, seed=seed)
    selected = [square for square in squares if square.id in splits]
    examples = [
        RawExample(
            square.id,
            "test",
            tuple(file_stem(location.path) for location in square.locations),
            (square.columns.caption_0, square.columns.caption_1),
            ((0, 0), (1, 1)),
            square.columns.collapsed_tag,
        )
        for square in selected
    ]
    wanted = {location: file_stem(location.path) for square in selected for location in square.locations}
    store_images(folder, examples, parquet.read_images(repository, wanted), row.missing)


BENCHMARK = Benchmark(
    "winoground",
    _download,
    "winoground",
    citation="Thrush et al., Winoground: Probing Vision and Language Models for Visio-Linguistic Compositionality, "
    "CVPR 2022",
    licence="Meta's research licence, to be accepted on the repository's page; images: Getty Images",
    expected=lambda row: Expected(0, row.test or 400, 2, 2),
    remote=repository_size,
    seeded=False,
)
