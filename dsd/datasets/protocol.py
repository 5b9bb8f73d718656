"""What a benchmark provides: its download, and the facts that estimates, metrics and the report need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

from dsd.data.examples import MatchingExample
from dsd.datasets.annotations import RawExample, read_annotations
from dsd.metrics import HEADLINES

Row = TypeVar("Row", contravariant=True)  # the type of a row of `datasets` of this kind


class Download(Protocol[Row]):
    def __call__(self, row: Row, *, seed: int, folder: Path, workers: int) -> None:
        """Write images and annotations to `folder`, the annotations last: they mark a complete download."""


class Expected(NamedTuple):
    """Estimated size of a dataset, before it is downloaded."""

    learning: int  # number of examples of which few_shot and validation are shares
    test: int  # number of test examples
    images: int  # per example
    texts: int  # per example
    shared: bool = False  # whether all examples have the same texts
    train: int | None = None  # number of few-shot examples, if the files give the splits

    def few_shot(self, share: float) -> int:
        """Return the number of few-shot examples where they are this share."""
        return round(share * self.learning) if self.train is None else self.train


@dataclass(frozen=True)
class Benchmark(Generic[Row]):
    """A kind of dataset.

    Attributes:
        metrics: a key of `dsd.metrics.METRICS`.
        licence: licence of the data.
        expected: estimates the size of a row's dataset.
        remote: bytes of the files to fetch for a dataset's name and row, without images that have their own URLs;
            raises DataError if they are not accessible.
        own_kind: for questions of several kinds that share their candidates, the indices of the texts with an answer of
            the example's kind, such as yes and no; accuracy among these alone is "forced <metric>". Else None.
        seeded: whether example ids contain `seed`, so that a download of another seed is refused.
    """

    kind: str
    download: Download[Row]
    metrics: str
    citation: str
    licence: str
    expected: Callable[[Row], Expected]
    remote: Callable[[str, Row], int]
    own_kind: Callable[[MatchingExample], Sequence[int]] | None = None
    seeded: bool = True

    @property
    def headline(self) -> str:
        """The metric that is reported first and compared."""
        return HEADLINES[self.metrics]

    def examples(self, folder: Path, *, seed: int) -> Iterator[RawExample]:
        """Read the examples of all splits that `download` wrote to `folder`.

        Raises:
            DataError: the annotations are missing, broken, or of another kind or seed.
        """
        return read_annotations(folder, f"{self.kind}/{seed}/" if self.seeded else f"{self.kind}/")
