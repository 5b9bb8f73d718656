"""The user's own images: a CSV in their folder says which text matches which image.

A row is one candidate: `image` (a path in the folder), `text`, and `label`, 1 if they match and 0 if not. The rows of
an image are one example, with several texts for one image:

    image,text,label
    dogs/1.jpg,a dog asleep,1
    dogs/1.jpg,a dog awake,0

With a column `id`, the rows of an id are one example, which can also have several images for one text. At least one row
of an example has label 1 and one has label 0; an answer is right if a candidate with label 1 scores highest. Two more
optional columns must be equal in all rows of an example: `category`, for which accuracy is also reported, and `split`
(train, validation or test). With a column `split`, `few_shot` and `validation` must be 0.

The table is UTF-8 with commas. DVC notices changes of the folder if it is in the `deps` of the stage `download`.
"""

from __future__ import annotations

import codecs
import csv
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import NamedTuple

from dsd.config import FolderDataset
from dsd.data.splits import SPLITS, Split
from dsd.datasets.annotations import RawExample
from dsd.datasets.protocol import Benchmark, Expected
from dsd.datasets.published import Content, assign_splits, file_stem, image_format, store_images
from dsd.errors import DataError, ImageError, ParamsError, unknown

REQUIRED = ("image", "text", "label")
OPTIONAL = ("id", "split", "category")
MOST_CATEGORIES = 50  # each is a metric with its interval
CATEGORY = re.compile(r"[\w .:/-]+")  # what MLflow allows in the name of a metric
DELIMITERS = ";\t|:"  # recognised in the error for a table without commas


class Line(NamedTuple):
    """A row of the table, with the number of its last line."""

    number: int
    id: str
    image: str
    text: str
    right: bool
    split: Split | None
    category: str


class Grouped(NamedTuple):
    """The ids of an example and of its group of images; see `published.Item`."""

    id: str
    group: str


def _download(row: FolderDataset, *, seed: int, folder: Path, workers: int) -> None:
    """Implement `protocol.Download`.

    Raises:
        ParamsError, DataError: see `assign_splits` and `store_images`; or the folder or table is missing, shares are
            given besides a column `split`, or a line is invalid.
    """
    name = folder.name
    root, table, lines, examples = read_table(row, f"datasets.{name}.")
    groups = _groups(examples)
    given = {f"{row.kind}/{line.id}": line.split for line in lines if line.split}
    if given and (row.few_shot or row.validation):
        key = "few_shot" if row.few_shot else "validation"
        raise ParamsError(f"datasets.{name}.{key}: must be 0, because {table} has a column split")
    tests = [Grouped(e.id, groups[e.images[0]]) for e in examples if given.get(e.id, "test") == "test"]
    learning = {id: split for id, split in given.items() if split != "test"}
    splits = assign_splits(name, row, None, tests, seed=seed) | learning
    selected = [replace(example, split=splits[example.id]) for example in examples if example.id in splits]
    stems = {image for example in selected for image in example.images}
    store_images(folder, selected, _images(root, table, lines, stems), row.missing)


def read_table(row: FolderDataset, key: str) -> tuple[Path, Path, list[Line], list[RawExample]]:
    """Read the table: the folder, the table's path, its rows, and its examples, whose split is only a placeholder.

    key: start of the keys in messages, "datasets.<name>.", or "" if the caller names the dataset.
    """
    root = Path(row.source)
    if not root.is_dir():
        raise DataError(f"{key}source: {row.source} is not a folder")
    table = root / _inside(root, row.table, f"{key}table")
    lines = list(_lines(root, table))
    if not lines:
        raise DataError(f"{table}: has no row below the header")
    by_id: dict[str, list[Line]] = {}
    for line in lines:
        by_id.setdefault(line.id, []).append(line)
    examples = [_example(table, row, of_example) for of_example in by_id.values()]
    if lines[0].split and all(line.split != "test" for line in lines):
        raise DataError(f"{table}: no row has split test; every method is measured on those")
    if len(categories := {example.category for example in examples}) > MOST_CATEGORIES:
        raise DataError(
            f"{table}: column 'category' has {len(categories)} values, at most {MOST_CATEGORIES} are reported"
        )
    return root, table, lines, examples


def _lines(root: Path, table: Path) -> Iterator[Line]:
    """Read the rows of the table and check each by itself."""
    try:
        with table.open("rb") as start:
            if start.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{table}: UTF-16; save it as UTF-8")
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


