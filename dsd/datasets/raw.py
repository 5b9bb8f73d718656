"""What every benchmark hands over: its examples as downloaded, with pictures still named by file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from dsd.data.splits import Split
from dsd.errors import DataError
from dsd.store import write_atomic

ANNOTATIONS = "annotations.jsonl"
IMAGES = "images"


@dataclass(frozen=True, slots=True)
class RawExample:
    """A matching problem before its pictures are read.

    `images` are file names in the dataset's images folder, `answer` the true (image index, text index) pairs: none
    where what would be right is not offered, and every method answers wrong.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    id: str
    split: Split
    images: tuple[str, ...]
    texts: tuple[str, ...]
    answer: tuple[tuple[int, int], ...]
    category: str


Row = TypeVar("Row", contravariant=True)  # the model of a row of `datasets` of this kind


class Made(Protocol):
    """Any such row."""

    @property
    def kind(self) -> str: ...


class Download(Protocol[Row]):
    def __call__(self, row: Row, *, seed: int, folder: Path, workers: int) -> None:
        """Leaves pictures and annotations in `folder`, the annotations last: where they are, all is."""


class Examples(Protocol[Row]):
    def __call__(self, folder: Path, row: Row, *, seed: int) -> Iterator[RawExample]:
        """The examples of all splits, from what `download` left in `folder` for the same row and seed."""


class Expected(NamedTuple):
    """About how much there is of a dataset before it is fetched."""

    learning: int  # examples of which few_shot and validation are shares
    test: int  # examples
    images: int  # of an example
    texts: int  # of an example
    shared: bool = False  # whether all examples have the same texts


@dataclass(frozen=True)
class Benchmark(Generic[Row]):
    """A kind of dataset.

    metrics: a key of `dsd.metrics.METRICS`.
    licence: under what its data are given.
    expected: about how much there is of it.
    remote: of the dataset's name and row, how many bytes its files are that have to be fetched, pictures that have
        addresses of their own not among them; raises DataError where they cannot be had.
    """

    download: Download[Row]
    examples: Examples[Row]
    metrics: str
    citation: str
    licence: str
    expected: Callable[[Row], Expected]
    remote: Callable[[str, Row], int]


def write_annotations(folder: Path, examples: Iterable[RawExample]) -> None:
    """Writes one line of JSON an example, atomically; the same examples give the same bytes."""
    lines = [json.dumps(asdict(example), sort_keys=True, ensure_ascii=False) + "\n" for example in examples]
    write_atomic(folder / ANNOTATIONS, "".join(lines).encode())


def annotated(folder: Path, row: Made, *, seed: int) -> Iterator[RawExample]:
    """What a download has annotated whose ids begin with kind and seed; see `Examples`.

    Raises:
        DataError: no annotations, broken ones, or annotations of another kind or seed.
    """
    prefix = f"{row.kind}/{seed}/"
    for example in read_annotations(folder):
        if not example.id.startswith(prefix):
            raise DataError(f"{folder / ANNOTATIONS}: {example.id} is not of {prefix}; download the dataset again")
        yield example


def read_annotations(folder: Path) -> Iterator[RawExample]:
    """The examples that `write_annotations` wrote, in file order.

    Raises:
        DataError: no annotations there, or a line that is no example; names the file, the line and the key.
    """
    path, adapter = folder / ANNOTATIONS, TypeAdapter(RawExample)
    if not path.exists():
        raise DataError(f"{path}: no such file; download the dataset first")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                yield adapter.validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(str(part) for part in first["loc"])
                raise DataError(f"{path}:{number}: {key + ': ' if key else ''}{first['msg']}") from None
