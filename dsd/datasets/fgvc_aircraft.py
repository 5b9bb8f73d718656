"""FGVC-Aircraft: photographs of aircraft of 100 variants; class k is line k of `classnames.txt`, from 0."""

from __future__ import annotations

from dsd.data.hub import Location, Repository
from dsd.datasets import webdataset
from dsd.datasets.classification import Format, Labels, classification
from dsd.errors import DataError

CLASSES = "classnames.txt"


def _read_labels(repository: Repository, file: str) -> Labels:
    path = repository.root / CLASSES
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8") from None
    numbers = {Location(file, key): n for key, n in webdataset.read_labels(repository, file).items()}
    return Labels(tuple(name.strip() for name in names), numbers)


BENCHMARK = classification(
    "fgvc-aircraft",
    Format(_read_labels, webdataset.read_images, extra=(CLASSES,)),
    citation="Maji et al., Fine-Grained Visual Classification of Aircraft, 2013",
    licence="non-commercial research only",
    training=6_667,
    testing=3_333,
    classes=100,
)
