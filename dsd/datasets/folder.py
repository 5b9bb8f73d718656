"""The user's own pictures: a CSV in their folder tells which text is right for which picture.

A row is one candidate: `image` (a path in the folder), `text`, and `label`, 1 if they belong together and 0 if not. The
rows of a picture are one example, several texts for one picture:

    image,text,label
    dogs/1.jpg,a dog asleep,1
    dogs/1.jpg,a dog awake,0

With a column `id`, the rows of an id are one example, which may then also be several pictures for one text. Either way
one of its rows is right. There may be two more columns, in which the rows of an example agree: `category`, and `split`
(train, validation or test), which stands for `few_shot` and `validation` of the params: these must then be 0.

Commas delimit, and it is UTF-8. DVC sees changes of the folder where it is listed under `deps` of the stage `download`.
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from dsd.config import FolderDataset
from dsd.data.splits import SPLITS, Split
from dsd.datasets.raw import Benchmark, Expected, RawExample
from dsd.datasets.selection import Content, deal, examples, keep, stem
from dsd.errors import DataError, ImageError, ParamsError, unknown

REQUIRED = ("image", "text", "label")
OPTIONAL = ("id", "split", "category")
DELIMITERS = ";\t|:"  # that are told from the comma


class Line(NamedTuple):
    """A row of the table, and the number of the line that it ends on."""

    number: int
    id: str
    image: str
    text: str
    right: bool
    split: Split | None
    category: str


class Grouped(NamedTuple):
    """An example's id and that of its pictures; see `dsd.datasets.selection.Item`."""

    id: str
    group: str


def _download(row: FolderDataset, *, seed: int, folder: Path, workers: int) -> None:
    """See `dsd.datasets.raw.Download`.

    Raises:
        ParamsError, DataError: see `deal` and `keep`; no such folder or table, few-shot shares beside a column `split`,
            and what is wrong with a line.
    """
    name, root = folder.name, Path(row.source)
    if not root.is_dir():
        raise DataError(f"datasets.{name}.source: {row.source} is no folder")
    table = root / _inside(root, row.table, f"datasets.{name}.table")
    lines = list(_lines(root, table))
    by_id: dict[str, list[Line]] = {}
    for line in lines:
        by_id.setdefault(line.id, []).append(line)
    found = [_example(table, row, some) for some in by_id.values()]
    groups = _groups(found)
    given = {f"{row.kind}/{line.id}": line.split for line in lines if line.split}
    if given and (row.few_shot or row.validation):
        key = "few_shot" if row.few_shot else "validation"
        raise ParamsError(f"datasets.{name}.{key}: {table} has a column split, which says it; must be 0")
    tests = [Grouped(e.id, groups[e.images[0]]) for e in found if given.get(e.id, "test") == "test"]
    learned_from = {id: split for id, split in given.items() if split != "test"}
    splits = deal(name, row, None, tests, seed=seed) | learned_from
    taken = [replace(example, split=splits[example.id]) for example in found if example.id in splits]
    keep(row, folder, taken, _pictures(root, table, lines, {image for e in taken for image in e.images}))


def _lines(root: Path, table: Path) -> Iterator[Line]:
    """The rows of the table, each checked by itself."""
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = _header(table, next(reader, []))
            for values in reader:
                if values:
                    yield _line(root, f"{table}:{reader.line_num}", reader.line_num, header, values)
    except FileNotFoundError:
        raise DataError(f"{table}: no such file") from None
    except UnicodeDecodeError:
        raise DataError(f"{table}: not UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{table}:{reader.line_num}: not CSV: {error}") from None


def _header(table: Path, found: Sequence[str]) -> list[str]:
    header, known = [column.strip() for column in found], (*REQUIRED, *OPTIONAL)
    for column in REQUIRED:
        if column not in header:
            with suppress(csv.Error):
                delimiter = csv.Sniffer().sniff(",".join(found), DELIMITERS).delimiter
                raise DataError(f"{table}:1: delimited by {delimiter!r}, must be by ','")
            raise DataError(f"{table}:1: no column {column!r} (columns: {', '.join(header) or 'none'})")
    for column in header:
        if column not in known:
            raise DataError(f"{table}:1: {unknown('column', column, known)}")
        if header.count(column) > 1:
            raise DataError(f"{table}:1: the column {column!r} is there {header.count(column)} times")
    return header


