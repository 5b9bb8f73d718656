"""Image classification on the Hub: what CIFAR-10, STL-10 and FGVC-Aircraft share (1 × classes)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from dsd.config import ClassifiedDataset
from dsd.data.hub import Location, Repository, fetch_repository, repository_size
from dsd.datasets import parquet
from dsd.datasets.annotations import RawExample
from dsd.datasets.protocol import Benchmark, Expected
from dsd.datasets.published import Content, assign_splits, file_stem, store_images
from dsd.errors import DataError


class Labels(NamedTuple):
    """The class names of a file, and the class number of each of its images."""

    classes: tuple[str, ...]
    numbers: dict[Location, int]


class Labelled(NamedTuple):
    """An image with its class number, which is a group by itself; see `published.Item`."""

    id: str
    location: Location
    number: int

    @property
    def group(self) -> str:
        return self.id


class Format(NamedTuple):
    """How files are read, and the `extra` ones that are needed besides those in params.yaml."""

    read_labels: Callable[[Repository, str], Labels]
    read_images: Callable[[Repository, Mapping[Location, str]], Iterator[tuple[str, Content]]]
    extra: tuple[str, ...] = ()


def classification(
    kind: str, format: Format, *, citation: str, licence: str, training: int, testing: int, classes: int
) -> Benchmark[ClassifiedDataset]:
    """Return a benchmark with these numbers of training images, test images and classes."""
    return Benchmark(
        kind,
        partial(_download, format),
        "recall",
        citation,
        licence,
        expected=lambda row: Expected(training, row.test or testing, 1, classes, shared=True),
        remote=partial(repository_size, extra=format.extra),
        seeded=False,
    )


def _download(format: Format, row: ClassifiedDataset, *, seed: int, folder: Path, workers: int) -> None:
    """Implement `protocol.Download`.

    Raises:
        ParamsError, DataError: see `fetch_repository`, `assign_splits` and `store_images`; or the files differ in their
            classes, class names repeat, or a number is not that of a class.
    """
    name = folder.name
    repository = fetch_repository(name, row, workers=workers, extra=format.extra)
    labels = {file: format.read_labels(repository, file) for file in repository.files}
    classes = _classes(repository, {file: of_file.classes for file, of_file in labels.items()})
    texts = tuple(row.template.format(title) for title in classes)

    def labelled(files: Sequence[str]) -> list[Labelled]:
        numbers = (item for file in files for item in labels[file].numbers.items())
        return [Labelled(f"{row.kind}/{location.path}", location, number) for location, number in numbers]

    training, testing = None if repository.train is None else labelled(repository.train), labelled(repository.test)
    splits = assign_splits(name, row, training, testing, seed=seed)
    selected = [item for item in (*(training or ()), *testing) if item.id in splits]
    examples = []
    for id, location, number in selected:
        if not 0 <= number < len(classes):
            where = f"{repository.root / location.file}, {location.row}"
            raise DataError(f"{where}: class {number}, but there are {len(classes)}, from 0")
        images = (file_stem(location.path),)
        examples.append(RawExample(id, splits[id], images, texts, ((0, number),), classes[number]))
    wanted = {item.location: file_stem(item.location.path) for item in selected}
    store_images(folder, examples, format.read_images(repository, wanted), row.missing)


def _classes(repository: Repository, by_file: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    first, classes = next(iter(by_file.items()))
    for file, others in by_file.items():
        if others != classes:
            raise DataError(f"{repository.root / file}: has other classes than {repository.root / first}")
    for title in classes:
        if classes.count(title) > 1 or not title.strip():
            raise DataError(f"{repository.root / first}: classes must be distinct and not blank, found {title!r}")
    return classes


def _declared(repository: Repository, file: str) -> Labels:
    """Read labels by the declared types: one column of images and one of classes, whatever their names."""
    features = parquet.read_features(repository, file)
    columns = {
        kind: [name for name, feature in features.items() if feature.get("_type") == kind]
        for kind in ("Image", "ClassLabel")
    }
    for kind, names in columns.items():
        if len(names) != 1:
            raise DataError(
                f"{repository.root / file}: needs one column of kind {kind}, has {len(names)} "
                f"(columns: {', '.join(features)})"
            )
    (image,), (label,) = columns["Image"], columns["ClassLabel"]
    numbers = enumerate(parquet.read_integers(repository, file, label))
    classes = tuple(map(str, features[label].get("names", ())))
    return Labels(classes, {Location(file, row, image): number for row, number in numbers})


PARQUET = Format(_declared, parquet.read_images)
