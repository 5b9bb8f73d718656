"""FGVC-Aircraft: photographs of aircraft of 100 variants; class k is line k of `classnames.txt`, from 0."""

from __future__ import annotations

from dsd.datasets import webdataset
from dsd.datasets.classified import Format, Labelled, classified
from dsd.datasets.repository import Place, Repository
from dsd.errors import DataError

CLASSES = "classnames.txt"


def _read(repository: Repository, file: str) -> Labelled:
    path = repository.root / CLASSES
    try:
        names = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8") from None
    labels = webdataset.labels(repository, file)
    return Labelled(tuple(name.strip() for name in names), {Place(file, key): n for key, n in labels.items()})


BENCHMARK = classified(
    Format(_read, webdataset.pictures, beside=(CLASSES,)),
    citation="Maji et al., Fine-Grained Visual Classification of Aircraft, 2013",
    licence="non-commercial research only",
    training=6_667,
    testing=3_333,
    classes=100,
)
