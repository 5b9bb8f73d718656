"""Right and wrong answers with pictures, scores, and where each word looks.

Shapes: I images, T texts of an example; R picture side, M words.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor, log10
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dsd.config import ContrastiveMethod, Params, under_test
from dsd.data.examples import MatchingExample
from dsd.data.image_table import ImageTable
from dsd.report.inputs import Dataset

if TYPE_CHECKING:
    from dsd.matcher import Heatmap, Matcher

MAPPED = 6  # examples of a dataset, right and wrong each, that heat maps are drawn for: they cost U-Net passes
SHOWN = 3  # candidates of an example that are listed, the true one apart
PICTURE, OVERLAY = 224, 96  # the largest sides in pixels


class HeatMaps(Protocol):
    """Where a text looks in a picture, under the attention prompt of a dataset."""

    @property
    def digest(self) -> str:
        """Of the checkpoint that is looked into."""
        ...

    def __call__(self, dataset: str, image: Image.Image, text: str) -> Heatmap: ...

    def by_level(self, dataset: str, image: Image.Image, text: str) -> dict[float, Heatmap]:
        """At each noise level: the noisy latent, decoded, and where the text looks in it."""
        ...


class BackboneHeatMaps:
    """Heat maps of the method under test: one backbone, and the attention prompt of each dataset if it has one.

    It alone loads torch: other pages are made of the same tables and figures.
    """

    def __init__(self, params: Params, trained: Path) -> None:
        from dsd.models import device_of, load_diffusion

        self._name = under_test(params)
        method = params.methods[self._name]
        assert not isinstance(method, ContrastiveMethod)  # which is what `under_test` looks for
        row, runtime = params.backbones[params.backbone], params.runtime
        self._backbone = load_diffusion(row, device_of(runtime.device), runtime.attention)
        self._params, self._method, self._trained = params, method, trained
        self._matchers: dict[str, Matcher] = {}

    @property
    def digest(self) -> str:
        return str(self._backbone.digest)

    def __call__(self, dataset: str, image: Image.Image, text: str) -> Heatmap:
        return self._matcher(dataset).heatmap(image, text)

    def by_level(self, dataset: str, image: Image.Image, text: str) -> dict[float, Heatmap]:
        return self._matcher(dataset).heatmaps(image, text)

    def _matcher(self, dataset: str) -> Matcher:
        if dataset not in self._matchers:
            self._matchers[dataset] = self._opened(dataset)
        return self._matchers[dataset]

    def _opened(self, dataset: str) -> Matcher:
        from dsd.matcher import Matcher
        from dsd.models.prompts import PROMPT, AttentionPrompt

        prompt = None
        if self._method.prompt == "few-shot":
            prompt = AttentionPrompt.load(self._trained / dataset / self._name / PROMPT, self._backbone.digest)
            prompt = prompt.to(self._backbone.device)
        return Matcher(
            self._backbone,
            prompt,
            "cross-attention",
            self._params.noise.model_copy(update={"levels": self._method.levels}),
            self._params.evidence,
            parity=None,  # the prepared pictures have been through it
            batch_size=self._params.runtime.batch_size,
            seed=self._params.seed,
        )


@dataclass(frozen=True)
class Word:
    word: str
    uri: str


@dataclass(frozen=True)
class Candidate:
    """One (image, text) of an example, with the rank of its score among all candidates."""

    text: str
    picture: str
    score: str
    rank: int
    true: bool
    words: list[Word]


@dataclass(frozen=True)
class Card:
    """One example; what all its candidates share is told once."""

    id: str
    category: str
    text: str | None
    picture: str | None
    candidates: list[Candidate]
    others: int  # candidates that are not listed


@dataclass(frozen=True)
class Gallery:
    dataset: str
    right: list[Card]
    wrong: list[Card]
    counts: tuple[int, int]  # right and wrong answers among all test examples


def uri(image: Image.Image, side: int) -> str:
    """The picture, at most `side` pixels a side, as a data URI."""
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.BICUBIC)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def overlay(picture: NDArray[np.uint8], heat: NDArray[np.float32]) -> Image.Image:
    """A heat map [R, R] in 0…1 over its picture [R, R, 3]: lit where the word looks, dim and grey elsewhere."""
    colour = picture.astype(np.float32)
    grey = colour.mean(-1, keepdims=True) * 0.35 + 18
    lit = heat[..., None].clip(0, 1)
    glow = np.array([255, 214, 92], np.float32)
    warm = colour + 0.28 * lit**2 * (glow - colour)
    return Image.fromarray((grey + lit * (warm - grey)).clip(0, 255).astype(np.uint8))


def choose(dataset: Dataset, method: str, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Up to `count` examples answered right and as many answered wrong, drawn by the seed alone."""
    right_n = dataset.ranks[method] == 1
    rng = Random(f"gallery/{dataset.name}/{seed}")
    drawn = []
    for wanted in (True, False):
        places = np.flatnonzero(right_n == wanted).tolist()
        drawn.append(sorted(rng.sample(places, min(count, len(places)))))
    return drawn[0], drawn[1]


