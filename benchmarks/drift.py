"""How far the scores of a model in other arithmetic are from its scores in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dsd.config import CrossAttentionMethod, DenoisingMethod, Params
from dsd.data.draws import draws
from dsd.data.examples import MatchingExample
from dsd.engine.engine import Engine
from dsd.evaluation.evaluate import attention_scores, denoising_scores, tables
from dsd.scorers.evidence import Evidence, requests, wanted


class Drift(NamedTuple):
    """Absolute differences between scores, in units of how far an example's best and worst candidate are apart on
    average; and the share of examples that another candidate wins."""

    largest: float
    mean: float
    changed: float


def between(full: Sequence[np.ndarray], low: Sequence[np.ndarray]) -> Drift:
    """Of the scores [I, T] of each example in float32 and in other arithmetic."""
    spread = float(np.mean([np.ptp(scores) for scores in full]))
    moved = np.concatenate([np.abs(b - a).ravel() for a, b in zip(full, low, strict=True)]) / spread
    changed = [a.argmax() != b.argmax() for a, b in zip(full, low, strict=True)]
    return Drift(float(moved.max()), float(moved.mean()), float(np.mean(changed)))


def drift(full: Engine, low: Engine, params: Params, examples: Sequence[MatchingExample]) -> dict[str, Drift]:
    """By method without a prompt, at the draws of `noise`; the engines are of one backbone in two kinds of arithmetic,
    so that images and texts are encoded alike."""
    seen = [scores_of(engine, params, examples) for engine in (full, low)]
    return {method: between(seen[0][method], seen[1][method]) for method in seen[0]}


def scores_of(engine: Engine, params: Params, examples: Sequence[MatchingExample]) -> dict[str, list[np.ndarray]]:
    """The scores [I, T] of every example, by method without a prompt."""
    asked, seen = wanted(examples, normalised=True), draws(params.noise, params.seed)
    arrays = engine.compute(requests(examples, params.noise, params.seed, normalised=True))
    shaped = {name: array.reshape(len(asked), len(seen), *array.shape[1:]) for name, array in arrays.items()}
    evidence = Evidence(asked, seen, **shaped, layers=engine.backbone.layers, latent=0)
    found = {}
    for name, method in params.methods.items():
        if isinstance(method, CrossAttentionMethod) and method.prompt == "none":
            found[name] = tables(examples, attention_scores(evidence, method, params.evidence.poolings))
        if isinstance(method, DenoisingMethod) and method.prompt == "none":
            found[name] = tables(examples, denoising_scores(evidence, method))
    return found
