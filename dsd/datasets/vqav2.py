"""VQAv2: one image, one question with every answer that is frequent; which one is right? (1 × answers)

The answers are the most frequent ones of the questions that may be trained on, 3,129 in the published conversion to
classes, and each question is matched with all of them: "Is the sky blue? yes". So its kind does not show in its
candidates.

A question may have another answer than these. The published conversion counts it as answered wrong by everyone, and so
does its example here, which has no right pair. To offer its answer with the others would give it away, and to leave it
out would flatter. In the few-shot split it is left out: nothing can be learned from it.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dsd.config import Vqav2Dataset
from dsd.datasets import parquet
from dsd.datasets.raw import Benchmark, Expected, RawExample
from dsd.datasets.repository import Place, Repository, fetch, remote
from dsd.datasets.selection import apart, deal, examples, keep, stem
from dsd.errors import DataError, ParamsError

log = logging.getLogger(__name__)

IMAGE = "image"


@dataclass(frozen=True)
class Columns:
    question_id: int
    image_id: int
    question: str
    multiple_choice_answer: str
    answer_type: Literal["yes/no", "number", "other"]


class Asked(NamedTuple):
    """A question; its group is its picture, after which the file is named."""

    id: str
    group: str
    place: Place
    question: str
    answer: str
    category: str


def _download(row: Vqav2Dataset, *, seed: int, folder: Path, workers: int) -> None:
    """See `dsd.datasets.raw.Download`.

    Raises:
        ParamsError, DataError: see `repository.fetch`, `parquet.rows`, `deal` and `keep`; and fewer answers than
            the row asks for.
    """
    name = folder.name
    repository = fetch(name, row, workers=workers)
    testing = _read(repository, row, repository.test)
    training = None if repository.train is None else apart(name, _read(repository, row, repository.train), testing)
    splits = deal(name, row, training, testing, seed=seed)
    learned_from = [asked for asked in (testing if training is None else training) if splits.get(asked.id) != "test"]
    answers = _answers(name, row, learned_from)

    found: list[RawExample] = []
    places: dict[str, Place] = {}
    unanswerable: Counter[str] = Counter()
    for asked in (*(training or ()), *testing):
        split = splits.get(asked.id)
        if split is None:
            continue
        right = tuple((0, n) for n in [answers.get(asked.answer)] if n is not None)
        if not right:
            unanswerable[split] += 1
        if right or split != "train":
            texts = tuple(f"{asked.question} {answer}" for answer in answers)
            found.append(RawExample(asked.id, split, (stem(asked.group),), texts, right, asked.category))
            places.setdefault(asked.group, asked.place)
    for key, count in unanswerable.items():
        fate = "left out" if key == "train" else "wrong whatever is said"
        log.warning("%s: the answers of %d %s questions are not among %d: %s", name, count, key, len(answers), fate)
    keep(row, folder, found, parquet.pictures(repository, {place: stem(group) for group, place in places.items()}))


def _read(repository: Repository, row: Vqav2Dataset, files: Sequence[str]) -> list[Asked]:
    """The questions of the files, each once; another row of the same must say the same."""
    found: dict[int, tuple[Columns, Place]] = {}
    repeated = 0
    for file in files:
        for n, columns in enumerate(parquet.rows(repository, file, Columns)):
            first, place = found.setdefault(columns.question_id, (columns, Place(file, n, IMAGE)))
            repeated += place != (file, n, IMAGE)
            if first != columns:
                raise DataError(
                    f"{repository.root / file}, row {n}: question {columns.question_id} is another in {place.file}"
                )
    if repeated:
        log.warning("%s: %d rows repeat a question", repository.name, repeated)
    return [
        Asked(
            f"{row.kind}/{number}",
            f"{columns.image_id:012d}",
            place,
            columns.question,
            columns.multiple_choice_answer,
            "binary" if columns.answer_type == "yes/no" else "other",
        )
        for number, (columns, place) in found.items()
    ]


def _answers(name: str, row: Vqav2Dataset, rows: Sequence[Asked]) -> dict[str, int]:
    """The most frequent answers, each with its place among the candidates; equally frequent ones stand by name."""
    counts = Counter(asked.answer for asked in rows)
    if len(counts) < row.answers:
        raise ParamsError(
            f"datasets.{name}.answers: {row.answers}, but the questions outside the test have {len(counts)} answers"
        )
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return {answer: n for n, answer in enumerate(ordered[: row.answers])}


BENCHMARK = Benchmark(
    _download,
    examples,
    "answers",
    citation="Goyal et al., Making the V in VQA Matter, CVPR 2017",
    licence="annotations: CC BY 4.0; pictures: COCO's, from Flickr, under the terms of each",
    expected=lambda row: Expected(214_354, row.test or 214_354, 1, row.answers),
    remote=remote,
)
