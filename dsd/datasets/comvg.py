"""comvg: Compositional Visual Genome; two real images, one sentence, which image is it true of? (2 × 1)

Every row of the published list is a test example, including rows that repeat another. If a row of params names the
annotations of Visual Genome, training and validation examples are mutations of those (`dsd.datasets.visual_genome`), on
images that the list does not use.
"""

from __future__ import annotations

import ast
import csv
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from dsd.config import ComvgDataset, UrlParams
from dsd.data.downloads import open_text
from dsd.data.splits import split_groups
from dsd.datasets.annotations import ANNOTATIONS, RawExample, image_choice
from dsd.datasets.protocol import Benchmark, Expected
from dsd.datasets.published import fetch_images
from dsd.datasets.raw_files import fetch_raw, prune_raw, raw_size
from dsd.datasets.relations import annotation_files, read_genome
from dsd.datasets.visual_genome import file_name, mutated_examples
from dsd.errors import DataError, ParamsError

log = logging.getLogger(__name__)

COLUMNS = ("id", "sentence", "pos_triplet", "neg_triplet", "pos_image_id", "neg_image_id", "neg_value")
SLOT_OF = {"subject": "subject", "object": "object", "verb": "predicate"}  # our slots by their names in the list
MAX_TRIPLET = 1000  # characters


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the list: numbers of the positive and negative image, and the slot in which their triplets differ."""

    sentence: str
    positive: int
    negative: int
    slot: str


def read_list(path: Path) -> list[Entry]:
    """Read the published list.

    Raises:
        DataError: the file is not a CSV with these columns, or a value is invalid; names the line.
    """
    entries = []
    with open_text(path) as text:
        lines = csv.reader(text, strict=True)
        try:
            header = [name.strip() for name in next(lines, [])]
            for name in COLUMNS:
                if name not in header:
                    columns = ", ".join(header)[:120]
                    raise DataError(f"{path}:1: no column {name!r} in {columns!r}; columns are separated by commas")
            for values in filter(None, lines):
                where = f"{path}:{lines.line_num}"
                if len(values) != len(header):
                    raise DataError(f"{where}: {len(values)} values for {len(header)} columns")
                entries.append(_entry(where, dict(zip(header, map(str.strip, values), strict=True))))
        except csv.Error as error:
            raise DataError(f"{path}:{lines.line_num}: invalid CSV: {error}") from None
    if not entries:
        raise DataError(f"{path}: no rows")
    return entries


def _entry(where: str, values: dict[str, str]) -> Entry:
    if not values["sentence"]:
        raise DataError(f"{where}: sentence: empty")
    for column in ("pos_image_id", "neg_image_id"):
        if re.fullmatch(r"[0-9]{1,18}", values[column]) is None:
            raise DataError(f"{where}: {column}: {values[column][:40]!r} is not an image number")
    if len(parts := values["pos_triplet"].split(",")) != 3 or not all(part.strip() for part in parts):
        raise DataError(f"{where}: pos_triplet: {values['pos_triplet'][:60]!r} is not of the form a,b,c")
    if not _is_triplet(values["neg_triplet"]):
        raise DataError(f"{where}: neg_triplet: {values['neg_triplet'][:60]!r} is not of the form ('a', 'b', 'c')")
    if values["neg_value"] not in SLOT_OF:
        raise DataError(f"{where}: neg_value: {values['neg_value'][:40]!r} is none of {', '.join(SLOT_OF)}")
    return Entry(
        values["sentence"], int(values["pos_image_id"]), int(values["neg_image_id"]), SLOT_OF[values["neg_value"]]
    )


def _is_triplet(text: str) -> bool:
    """Whether the text is a Python tuple of three strings. It is parsed as a literal, never evaluated."""
    try:
        value = ast.literal_eval(text) if len(text) <= MAX_TRIPLET else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False
    return isinstance(value, tuple) and len(value) == 3 and all(isinstance(part, str) and part for part in value)


def _download(row: ComvgDataset, *, seed: int, folder: Path, workers: int) -> None:
    """Implement `protocol.Download`.

    Raises:
        ParamsError: few-shot or validation examples are requested without annotations or size.
        DataError: files or images cannot be fetched, or files are invalid.
    """
    key = f"datasets.{folder.name}"
    learning = bool(row.few_shot or row.validation)
    if learning and row.annotations is None:
        raise ParamsError(f"{key}.annotations: null, so few_shot and validation must be 0; the list is for testing")
    if learning and row.size is None:
        raise ParamsError(f"{key}.size: null, but few_shot and validation are shares of it")
    (folder / ANNOTATIONS).unlink(missing_ok=True)
    entries = read_list(fetch_raw(row.list, folder, f"{key}.list"))
    listed = {number for entry in entries for number in (entry.positive, entry.negative)}
    log.info("%s.list: %d rows, %d images", key, len(entries), len(listed))
    if repeated := len(entries) - len(set(entries)):
        log.warning("%s.list: %d of %d rows repeat another; all are kept", key, repeated, len(entries))
    examples = _test_examples(entries, row, seed, key)
    sources = {number: [pattern.format(number) for pattern in row.images] for number in listed}
    if learning and row.annotations is not None and row.size is not None:
        genome = read_genome(row.annotations, folder, f"{key}.annotations")
        examples += mutated_examples(genome, row, row.size, 0, seed=seed, key=key, without=listed)
        for number, url in genome.urls.items():
            sources.setdefault(number, [*(pattern.format(number) for pattern in row.images), url])
    prune_raw(_files(row, key), folder)
    fetch_images(folder, examples, {file_name(number): urls for number, urls in sources.items()}, row.missing)


def _files(row: ComvgDataset, key: str) -> dict[str, UrlParams]:
    annotations = {} if row.annotations is None else annotation_files(row.annotations, f"{key}.annotations")
    return {f"{key}.list": row.list, **annotations}


def _test_examples(entries: list[Entry], row: ComvgDataset, seed: int, key: str) -> list[RawExample]:
    """Return an example for each selected row; its id contains its number in the list."""
    ids = [f"{row.kind}/{seed}/{number}" for number in range(1, len(entries) + 1)]
    test = len(entries) if row.test is None else row.test
    if test > len(entries):
        raise ParamsError(f"{key}.test: {test} requested, the list has {len(entries)} rows")
    selected = split_groups(ids, few_shot=0, validation=0, test=test, seed=seed, sample=row.sample)
    return [_example(id, entry) for id, entry in zip(ids, entries, strict=True) if id in selected]


def _example(id: str, entry: Entry) -> RawExample:
    images = file_name(entry.positive), file_name(entry.negative)
    return image_choice(id, "test", images, (entry.sentence,), entry.slot)


BENCHMARK = Benchmark(
    "comvg",
    _download,
    metrics="slots",
    citation="Jiang et al., ComCLIP: Training-Free Compositional Image and Text Matching, 2022 (arXiv:2211.13854); "
    "Krishna et al., Visual Genome, IJCV 2017 (arXiv:1602.07332)",
    licence="list MIT; Visual Genome CC BY 4.0, its images under their owners' licences",
    expected=lambda row: Expected(row.size or 0, row.test or 5400, 2, 1),
    remote=lambda name, row: raw_size(_files(row, f"datasets.{name}")),
)
