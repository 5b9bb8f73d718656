"""Pictures of classes: which class? What CIFAR-10, STL-10 and FGVC-Aircraft share (1 × classes)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dsd.config import ClassifiedDataset
from dsd.datasets import parquet
from dsd.datasets.raw import Benchmark, Expected, RawExample
from dsd.datasets.repository import Place, Repository, fetch, remote
from dsd.datasets.selection import Content, deal, examples, keep, stem
from dsd.errors import DataError


class Labelled(NamedTuple):
    """The classes of a file, by number, and the number of each of its pictures."""

    classes: tuple[str, ...]
    labels: dict[Place, int]


class Shown(NamedTuple):
    """A picture, which is a group of its own."""

    id: str
    place: Place
    label: int

    @property
    def group(self) -> str:
        return self.id


class Format(NamedTuple):
    """How files are read, and which stand beside those that params.yaml names."""

    read: Callable[[Repository, str], Labelled]
    pictures: Callable[[Repository, Mapping[Place, str]], Iterator[tuple[str, Content]]]
    beside: tuple[str, ...] = ()


def classified(
    format: Format, *, citation: str, licence: str, training: int, testing: int, classes: int
) -> Benchmark[ClassifiedDataset]:
    """A benchmark of so many training and test pictures and classes."""
    return Benchmark(
        partial(_download, format),
        examples,
        "recall",
        citation,
        licence,
        expected=lambda row: Expected(training, row.test or testing, 1, classes, shared=True),
        remote=partial(remote, beside=format.beside),
    )


def _download(format: Format, row: ClassifiedDataset, *, seed: int, folder: Path, workers: int) -> None:
    """See `dsd.datasets.raw.Download`.

    Raises:
        ParamsError, DataError: see `repository.fetch`, `deal` and `keep`; files that differ in their classes,
            classes of the same name, and a number that is no class.
    """
    name = folder.name
    repository = fetch(name, row, workers=workers, beside=format.beside)
    read = {file: format.read(repository, file) for file in repository.files}
    classes = _classes(repository, {file: labelled.classes for file, labelled in read.items()})
    texts = tuple(row.template.format(title) for title in classes)

    def shown(files: Sequence[str]) -> list[Shown]:
        labelled = (pair for file in files for pair in read[file].labels.items())
        return [Shown(f"{row.kind}/{place.path}", place, label) for place, label in labelled]

    training, testing = None if repository.train is None else shown(repository.train), shown(repository.test)
    splits = deal(name, row, training, testing, seed=seed)
    chosen = [picture for picture in (*(training or ()), *testing) if picture.id in splits]
    found = []
    for id, place, label in chosen:
        if not 0 <= label < len(classes):
            where = f"{repository.root / place.file}, {place.row}"
            raise DataError(f"{where}: class {label}, but there are {len(classes)}, from 0")
        found.append(RawExample(id, splits[id], (stem(place.path),), texts, ((0, label),), classes[label]))
    keep(row, folder, found, format.pictures(repository, {place: stem(place.path) for _, place, _ in chosen}))


def _classes(repository: Repository, by_file: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    first, classes = next(iter(by_file.items()))
    for file, others in by_file.items():
        if others != classes:
            raise DataError(f"{repository.root / file}: has other classes than {repository.root / first}")
    for title in classes:
        if classes.count(title) > 1 or not title.strip():
            raise DataError(f"{repository.root / first}: the class {title!r} is there {classes.count(title)} times")
    return classes


def _declared(repository: Repository, file: str) -> Labelled:
    """By the kinds that the file itself declares: a column of pictures and one of classes, whatever their names."""
    features = parquet.features(repository, file)
    columns = {
        kind: [name for name, feature in features.items() if feature.get("_type") == kind]
        for kind in ("Image", "ClassLabel")
    }
    for kind, found in columns.items():
        if len(found) != 1:
            raise DataError(
                f"{repository.root / file}: needs one column of kind {kind}, has {len(found)} "
                f"(columns: {', '.join(features)})"
            )
    (image,), (label,) = columns["Image"], columns["ClassLabel"]
    numbers = parquet.integers(repository, file, label)
    labels = {Place(file, row, image): number for row, number in enumerate(numbers)}
    return Labelled(tuple(map(str, features[label].get("names", ()))), labels)


PARQUET = Format(_declared, parquet.pictures)
