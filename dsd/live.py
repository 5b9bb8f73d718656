"""Scores while they are computed: candidates under a schedule, with the standing after each round.

Shapes: I images, T texts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsd.data.draws import Draw
from dsd.data.examples import Pair
from dsd.data.images import image_id
from dsd.schedules.race import Race, Schedule
from dsd.scorers.evidence import UNCONDITIONAL

if TYPE_CHECKING:
    from dsd.matcher import Matcher, Picture


@dataclass(frozen=True)
class Standing:
    """The state after a round.

    scores_IT: higher is better, of a dropped candidate its last. kept_IT: the candidates that are still compared.
    evaluations: denoiser passes so far. most: those of every candidate at every draw.
    """

    scores_IT: NDArray[np.float64]
    kept_IT: NDArray[np.bool_]
    evaluations: int
    most: int


def standings(
    matcher: Matcher, pictures: Sequence[Picture], texts: Sequence[str], schedule: Schedule
) -> Iterator[Standing]:
    """Score images against texts, the candidates of an image in a race; yield after each round.

    Candidates are the texts of an image or, with a single text, the images. With a schedule that drops none, the last
    scores are those of `Matcher.score`.

    Args:
        pictures: as `Matcher.picture` returns them.
        schedule: over the matcher's draws; the k-th draw of a race is `matcher.draws[k]`.
    """
    by_image = len(texts) > 1
    pairs_IT = [[Pair(image_id(picture), text) for text in texts] for picture in pictures]
    lines = pairs_IT if by_image else [[row[0] for row in pairs_IT]]
    races = [Race(len(line), schedule) for line in lines]
    latents, spent = matcher.latents({image_id(picture): picture for picture in pictures}), 0
    most = matcher.rows(len(pictures), len(texts))
    while any(len(race.next_rows()) for race in races):
        wanted = [
            [(line[c], matcher.draws[k]) for c, k in race.next_rows()] for line, race in zip(lines, races, strict=True)
        ]
        rows = dict.fromkeys(row for of_race in wanted for row in of_race)
        references = {row: _reference(*row) for row in rows} if matcher.compares_unconditional else {}
        needed = list(dict.fromkeys([*rows, *references.values()]))
        values = matcher.values(needed, latents)
        spent += len(needed)
        compared = {row: values[row] - values[references[row]] if references else values[row] for row in rows}
        for race, of_race in zip(races, wanted, strict=True):
            if of_race:
                race.record([compared[row] for row in of_race])
        scores, kept = (np.array([getattr(race, key) for race in races]) for key in ("scores", "kept"))
        yield Standing(scores if by_image else scores.T, kept if by_image else kept.T, spent, most)


def _reference(pair: Pair, draw: Draw) -> tuple[Pair, Draw]:
    """The unconditional pass that a row is compared with."""
    return Pair(pair.image, UNCONDITIONAL), draw
