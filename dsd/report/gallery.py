"""Correct and wrong answers with their images, scores and heat maps.

Shapes: I images, T texts of an example.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsd.data.examples import MatchingExample
from dsd.data.image_table import ImageTable
from dsd.data.images import overlay
from dsd.report.heatmaps import HeatMaps
from dsd.report.inputs import DatasetResults

if TYPE_CHECKING:
    from dsd.matcher import Heatmap

MAPPED = 6  # examples with heat maps in each group: a map costs U-Net passes
LISTED = 3  # top candidates that a card lists; correct ones are always listed
IMAGE_SIDE, MAP_SIDE = 224, 96  # maximum, in pixels


@dataclass(frozen=True)
class WordMap:
    word: str
    uri: str


@dataclass(frozen=True)
class Candidate:
    """One (image, text) of an example, with the rank of its score among all candidates."""

    text: str
    image: str
    score: str
    rank: int
    correct: bool
    words: list[WordMap]


@dataclass(frozen=True)
class Card:
    """One example; a text or image shared by all candidates is given once."""

    id: str
    category: str
    text: str | None
    image: str | None
    candidates: list[Candidate]
    omitted: int  # candidates that are not listed


@dataclass(frozen=True)
class Gallery:
    dataset: str
    groups: list[tuple[str, list[Card], int]]  # title, cards, number of such test examples


@dataclass(frozen=True)
class NoisyExample:
    """One test example at increasing noise levels, with the maps of its correct text."""

    dataset: str
    text: str
    levels: list[tuple[float, str, list[WordMap]]]  # level, decoded noisy latent, maps


def uri(image: Image.Image, side: int) -> str:
    """The image, at most `side` pixels a side, as a data URI."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def choose(dataset: DatasetResults, method: str, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Up to `count` correctly and `count` wrongly answered examples, sampled by the seed."""
    correct_n = dataset.ranks[method] == 1
    rng = Random(f"gallery/{dataset.name}/{seed}")
    chosen = []
    for wanted in (True, False):
        places = np.flatnonzero(correct_n == wanted).tolist()
        chosen.append(sorted(rng.sample(places, min(count, len(places)))))
    return chosen[0], chosen[1]


def gallery(dataset: DatasetResults, method: str, count: int, seed: int, prepared: Path, heat: HeatMaps) -> Gallery:
    """Sampled correct and wrong answers: `count` of each, or a third where every example has one image."""
    if not any(len(example.images) > 1 for example in dataset.examples):
        count = max(1, count // 3)
    images, correct_n = ImageTable(prepared / "images.parquet"), dataset.ranks[method] == 1
    totals = int(correct_n.sum()), int((~correct_n).sum())

    def cards(places: Sequence[int]) -> list[Card]:
        return [
            _card(dataset, dataset.examples[n], dataset.scores[method][n], images, heat if row < MAPPED else None)
            for row, n in enumerate(places)
        ]

    groups = zip(("Correct", "Wrong"), choose(dataset, method, count, seed), totals, strict=True)
    return Gallery(dataset.name, [(title, cards(places), total) for title, places, total in groups])


def decimals(scores: Sequence[float]) -> int:
    """The number of decimals that shows two digits of the scores' spread."""
    spread = max(scores) - min(scores)
    return min(8, max(1, 1 - floor(log10(spread)))) if spread else 4


def _card(
    dataset: DatasetResults,
    example: MatchingExample,
    scores_IT: NDArray[np.float64],
    images: ImageTable,
    heat: HeatMaps | None,
) -> Card:
    places = [(i, t) for i in range(len(example.images)) for t in range(len(example.texts))]
    # Among equal scores the correct candidate ranks last, as in the metrics.
    order = sorted(places, key=lambda place: (-scores_IT[place], place in example.answer))
    several = len(example.images) > 1
    listed = [place for n, place in enumerate(order) if n < LISTED or place in example.answer]
    candidates, digits = [], decimals([float(scores_IT[place]) for place in listed])
    for place in sorted(listed) if several else listed:
        correct, image, text = place in example.answer, images[example.images[place[0]]], example.texts[place[1]]
        mapped = several or correct or place == order[0]
        words = _words(heat(dataset.name, image, text)) if heat is not None and mapped else []
        score, own = f"{scores_IT[place]:.{digits}f}", uri(image, IMAGE_SIDE) if several else ""
        candidates.append(Candidate(text, own, score, order.index(place) + 1, correct, words))
    shared_text = example.texts[0] if len(example.texts) == 1 else None
    shared_image = None if several else uri(images[example.images[0]], IMAGE_SIDE)
    return Card(example.id, example.category, shared_text, shared_image, candidates, len(order) - len(listed))


def noisy_example(dataset: DatasetResults, prepared: Path, heat: HeatMaps) -> NoisyExample:
    """The first test example, so that it is not hand-picked."""
    example = dataset.examples[0]
    place, text = example.answer[0]
    image = ImageTable(prepared / "images.parquet")[example.images[place]]
    levels = [
        (level, uri(Image.fromarray(heatmap.picture), MAP_SIDE), _words(heatmap))
        for level, heatmap in heat.by_level(dataset.name, image, example.texts[text]).items()
    ]
    return NoisyExample(dataset.name, example.texts[text], levels)


def _words(heatmap: Heatmap) -> list[WordMap]:
    return [
        WordMap(word, uri(overlay(heatmap.picture, heat), MAP_SIDE))
        for word, heat in zip(heatmap.words, heatmap.maps, strict=True)
    ]
