"""Ablations: methods with one key changed, scored from stored evidence.

Shapes: L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsd.config import AblationParams, EvaluateParams
from dsd.data.examples import MatchingExample
from dsd.evaluation.evaluate import ScoredSplit, intervals, tables
from dsd.metrics import Hits
from dsd.scorers.evidence import Evidence
from dsd.statistics import Interval
from dsd.store import write_json


class ChangedMethod(NamedTuple):
    """A method with one key changed; `value` as params.yaml writes it, a list without brackets."""

    method: str
    key: str
    value: str


ChangedHits = dict[ChangedMethod, dict[str, Hits]]
Ablations = dict[str, dict[str, dict[str, dict[str, Interval]]]]  # method → key → value → metric → interval


def values(ablations: AblationParams, keys: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield (key, value as text, value) of every change; a number of random heads is both averaged and weighted."""
    for key in keys:
        for value in getattr(ablations, key):
            if key == "heads" and isinstance(value, int):
                yield from ((key, f"{value} {how}", (value, how)) for how in ("mean", "weighted"))
            else:
                yield key, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value), value


def subsets(evidence: Evidence, heads: int, count: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Yield random choices [L, H] of `heads` heads per layer, or of all heads of a layer with fewer."""
    present_LH = (evidence.attribution > 0).any((0, 1))
    for number in range(count):
        rng = np.random.default_rng([seed, heads, number])
        order_LH = np.where(present_LH, rng.random(present_LH.shape), np.inf).argsort(-1).argsort(-1)
        yield (order_LH < heads) & present_LH


def ablate(scored: ScoredSplit, ablations: AblationParams, seed: int) -> ChangedHits:
    """Return the hits of every variant of every method of `ablations`.

    With random heads, an example's hit is its mean over the choices. The weights of a fusion are fitted again for each
    choice of parts.
    """
    variants: ChangedHits = {}

    def hits(name: str, changes: Mapping[str, Any], **options: Any) -> dict[str, Hits]:
        row = scored.methods[name].model_copy(update=changes)
        return scored.hits(tables(scored.examples, scored.scores(row, name, **options)))

    for name in ablations.methods:
        method = scored.methods[name]
        for key, text, value in values(ablations, method.ablation_keys):
            variant = ChangedMethod(name, key, text)
            if key == "heads" and isinstance(value, tuple):
                number, how = value
                choices = subsets(scored.stored.evidence(method.prompt), number, ablations.subsets, seed)
                variants[variant] = mean([hits(name, {"heads": how}, heads_LH=heads_LH) for heads_LH in choices])
            else:
                variants[variant] = hits(name, {key: value})
    return variants


def mean(several: list[dict[str, Hits]]) -> dict[str, Hits]:
    """Average hits by example; the groups are the same in all."""
    return {m: (np.mean([hits[m][0] for hits in several], axis=0), groups) for m, (_, groups) in several[0].items()}


def with_intervals(
    examples: Sequence[MatchingExample], variants: ChangedHits, evaluate: EvaluateParams, seed: int
) -> Ablations:
    """Return every metric of every variant with its clustered bootstrap interval."""
    nested: Ablations = {}
    for (method, key, value), hits in variants.items():
        nested.setdefault(method, {}).setdefault(key, {})[value] = intervals(examples, hits, evaluate, seed)
    return nested


def write(ablations: Mapping[str, Ablations], target: Path) -> None:
    """Write `ablations.json`: dataset → method → key → value → metric → value, low, high, n."""
    write_json(target / "ablations.json", ablations)