def gallery(dataset: Dataset, params: Params, prepared: Path, heat: HeatMaps) -> Gallery:
    """Examples of the trained method: as many as params say where images are chosen among, else a third of them."""
    method = under_test(params)
    several = any(len(example.images) > 1 for example in dataset.examples)
    count = params.report.gallery if several else max(1, params.report.gallery // 3)
    right, wrong = choose(dataset, method, count, params.seed)
    pictures = ImageTable(prepared / "images.parquet")

    def cards(places: Sequence[int]) -> list[Card]:
        return [
            _card(dataset, dataset.examples[n], dataset.scores[method][n], pictures, heat if row < MAPPED else None)
            for row, n in enumerate(places)
        ]

    right_n = dataset.ranks[method] == 1
    return Gallery(dataset.name, cards(right), cards(wrong), (int(right_n.sum()), int((~right_n).sum())))


def decimals(scores: Sequence[float]) -> int:
    """So many that two digits of the scores' spread show."""
    spread = max(scores) - min(scores)
    return min(8, max(1, 1 - floor(log10(spread)))) if spread else 4


def _card(
    dataset: Dataset,
    example: MatchingExample,
    scores_IT: NDArray[np.float64],
    pictures: ImageTable,
    heat: HeatMaps | None,
) -> Card:
    places = [(i, t) for i in range(len(example.images)) for t in range(len(example.texts))]
    # A wrong candidate with the same score stands above the true one, as in the metrics.
    order = sorted(places, key=lambda place: (-scores_IT[place], place in example.answer))
    several = len(example.images) > 1
    listed = [place for n, place in enumerate(order) if n < SHOWN or place in example.answer]
    candidates, digits = [], decimals([float(scores_IT[place]) for place in listed])
    for place in sorted(listed) if several else listed:
        true, image = place in example.answer, pictures[example.images[place[0]]]
        looked = heat is not None and (several or true or place == order[0])
        words = _words(heat(dataset.name, image, example.texts[place[1]])) if heat is not None and looked else []
        rank, score = order.index(place) + 1, f"{scores_IT[place]:.{digits}f}"
        picture = uri(image, PICTURE) if several else ""
        candidates.append(Candidate(example.texts[place[1]], picture, score, rank, true, words))
    text = example.texts[0] if len(example.texts) == 1 else None
    shared = None if several else uri(pictures[example.images[0]], PICTURE)
    return Card(example.id, example.category, text, shared, candidates, len(order) - len(listed))


@dataclass(frozen=True)
class Noisy:
    """One test example at rising noise: what the model sees, and where each word of the right text looks."""

    dataset: str
    text: str
    levels: list[tuple[float, str, list[Word]]]  # level, the noisy picture, maps


def noisy(dataset: Dataset, params: Params, prepared: Path, heat: HeatMaps) -> Noisy:
    """The first test example, so that nobody picked it."""
    example = dataset.examples[0]
    image, text = example.answer[0]
    picture = ImageTable(prepared / "images.parquet")[example.images[image]]
    found = heat.by_level(dataset.name, picture, example.texts[text])
    levels = [(level, uri(Image.fromarray(seen.picture), OVERLAY), _words(seen)) for level, seen in found.items()]
    return Noisy(dataset.name, example.texts[text], levels)


def _words(found: Heatmap) -> list[Word]:
    return [
        Word(word, uri(overlay(found.picture, heat), OVERLAY))
        for word, heat in zip(found.words, found.maps, strict=True)
    ]
