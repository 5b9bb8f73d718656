"""VQAv2: one image, one question with every frequent answer; which answer is right? (1 × answers)

The candidates are the most frequent answers to the questions outside the test (3,129 in the published conversion to a
classification task). Every question is matched with all of them ("Is the sky blue? yes"), so the candidates do not
reveal the type of question.

If a question has another answer, no pair is right, and every method counts as wrong, as in the published conversion.
Adding its answer as a candidate would reveal it, and skipping the question would raise the accuracy. In the few-shot
split such questions are left out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dsd.config import Vqav2Dataset
from dsd.data.examples import MatchingExample
from dsd.data.hub import Location, Repository, fetch_repository, repository_size
from dsd.datasets import parquet
from dsd.datasets.annotations import RawExample
from dsd.datasets.protocol import Benchmark, Expected
from dsd.datasets.published import assign_splits, file_stem, store_images, without_test_images
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


class Question(NamedTuple):
    """A question with its answer; its group is the number of its image, which also names the image's file."""

    id: str
    group: str
    location: Location
    text: str
    answer: str
    category: str


def _download(row: Vqav2Dataset, *, seed: int, folder: Path, workers: int) -> None:
    """Implement `protocol.Download`.

    Raises:
        ParamsError, DataError: see `fetch_repository`, `read_rows`, `assign_splits` and `store_images`; or there are
            fewer answers than the row requires.
    """
    name = folder.name
    repository = fetch_repository(name, row, workers=workers)
    testing = _read(repository, row, repository.test)
    training = (
        None
        if repository.train is None
        else without_test_images(name, _read(repository, row, repository.train), testing)
    )
    splits = assign_splits(name, row, training, testing, seed=seed)
    learning = [item for item in (testing if training is None else training) if splits.get(item.id) != "test"]
    answers = _answers(name, row, learning)

    examples: list[RawExample] = []
    locations: dict[str, Location] = {}
    unanswerable: Counter[str] = Counter()
    for item in (*(training or ()), *testing):
        split = splits.get(item.id)
        if split is None:
            continue
        answer = ((0, answers[item.answer]),) if item.answer in answers else ()
        if not answer:
            unanswerable[split] += 1
        if answer or split != "train":
            texts = tuple(f"{item.text} {candidate}" for candidate in answers)
            examples.append(RawExample(item.id, split, (file_stem(item.group),), texts, answer, item.category))
            locations.setdefault(item.group, item.location)
    for key, count in unanswerable.items():
        result = "left out" if key == "train" else "counted as wrong"
        log.warning("%s: the answers of %d %s questions are not among %d: %s", name, count, key, len(answers), result)
    wanted = {location: file_stem(group) for group, location in locations.items()}
    store_images(folder, examples, parquet.read_images(repository, wanted), row.missing)


def _read(repository: Repository, row: Vqav2Dataset, files: Sequence[str]) -> list[Question]:
    """Read the questions of the files, each once; repeated rows must be equal."""
    rows: dict[int, tuple[Columns, Location]] = {}
    repeated = 0
    for file in files:
        for n, columns in enumerate(parquet.read_rows(repository, file, Columns)):
            first, location = rows.setdefault(columns.question_id, (columns, Location(file, n, IMAGE)))
            repeated += location != (file, n, IMAGE)
            if first != columns:
                raise DataError(
                    f"{repository.root / file}, row {n}: question {columns.question_id} differs from that in "
                    f"{location.file}"
                )
    if repeated:
        log.warning("%s: %d rows repeat a question", repository.name, repeated)
    return [
        Question(
            f"{row.kind}/{number}",
            f"{columns.image_id:012d}",
            location,
            columns.question,
            columns.multiple_choice_answer,
            "binary" if columns.answer_type == "yes/no" else "other",
        )
        for number, (columns, location) in rows.items()
    ]


def _answers(name: str, row: Vqav2Dataset, questions: Sequence[Question]) -> dict[str, int]:
    """Return the index of each candidate answer; most frequent first, equally frequent ones in alphabetical order."""
    counts = Counter(item.answer for item in questions)
    if len(counts) < row.answers:
        raise ParamsError(
            f"datasets.{name}.answers: {row.answers}, but the questions outside the test have {len(counts)} answers"
        )
    ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return {answer: n for n, answer in enumerate(ordered[: row.answers])}


def own_kind(example: MatchingExample) -> list[int]:
    """Return the indices of the texts whose answer has the form of the right one: yes or no, a number, or another.

    Without a right answer the category decides, which tells only the first form from the others.
    """
    # All texts start with the question. What the first and the last in alphabetical order share, all share.
    first, last = min(example.texts), max(example.texts)
    shared = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    start = first.rfind(" ", 0, shared) + 1
    forms = [_form(text[start:]) for text in example.texts]
    own = {forms[t] for _, t in example.answer}
    own = own or ({"binary"} if example.category == "binary" else {"number", "other"})
    return [n for n, form in enumerate(forms) if form in own]


def _form(answer: str) -> str:
    if answer in ("yes", "no"):
        return "binary"
    return "number" if answer.isdecimal() else "other"


BENCHMARK = Benchmark(
    "vqav2",
    _download,
    "answers",
    citation="Goyal et al., Making the V in VQA Matter, CVPR 2017",
    licence="annotations: CC BY 4.0; images: COCO's, from Flickr, under the terms of each",
    expected=lambda row: Expected(214_354, row.test or 214_354, 1, row.answers),
    remote=repository_size,
    own_kind=own_kind,
    seeded=False,
)
