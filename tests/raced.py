"""Races on synthetic evidence, and few settings of each schedule."""

from __future__ import annotations

import numpy as np

from dsd.config import RacesParams
from dsd.schedules.replay import RecordedRaces

LEVELS = (0.1, 0.4, 0.7, 0.9)


def few(races: RacesParams) -> RacesParams:
    """Four levels of two draws, and a few settings."""
    return races.model_copy(
        update={
            "levels": LEVELS,
            "draws_per_level": 2,
            "exhaustive": races.exhaustive.model_copy(update={"draws": (1, 4, 8)}),
            "staged": races.staged.model_copy(update={"to_keep": ((1,), (3, 1)), "first": (1, 2), "growth": (2,)}),
            "hierarchical": races.hierarchical.model_copy(
                update={"samples": (1, 2), "beam_factor": (2.0, 8.0), "patience": (4,), "shrinking": (False,)}
            ),
            "published": races.published.model_copy(update={"samples": 2}),
            "growth": races.growth.model_copy(update={"candidates": (10, 40), "races": 30, "delta": 0.2}),
            "racing": races.racing.model_copy(
                update={"proposer": (None, "clip-zero-shot"), "deltas": (0.1,), "budget": (None, 5.0)}
            ),
            "within": (0.02, 0.2),
        }
    )


def synthetic_races(count: int, seed: int = 0) -> RecordedRaces:
    """The first candidate is right. Clean levels are informative, the noisiest is not; the proposer is noisy."""
    rng = np.random.default_rng(seed)
    worth = rng.normal(size=(count, 12)) + np.eye(12)[0] * 3
    signal = np.repeat([1.0, 0.7, 0.3, 0.0], 2)
    values = worth[:, :, None] * signal + rng.normal(size=(count, 12, 8)) * 0.5
    proposals = worth + rng.normal(size=worth.shape)
    proposed, clusters = {"clip-zero-shot": list(proposals)}, [str(n) for n in range(count)]
    return RecordedRaces(list(values), proposed, {"clip-zero-shot": 1.5}, [0] * count, clusters)
