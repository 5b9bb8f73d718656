"""How far the scores of a model in other arithmetic are from its scores in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsd.config import Params
from dsd.data.draws import draws
from dsd.data.examples import MatchingExample
from dsd.engine.engine import Engine
from dsd.evaluation.evaluate import tables
from dsd.scorers import SCORERS
from dsd.scorers.evidence import Evidence, requests, with_unconditional


class Drift(NamedTuple):
    """Absolute differences between scores, relative to the mean difference between an example's best and worst
    candidate; and the share of examples with another best candidate."""

    largest: float
    mean: float
    changed: float


def moved(full: Sequence[np.ndarray], low: Sequence[np.ndarray]) -> np.ndarray:
    """Absolute differences between all scores, of examples [I, T], relative to the mean spread of an example."""
    spread = float(np.mean([np.ptp(scores) for scores in full]))
    return np.concatenate([np.abs(b - a).ravel() for a, b in zip(full, low, strict=True)]) / spread


def changed(full: Sequence[np.ndarray], low: Sequence[np.ndarray]) -> list[bool]:
    """Whether each example has another best candidate."""
    return [bool(a.argmax() != b.argmax()) for a, b in zip(full, low, strict=True)]


def between(full: Sequence[np.ndarray], low: Sequence[np.ndarray]) -> Drift:
    """The drift from the scores [I, T] of each example in float32 to those in other arithmetic."""
    drifts = moved(full, low)
    return Drift(float(drifts.max()), float(drifts.mean()), float(np.mean(changed(full, low))))


def drift(full: Engine, low: Engine, params: Params, examples: Sequence[MatchingExample]) -> dict[str, Drift]:
    """The drift of each method without a prompt, at the draws of `noise`; both engines have the same backbone, and the
    same encodings of images and texts."""
    in_full, in_low = (scores_of(engine, params, examples) for engine in (full, low))
    return {method: between(in_full[method], in_low[method]) for method in in_full}


def scores_of(engine: Engine, params: Params, examples: Sequence[MatchingExample]) -> dict[str, list[np.ndarray]]:
    """The scores [I, T] of every example, by method without a prompt."""
    rows, same_draws = with_unconditional(examples, compares=True), draws(params.noise, params.seed)
    arrays = engine.compute(requests(examples, params.noise, params.seed, compares=True))
    shaped = {name: array.reshape(len(rows), len(same_draws), *array.shape[1:]) for name, array in arrays.items()}
    evidence = Evidence(rows, same_draws, **shaped, layers=engine.backbone.layers, latent=0)
    stored = _Computed(evidence, params.evidence.poolings)
    return {
        name: tables(examples, SCORERS[method.scorer].scores(name, method, stored))  # type: ignore[arg-type]
        for name, method in params.methods.items()
        if method.can_have_schedule and method.zero_shot and not method.has_schedule
    }


class _Computed(NamedTuple):
    """Evidence in place of `StoredEvidence`."""

    computed: Evidence
    poolings: Sequence[str]

    def evidence(self, prompt: str) -> Evidence:
        return self.computed
