"""Measure a matcher on the user's own images, without a workspace.

Shapes: I images, T texts of an example; n examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dsd.config import EvaluateParams, FolderDataset, ImageParams
from dsd.data.examples import MatchingExample, read_examples
from dsd.data.image_table import ImageTable
from dsd.data.images import MAX_PIXELS
from dsd.datasets import benchmark
from dsd.datasets.folder import read_table
from dsd.datasets.preparation import prepare
from dsd.errors import DataError
from dsd.evaluation.evaluate import intervals, random_hits, ranked_hits
from dsd.statistics import Interval

if TYPE_CHECKING:
    from dsd.matcher import Matcher

NAME = "own"
BOOTSTRAP = EvaluateParams(resamples=2000, confidence=0.95)


class Evaluation(NamedTuple):
    """What a matcher does on a table of images and texts.

    accuracy, chance: by metric, in 0…1. chance: of random scores. left_out: the ids of examples that are not measured,
    with the reason. examples, scores: the others, and their scores [I, T]. files: the image files [I] of each example.
    """

    accuracy: dict[str, Interval]
    chance: dict[str, float]
    left_out: dict[str, str]
    examples: list[MatchingExample]
    scores: list[np.ndarray]
    files: list[list[str]]


def evaluate(matcher: Matcher, table: Path, *, seed: int = 0) -> Evaluation:
    """Score every example of a table `image,text,label` and return accuracy with intervals.

    The format of the table is that of datasets of kind `folder` (see `dsd.datasets.folder`); image paths are relative
    to its folder. Intervals are percentile bootstraps over clusters: the examples of one image or, where candidates are
    images, of one text.

    Raises:
        DataError: the table is wrong, a file is missing or not an image, or no example is left.
    """
    row = _row(table)
    kind = benchmark(row.kind)
    with TemporaryDirectory(prefix="dsd-own-") as folder:
        raw, ready = Path(folder) / "raw" / NAME, Path(folder) / "ready"
        kind.download(row, seed=seed, folder=raw, workers=1)
        sizes = ImageParams(resolution=matcher.backbone.resolution, parity=None, max_pixels=MAX_PIXELS)
        prepare(NAME, row, raw, ready, images=sizes, seed=seed, workers=1)
        every, images = read_examples(ready / "examples.parquet", "test"), ImageTable(ready / "images.parquet")
        files: dict[str, list[str]] = {}
        for line in read_table(row, "")[2]:
            of_example = files.setdefault(f"{row.kind}/{line.id}", [])
            of_example += [line.image] if line.image not in of_example else []
        left_out = dict.fromkeys(sorted(files.keys() - {e.id for e in every}), "an image cannot be read")
        left_out |= {e.id: "two images have the same pixels" for e in every if len(set(e.images)) < len(e.images)}
        left_out |= {e.id: "two texts are one to the model" for e in every if matcher.indistinct(e.texts)}
        examples = [example for example in every if example.id not in left_out]
        if not examples:
            raise DataError(f"{table}: no example is left: {'; '.join(sorted(set(left_out.values())))}")
        scores = list(_scores(matcher, examples, images))
    equal = [np.zeros_like(scores_IT) for scores_IT in scores]
    accuracy, chance = (
        intervals(examples, hits(row.kind, examples, values), BOOTSTRAP, seed)
        for hits, values in ((ranked_hits, scores), (random_hits, equal))
    )
    chances = {metric: interval.value for metric, interval in chance.items()}
    return Evaluation(accuracy, chances, left_out, examples, scores, [files[example.id] for example in examples])


def check_table(table: Path) -> None:
    """Raise DataError if a line of the table is wrong; done before a checkpoint is opened."""
    read_table(_row(table), "")


def _row(table: Path) -> FolderDataset:
    """The table as a dataset whose examples are all test examples."""
    return FolderDataset(
        kind="folder", source=str(table.parent), table=table.name, few_shot=0, sample=0, validation=0, test=None,
        missing=0,
    )  # fmt: skip


def _scores(matcher: Matcher, examples: Sequence[MatchingExample], images: ImageTable) -> Iterator[np.ndarray]:
    """Yield the scores [I, T] of every example, several examples at a time so that batches are full."""
    waiting: list[MatchingExample] = []

    def scored() -> Iterator[np.ndarray]:
        problems = [([matcher.picture(images[id]) for id in e.images], e.texts) for e in waiting]
        yield from (scores_IT.numpy() for scores_IT in matcher.score_many(problems))
        waiting.clear()

    for example in examples:
        waiting.append(example)
        if sum(matcher.rows(len(e.images), len(e.texts)) for e in waiting) >= 8 * matcher.full:
            yield from scored()
    yield from scored()