def _header(table: Path, names: Sequence[str]) -> list[str]:
    header, known = [column.strip() for column in names], (*REQUIRED, *OPTIONAL)
    for column in REQUIRED:
        if column not in header:
            with suppress(csv.Error):
                delimiter = csv.Sniffer().sniff(",".join(names), DELIMITERS).delimiter
                raise DataError(f"{table}:1: delimited by {delimiter!r}, must be by ','")
            raise DataError(f"{table}:1: no column {column!r} (columns: {', '.join(header) or 'none'})")
    for column in header:
        if column not in known:
            raise DataError(f"{table}:1: {unknown('column', column, known)}")
        if header.count(column) > 1:
            raise DataError(f"{table}:1: column {column!r} occurs {header.count(column)} times")
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
    category = row.get("category", "all")
    if not CATEGORY.fullmatch(category) or category != normpath(category):
        problem = "may have letters, digits, spaces and _ . : / - only and no empty part, as it names a metric"
        raise DataError(f"{where}: category {category!r}: {problem}")
    image = _inside(root, row["image"], where)
    split = next((split for split in SPLITS if split == row.get("split")), None)
    return Line(number, row.get("id", image), image, row["text"], row["label"] == "1", split, category)


def _inside(root: Path, path: str, where: str) -> str:
    """Normalise a path and check that neither `..` nor a link leaves the folder."""
    plain = PurePosixPath(path)
    if plain.is_absolute() or not plain.parts or ".." in plain.parts or "\0" in path:
        raise DataError(f"{where}: {path!r} must be a path in the folder {root}")
    try:
        inside = (root / plain).resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links that lead to themselves
        raise DataError(f"{where}: {path!r} is a link without an end") from None
    if not inside:
        raise DataError(f"{where}: {path!r} is a link out of the folder {root}")
    return plain.as_posix()


def _example(table: Path, row: FolderDataset, lines: Sequence[Line]) -> RawExample:
    """Build an example from its rows, with file stems as images; the split is only a placeholder."""
    first, where = lines[0], f"{table}:{lines[0].number}: example {lines[0].id!r}"
    numbers: dict[tuple[str, str], int] = {}
    for line in lines:
        before = numbers.setdefault((line.image, line.text), line.number)
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
        raise DataError(f"{where} has only one row; at least two candidates are needed")
    if len(images) > 1 and len(texts) > 1:
        raise DataError(f"{where} has {len(images)} images and {len(texts)} texts; one of the two must be single")
    if not 0 < len(right) < len(lines):
        raise DataError(f"{where} has no row with label {0 if right else 1}; it needs a right and a wrong candidate")
    stems = tuple(file_stem(image) for image in images)
    return RawExample(f"{row.kind}/{first.id}", "test", stems, tuple(texts), tuple(right), first.category)


def _groups(examples: Sequence[RawExample]) -> dict[str, str]:
    """Return the group of each image: the first name among the images that examples connect it with."""
    parent: dict[str, str] = {}

    def first(image: str) -> str:
        while parent.setdefault(image, image) != image:
            image = parent[image]
        return image

    for example in examples:
        for image in example.images:
            one, other = sorted((first(image), first(example.images[0])))
            parent[other] = one
    return {image: first(image) for image in list(parent)}


def _images(root: Path, table: Path, lines: Sequence[Line], stems: Collection[str]) -> Iterator[tuple[str, Content]]:
    """Yield (stem, content) of the images with these stems, each once."""
    for line in {line.image: line for line in reversed(lines)}.values():
        if file_stem(line.image) in stems:
            where = f"{table}:{line.number}: {line.image}"
            try:
                content = (root / line.image).read_bytes()
            except OSError as error:
                yield file_stem(line.image), ImageError(f"{where}: {error.strerror}")
                continue
            problem = None if image_format(content) else "not an image" if content else "an empty file"
            yield file_stem(line.image), ImageError(f"{where}: {problem}") if problem else content


def _remote(name: str, row: FolderDataset) -> int:
    """Return 0; raise DataError if the table is not readable."""
    read_table(row, f"datasets.{name}.")
    return 0


def _expected(row: FolderDataset) -> Expected:
    """Count the examples of the table, by split if it has that column."""
    *_, lines, examples = read_table(row, "")
    images, texts = (max(len(getattr(e, key)) for e in examples) for key in ("images", "texts"))
    splits = Counter({line.id: line.split for line in lines}.values())
    if given := {split: count for split, count in splits.items() if split}:
        learning = given.get("train", 0) + given.get("validation", 0)
        return Expected(learning, row.test or given["test"], images, texts, train=given.get("train", 0))
    test = row.test or len(examples)
    return Expected(max(0, len(examples) - test), test, images, texts)


BENCHMARK = Benchmark(
    "folder",
    _download,
    "categories",
    citation="the user's own",
    licence="the user's own",
    expected=_expected,
    remote=_remote,
    seeded=False,
)