def _line(root: Path, where: str, number: int, header: Sequence[str], values: Sequence[str]) -> Line:
    if len(values) != len(header):
        raise DataError(f"{where}: {len(values)} fields, the header has {len(header)}")
    row = {column: value.strip() for column, value in zip(header, values, strict=True)}
    for column in header:
        if not row[column]:
            raise DataError(f"{where}: {column} is empty")
    if row["label"] not in ("0", "1"):
        raise DataError(f"{where}: label must be 1 or 0, found {row['label']!r}")
    if row.get("split", SPLITS[0]) not in SPLITS:
        raise DataError(f"{where}: {unknown('split', row['split'], SPLITS)}")
    image = _inside(root, row["image"], where)
    split = next((split for split in SPLITS if split == row.get("split")), None)
    return Line(
        number, row.get("id", image), image, row["text"], row["label"] == "1", split, row.get("category", "all")
    )


def _inside(root: Path, path: str, where: str) -> str:
    """The path in its plain form; it stays in the folder, by no way out and by no link."""
    plain = PurePosixPath(path)
    if plain.is_absolute() or not plain.parts or ".." in plain.parts or "\0" in path:
        raise DataError(f"{where}: {path!r} must be a path in the folder {root}")
    if not (root / plain).resolve().is_relative_to(root.resolve()):
        raise DataError(f"{where}: {path!r} is a link out of the folder {root}")
    return plain.as_posix()


def _example(table: Path, row: FolderDataset, lines: Sequence[Line]) -> RawExample:
    """An example of its rows; its images are stems of file names, and its split is left open."""
    first, where = lines[0], f"{table}:{lines[0].number}: example {lines[0].id!r}"
    seen: dict[tuple[str, str], int] = {}
    for line in lines:
        before = seen.setdefault((line.image, line.text), line.number)
        if before != line.number:
            raise DataError(f"{table}:{line.number}: repeats line {before}")
        for key in ("split", "category"):
            if getattr(line, key) != getattr(first, key):
                raise DataError(
                    f"{table}:{line.number}: another {key} than in line {first.number}, of the same example"
                )
    images, texts = ([*dict.fromkeys(getattr(line, key) for line in lines)] for key in ("image", "text"))
    right = [(images.index(line.image), texts.index(line.text)) for line in lines if line.right]
    if len(lines) == 1:
        raise DataError(f"{where} has one row, which leaves nothing to choose")
    if len(images) > 1 and len(texts) > 1:
        raise DataError(f"{where} has {len(images)} images and {len(texts)} texts; there must be one of either")
    if len(right) != 1:
        raise DataError(f"{where} has {len(right)} rows with label 1, must have one")
    stems = tuple(stem(image) for image in images)
    return RawExample(f"{row.kind}/{first.id}", "test", stems, tuple(texts), tuple(right), first.category)


def _groups(found: Sequence[RawExample]) -> dict[str, str]:
    """Of each picture the first, by name, of all those that examples link it with."""
    parent: dict[str, str] = {}

    def first(image: str) -> str:
        while parent.setdefault(image, image) != image:
            image = parent[image]
        return image

    for example in found:
        for image in example.images:
            one, other = sorted((first(image), first(example.images[0])))
            parent[other] = one
    return {image: first(image) for image in list(parent)}


def _pictures(root: Path, table: Path, lines: Sequence[Line], wanted: Collection[str]) -> Iterator[tuple[str, Content]]:
    """(stem, content) of the wanted pictures, each once."""
    for line in {line.image: line for line in reversed(lines)}.values():
        if stem(line.image) in wanted:
            try:
                yield stem(line.image), (root / line.image).read_bytes()
            except OSError as error:
                yield stem(line.image), ImageError(f"{table}:{line.number}: {line.image}: {error.strerror}")


def _remote(name: str, row: FolderDataset) -> int:
    """Nothing, if the table is there and can be read."""
    _expected(row)
    return 0


def _expected(row: FolderDataset) -> Expected:
    """What the table has, whatever its splits."""
    root = Path(row.source)
    by_id: dict[str, set[str]] = {}
    for line in _lines(root, root / row.table):
        by_id.setdefault(line.id, set()).add(f"{line.image}/{line.text}")
    most = max(map(len, by_id.values()), default=0)
    return Expected(len(by_id), row.test or len(by_id), 1, most)


BENCHMARK = Benchmark(
    _download,
    examples,
    "recall",
    citation="the user's own",
    licence="the user's own",
    expected=_expected,
    remote=_remote,
)
