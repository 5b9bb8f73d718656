"""comvg: Compositional Visual Genome; two real pictures, one sentence, which picture is it true of? (2 × 1)

The published list is for testing, every row an example: the same sentence, pictures and pairs of both come again and
again, and a row that repeats another is an example, too. Where a row of params names the annotations of Visual Genome,
training and validation are our own mutations (`dsd.datasets.visual_genome`) on pictures that the list does not use.
"""

from __future__ import annotations

import ast
import csv
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from random import Random

from dsd.config import ComvgDataset, UrlParams
from dsd.data.downloads import opened
from dsd.data.splits import split
from dsd.datasets import by_url, genome, visual_genome
from dsd.datasets.raw import ANNOTATIONS, Benchmark, Expected, RawExample, annotated
from dsd.errors import DataError, ParamsError

log = logging.getLogger(__name__)

COLUMNS = ("id", "sentence", "pos_triplet", "neg_triplet", "pos_image_id", "neg_image_id", "neg_value")
SLOTS = {"subject": "subject", "object": "object", "verb": "predicate"}  # what the list calls the slots
TUPLE = 1000  # characters of a triplet, at most


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the list; the triplets differ in the slot, and each holds in one picture."""

    sentence: str
    positive: int
    negative: int
    slot: str


def read_list(path: Path) -> list[Row]:
    """The rows of the published list, in its order.

    Raises:
        DataError: it is no CSV with these columns, or a row has a value that cannot be read; says where.
    """
    rows = []
    with opened(path) as text:
        lines = csv.reader(text, strict=True)
        try:
            header = [name.strip() for name in next(lines, [])]
            for name in COLUMNS:
                if name not in header:
                    raise DataError(f"{path}:1: no column {name!r} in {', '.join(header)[:120]!r}; commas part columns")
            for values in filter(None, lines):
                place = f"{path}:{lines.line_num}"
                if len(values) != len(header):
                    raise DataError(f"{place}: {len(values)} values for {len(header)} columns")
                rows.append(_row(place, dict(zip(header, map(str.strip, values), strict=True))))
        except csv.Error as error:
            raise DataError(f"{path}:{lines.line_num}: broken CSV: {error}") from None
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _row(place: str, values: dict[str, str]) -> Row:
    if not values["sentence"]:
        raise DataError(f"{place}: sentence: empty")
    for column in ("pos_image_id", "neg_image_id"):
        if re.fullmatch(r"[0-9]{1,18}", values[column]) is None:
            raise DataError(f"{place}: {column}: {values[column][:40]!r} is no number of a picture")
    if len(parts := values["pos_triplet"].split(",")) != 3 or not all(part.strip() for part in parts):
        raise DataError(f"{place}: pos_triplet: {values['pos_triplet'][:60]!r} is not of the form a,b,c")
    if not _is_triplet(values["neg_triplet"]):
        raise DataError(f"{place}: neg_triplet: {values['neg_triplet'][:60]!r} is not of the form ('a', 'b', 'c')")
    if values["neg_value"] not in SLOTS:
        raise DataError(f"{place}: neg_value: {values['neg_value'][:40]!r} is none of {', '.join(SLOTS)}")
    return Row(values["sentence"], int(values["pos_image_id"]), int(values["neg_image_id"]), SLOTS[values["neg_value"]])


def _is_triplet(text: str) -> bool:
    """Whether it is the text of a Python tuple of three strings. Nothing in it is run."""
    try:
        value = ast.literal_eval(text) if len(text) <= TUPLE else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False
    return isinstance(value, tuple) and len(value) == 3 and all(isinstance(part, str) and part for part in value)


def _download(row: ComvgDataset, *, seed: int, folder: Path, workers: int) -> None:
    """See `dsd.datasets.raw.Download`.

    Raises:
        ParamsError: splits are asked for that nothing is given for.
        DataError: files or pictures that cannot be had, or files that are not what they should be.
    """
    key = f"datasets.{folder.name}"
    learning = bool(row.few_shot or row.validation)
    if learning and row.annotations is None:
        raise ParamsError(f"{key}.annotations: null, so few_shot and validation must be 0; the list is for testing")
    if learning and row.size is None:
        raise ParamsError(f"{key}.size: null, but few_shot and validation are shares of it")
    (folder / ANNOTATIONS).unlink(missing_ok=True)
    rows = read_list(by_url.fetched(row.list, folder, f"{key}.list"))
    listed = {number for entry in rows for number in (entry.positive, entry.negative)}
    log.info("%s.list: %d rows, %d pictures", key, len(rows), len(listed))
    if repeated := len(rows) - len(set(rows)):
        log.warning("%s.list: %d of %d rows repeat another; all are kept", key, repeated, len(rows))
    examples = _tested(rows, row, seed, key)
    addresses = {number: [pattern.format(number) for pattern in row.images] for number in listed}
    if learning and row.annotations is not None and row.size is not None:
        annotated = genome.read_genome(row.annotations, folder, f"{key}.annotations")
        examples += visual_genome.mutated_examples(annotated, row, row.size, 0, seed=seed, key=key, without=listed)
        for number, url in annotated.addresses.items():
            addresses.setdefault(number, [*(pattern.format(number) for pattern in row.images), url])
    by_url.prune_raw(_files(row, key), folder)
    by_name = {by_url.picture(number): sources for number, sources in addresses.items()}
    by_url.complete(examples, by_name, folder, row.missing, key=key)


def _files(row: ComvgDataset, key: str) -> dict[str, UrlParams]:
    annotated = {} if row.annotations is None else genome.files(row.annotations, f"{key}.annotations")
    return {f"{key}.list": row.list, **annotated}


def _tested(rows: list[Row], row: ComvgDataset, seed: int, key: str) -> list[RawExample]:
    """An example for each row that is taken; its number in the list is in its id, and says which picture is first."""
    names = [f"{row.kind}/{seed}/{number}" for number in range(1, len(rows) + 1)]
    wanted = len(rows) if row.test is None else row.test
    if wanted > len(rows):
        raise ParamsError(f"{key}.test: {wanted} asked for, the list has {len(rows)} rows")
    taken = split(names, few_shot=0, validation=0, test=wanted, seed=seed, sample=row.sample)
    return [_example(name, entry) for name, entry in zip(names, rows, strict=True) if name in taken]


def _example(name: str, entry: Row) -> RawExample:
    images, true = (by_url.picture(entry.positive), by_url.picture(entry.negative)), Random(name).randrange(2)
    return RawExample(name, "test", images[::-1] if true else images, (entry.sentence,), ((true, 0),), entry.slot)


BENCHMARK = Benchmark(
    _download,
    annotated,
    metrics="slots",
    citation="Jiang et al., ComCLIP: Training-Free Compositional Image and Text Matching, 2022 (arXiv:2211.13854); "
    "Krishna et al., Visual Genome, IJCV 2017 (arXiv:1602.07332)",
    licence="list MIT; Visual Genome CC BY 4.0, its pictures under their owners' licences",
    expected=lambda row: Expected(row.size or 0, row.test or 5400, 2, 1),
    remote=lambda name, row: by_url.remote(_files(row, f"datasets.{name}")),
)
