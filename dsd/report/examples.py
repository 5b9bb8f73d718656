"""Test examples with their images, the answers of every method, and heat maps of the method under test.

Shapes: I images, T texts of an example.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from math import floor, log10
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dsd.data.examples import MatchingExample
from dsd.data.image_table import ImageTable
from dsd.report.heatmaps import HeatMaps, coloured
from dsd.report.inputs import DatasetResults

if TYPE_CHECKING:
    from dsd.matcher import Heatmap

LISTED = 13  # candidates that a card lists; of more, the right ones and those that a method names
IMAGE_SIDE, MAP_SIDE = 224, 32  # maximum, in pixels; the page enlarges maps
# Tokens without a map: what a text is about is in the others.
FUNCTION_WORDS = re.compile(r"an?|the|of|is|are|there|that|it|to|in|on|what|which|how|many|photo|picture|than|\W+")


@dataclass(frozen=True)
class WordMap:
    word: str
    uri: str


@dataclass(frozen=True)
class Mapped:
    """The heat maps of the content words of a text over an image."""

    label: str
    image: str
    words: list[WordMap]


@dataclass(frozen=True)
class Candidate:
    """One (image, text). methods: those that name it."""

    label: str
    correct: bool
    methods: list[str]


@dataclass(frozen=True)
class Answer:
    """What a method names, with the score; the score of the right candidate, and its rank."""

    method: str
    right: bool
    named: str
    score: str
    correct_score: str
    rank: int


@dataclass(frozen=True)
class Card:
    """One example. text: what all candidates share, if anything. images: (uri, label, correct) of each."""

    id: str
    dataset: str
    category: str
    text: str | None
    images: list[tuple[str, str, bool]]
    candidates: list[Candidate]
    total: int
    answers: list[Answer]
    maps: list[Mapped]

    @property
    def right(self) -> list[str]:
        return [answer.method for answer in self.answers if answer.right]


@dataclass(frozen=True)
class NoisyExample:
    """One test example at increasing noise levels, with the maps of its correct text."""

    dataset: str
    text: str
    levels: list[tuple[float, str, list[WordMap]]]  # level, decoded noisy latent, maps


def uri(image: Image.Image, side: int) -> str:
    """The image, at most `side` pixels a side, as a data URI: PNG if it is small or has a palette, else JPEG."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    data, kind = io.BytesIO(), "png" if image.mode == "P" or max(image.size) <= 96 else "jpeg"
    options = {"optimize": True} if kind == "png" else {"quality": 88, "subsampling": 0, "optimize": True}
    image.save(data, kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(data.getvalue()).decode()


def choose(dataset: DatasetResults, method: str, count: int, seed: int) -> list[int]:
    """For every category, right and wrong answers of the method, sampled by the seed.

    They are about `count` of each over the whole dataset, and at least one of a category where it has one.
    """
    rng = Random(f"gallery/{dataset.name}/{seed}")
    categories = sorted({example.category for example in dataset.examples})
    each, chosen = max(1, count // len(categories)), []
    for category in categories:
        for right in (True, False):
            places = [
                n
                for n, example in enumerate(dataset.examples)
                if example.category == category and (dataset.ranks[method][n] == 1) == right
            ]
            chosen += sorted(rng.sample(places, min(each, len(places))))
    return chosen


def cards(dataset: DatasetResults, method: str, count: int, seed: int, prepared: Path, heat: HeatMaps) -> list[Card]:
    """The sampled examples of a dataset, with the heat maps of `method`."""
    images = ImageTable(prepared / "images.parquet")
    return [card(dataset, n, method, images, heat) for n in choose(dataset, method, count, seed)]


def first_card(datasets: Sequence[DatasetResults], method: str, data: Path) -> tuple[Card, Candidate] | None:
    """The first test example where one image has several texts, so that it is not hand-picked, without heat maps.

    With it the wrong candidate to which `method` gives the highest score. None if there is no such example.
    """
    for dataset in datasets:
        example = dataset.examples[0]
        if method in dataset.results and len(example.images) == 1 and len(example.texts) > 1 and example.answer:
            images = ImageTable(data / "prepare" / dataset.name / "images.parquet")
            shown = card(dataset, 0, method, images, None)
            scores_T = dataset.scores[method][0][0]
            wrong = [t for t in range(len(example.texts)) if (0, t) not in example.answer]
            text = _label(example, (0, max(wrong, key=lambda t: scores_T[t])))
            named = [answer.method for answer in shown.answers if answer.named == text]
            return shown, Candidate(text, False, named)
    return None


def decimals(scores: Sequence[float]) -> int:
    """The number of decimals that shows two digits of the scores' spread."""
    spread = max(scores) - min(scores)
    return min(8, max(1, 1 - floor(log10(spread)))) if 0 < spread < np.inf else 4


def card(dataset: DatasetResults, n: int, method: str, images: ImageTable, heat: HeatMaps | None) -> Card:
    """The test example number `n`; `heat`: where its maps come from, if any are drawn."""
    example = dataset.examples[n]
    places = [(i, t) for i in range(len(example.images)) for t in range(len(example.texts))]
    named: dict[tuple[int, int], list[str]] = {}
    answers = []
    for name in dataset.methods:
        scores_IT, rank = dataset.scores[name][n], int(dataset.ranks[name][n])
        # Among equal scores the correct candidate ranks last, as in the metrics.
        top = max(places, key=lambda place: (scores_IT[place], (place in example.answer) == (rank == 1)))
        correct = max(example.answer, key=lambda place: scores_IT[place], default=top)
        named.setdefault(top, []).append(name)
        digits = decimals([float(score) for score in scores_IT.ravel()])
        score, correct_score = (f"{scores_IT[place]:.{digits}f}".replace("-", "−") for place in (top, correct))
        answers.append(Answer(name, rank == 1, _label(example, top), score, correct_score, rank))
    listed = (
        places if len(places) <= LISTED else [place for place in places if place in example.answer or place in named]
    )
    candidates = [Candidate(_label(example, p), p in example.answer, named.get(p, [])) for p in listed]
    pictures = [images[image] for image in example.images]
    uris = [uri(picture, IMAGE_SIDE) for picture in pictures]
    shown = [
        (
            uris[i],
            f"image {i + 1}" if len(uris) > 1 else "image",
            len(uris) > 1 and any(i == p[0] for p in example.answer),
        )
        for i in range(len(uris))
    ]
    maps = []
    if heat is not None:
        own = next(place for place, names in named.items() if method in names)
        for i, t in sorted({*example.answer, own}) if len(uris) == 1 else places:
            words = word_maps(heat(dataset.name, pictures[i], example.texts[t]))
            maps.append(Mapped(_label(example, (i, t)), uris[i], words))
    shared = example.texts[0] if len(example.texts) == 1 else f"{start} …" if (start := _start(example)) else None
    return Card(example.id, dataset.name, example.category, shared, shown, candidates, len(places), answers, maps)


def _label(example: MatchingExample, place: tuple[int, int]) -> str:
    image, text = f"image {place[0] + 1}", example.texts[place[1]]
    if len(example.images) == 1:
        return text.removeprefix(_start(example)).strip() or text
    return image if len(example.texts) == 1 else f"{image}: {text}"


def _start(example: MatchingExample) -> str:
    """The words that all texts of an image begin with, such as a question: "" for fewer than two."""
    columns = zip(*(text.split() for text in example.texts), strict=False)
    words = [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]
    return " ".join(words) if len(words) > 1 and len(example.images) == 1 and len(example.texts) > 1 else ""


def noisy_example(dataset: DatasetResults, prepared: Path, heat: HeatMaps) -> NoisyExample:
    """The first test example, so that it is not hand-picked."""
    example = dataset.examples[0]
    place, text = example.answer[0]
    image = ImageTable(prepared / "images.parquet")[example.images[place]]
    levels = [
        (level, uri(Image.fromarray(heatmap.picture), 96), word_maps(heatmap))
        for level, heatmap in heat.by_level(dataset.name, image, example.texts[text]).items()
    ]
    return NoisyExample(dataset.name, example.texts[text], levels)


def word_maps(heatmap: Heatmap) -> list[WordMap]:
    """The maps of the content words; of all words if there are no others."""
    pairs = list(zip(heatmap.words, heatmap.maps, strict=True))
    content = [(word, map_RR) for word, map_RR in pairs if not FUNCTION_WORDS.fullmatch(word)]
    return [WordMap(word, uri(coloured(map_RR), MAP_SIDE)) for word, map_RR in content or pairs]
