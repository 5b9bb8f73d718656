"""Methods with one of their keys changed: reductions of stored evidence, nothing is scored anew.

Shapes: L layers, H heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsd.config import AblationParams, CrossAttentionMethod, FusionMethod, Params
from dsd.data.examples import MatchingExample, read_examples
from dsd.evaluation.evaluate import attention_scores, hits_of, intervals, ranked, reader, tables
from dsd.metrics import Hits
from dsd.scorers import fusion
from dsd.scorers.evidence import Evidence
from dsd.scorers.fusion import Scores
from dsd.statistics import Interval
from dsd.store import write_atomic


class Variant(NamedTuple):
    """A method with one key changed; `value` as params.yaml writes it, a list without brackets."""

    method: str
    key: str
    value: str


VariantHits = dict[Variant, dict[str, Hits]]
Ablations = dict[str, dict[str, dict[str, dict[str, Interval]]]]  # method → key → value → metric → interval


ATTENTION, FUSION = ("pooling", "heads", "layers", "levels"), ("parts",)  # the keys of each scorer


def values(ablations: AblationParams, keys: Sequence[str] = ATTENTION) -> Iterator[tuple[str, str, Any]]:
    """(key, value as text, value) of every change; a number of random heads is tried averaged and weighted."""
    for key in keys:
        for value in getattr(ablations, key):
            if key == "heads" and isinstance(value, int):
                yield from ((key, f"{value} {how}", (value, how)) for how in ("mean", "weighted"))
            else:
                yield key, ", ".join(map(str, value)) if isinstance(value, tuple) else str(value), value


def subsets(evidence: Evidence, heads: int, count: int, seed: int) -> Iterator[NDArray[np.bool_]]:
    """Random choices [L, H] of so many heads of each layer; a layer that has no more keeps all of them."""
    present_LH = (evidence.attribution > 0).any((0, 1))
    for number in range(count):
        rng = np.random.default_rng([seed, heads, number])
        order_LH = np.where(present_LH, rng.random(present_LH.shape), np.inf).argsort(-1).argsort(-1)
        yield (order_LH < heads) & present_LH


def ablate(name: str, params: Params, prepared: Path, scored: Path) -> VariantHits:
    """Hits on the test split of dataset `name` for every variant of every method of `ablations`.

    Where a number of heads is chosen at random, an example's hit is its mean over the choices. The weights of a fusion
    are fitted anew for each choice of parts.
    """
    examples, kind = read_examples(prepared / "examples.parquet", "test"), params.datasets[name].kind
    read, ablations, poolings = reader(name, params, examples, scored), params.ablations, params.evidence.poolings
    found: VariantHits = {}

    def hits(scores: Scores) -> dict[str, Hits]:
        return hits_of(kind, examples, ranked(examples, tables(examples, scores)))

    for row in ablations.methods:
        method = params.methods[row]
        if isinstance(method, FusionMethod):
            few_shot = fusion.fitted_on(name, params, prepared, scored)
            for key, text, value in values(ablations, FUSION):
                changed = method.model_copy(update={key: value})
                fitted = fusion.learn(few_shot, changed, params)
                scores = fusion.scores(fitted, read("none"), read("few-shot"), changed, poolings)
                found[Variant(row, key, text)] = hits(scores)
            continue
        assert isinstance(method, CrossAttentionMethod)  # params refuses anything else
        evidence = read(method.prompt)
        for key, text, value in values(ablations):
            if key == "heads" and isinstance(value, tuple):
                number, how = value
                row_of = method.model_copy(update={"heads": how})
                choices = subsets(evidence, number, ablations.subsets, params.seed)
                several = [hits(attention_scores(evidence, row_of, poolings, chosen_LH)) for chosen_LH in choices]
                found[Variant(row, key, text)] = mean(several)
            else:
                changed_row = method.model_copy(update={key: value})
                found[Variant(row, key, text)] = hits(attention_scores(evidence, changed_row, poolings))
    return found


def mean(several: list[dict[str, Hits]]) -> dict[str, Hits]:
    """Hits averaged example by example; the groups are the same in all."""
    return {m: (np.mean([hits[m][0] for hits in several], axis=0), groups) for m, (_, groups) in several[0].items()}


def with_intervals(params: Params, examples: Sequence[MatchingExample], found: VariantHits) -> Ablations:
    """Every metric of every variant with its clustered bootstrap interval."""
    nested: Ablations = {}
    for (method, key, value), hits in found.items():
        nested.setdefault(method, {}).setdefault(key, {})[value] = intervals(params, examples, hits)
    return nested


def write(found: Mapping[str, Ablations], target: Path) -> None:
    """`ablations.json`: dataset → method → key → value → metric → value, low, high, n."""

    def plain(node: Any) -> Any:
        return node.as_dict() if isinstance(node, Interval) else {key: plain(child) for key, child in node.items()}

    write_atomic(target / "ablations.json", (json.dumps(plain(found), indent=1) + "\n").encode())
