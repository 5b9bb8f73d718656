"""Scores and metrics with intervals from stored evidence; no model is run here.

Shapes: I images, T texts, C candidates of an example; n examples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsd.config import EvaluateParams, MethodParams, Params
from dsd.data.examples import MatchingExample, Pair, pairs, read_examples
from dsd.datasets import benchmark
from dsd.errors import DataError
from dsd.metrics import FORCED, Hits, all_hits, expected_hits, rank
from dsd.scorers import SCORERS
from dsd.scorers.base import Scores, StoredEvidence
from dsd.scorers.evidence import read_ranks, scored_examples
from dsd.scorers.fusion import fitting_examples
from dsd.statistics import Difference, Interval, clustered_mean, paired_difference
from dsd.store import write_atomic, write_csv, write_json

Results = dict[str, dict[str, Interval]]  # method → metric → interval


class Evaluated(NamedTuple):
    """The metrics of a dataset by method, in the order of params.yaml, and the hits that they average."""

    results: Results
    hits: dict[str, dict[str, Hits]]


def table(example: MatchingExample, scores: Scores) -> np.ndarray:
    """Return the example's scores [I, T]."""
    return np.array([[scores[Pair(image, text)] for text in example.texts] for image in example.images])


def tables(examples: Sequence[MatchingExample], scores: Scores) -> list[np.ndarray]:
    """Return the scores [I, T] of each example."""
    return [table(example, scores) for example in examples]


def ranked(examples: Sequence[MatchingExample], scores: Sequence[np.ndarray]) -> NDArray[np.int64]:
    """Return the rank [n] of the right pair of every example."""
    return np.array([rank(scores_IT, example.answer) for scores_IT, example in zip(scores, examples, strict=True)])


def hits_of(kind: str, examples: Sequence[MatchingExample], ranks_n: NDArray[np.int64]) -> dict[str, Hits]:
    """Return hits and groups of every metric of a dataset kind.

    Raises:
        DataError: a metric needs a category that no example has.
    """
    try:
        categories, candidates = zip(*((e.category, len(e.images) * len(e.texts)) for e in examples), strict=True)
        return all_hits(benchmark(kind).metrics, ranks_n, categories, candidates)
    except ValueError as error:
        raise DataError(f"{kind}, {len(examples)} examples: {error}") from None


def forced_hits(
    kind: str,
    examples: Sequence[MatchingExample],
    scores: Sequence[np.ndarray],
    hits: Callable[[str, Sequence[MatchingExample], Sequence[np.ndarray]], dict[str, Hits]],
) -> dict[str, Hits]:
    """Return the hits of each "forced <metric>": `hits` of the examples narrowed to the candidates of their own kind.

    Empty unless the kind of dataset has `own_kind`. An example with only one candidate of its kind keeps all.

    Args:
        scores: [I, T] of each example.
        hits: `ranked_hits` or `random_hits`.
    """
    own_kind = benchmark(kind).own_kind
    if own_kind is None:
        return {}
    kept = [own if len(own := list(own_kind(e))) > 1 else list(range(len(e.texts))) for e in examples]
    narrowed = [
        replace(
            example,
            texts=tuple(example.texts[t] for t in own),
            answer=tuple((i, own.index(t)) for i, t in example.answer if t in own),
        )
        for example, own in zip(examples, kept, strict=True)
    ]
    own_scores = [scores_IT[:, own] for scores_IT, own in zip(scores, kept, strict=True)]
    return {f"{FORCED} {metric}": row for metric, row in hits(kind, narrowed, own_scores).items()}


def ranked_hits(kind: str, examples: Sequence[MatchingExample], scores: Sequence[np.ndarray]) -> dict[str, Hits]:
    """Return hits and groups of every metric, from the scores [I, T] of every example; ties count as wrong."""
    return hits_of(kind, examples, ranked(examples, scores))


def random_hits(kind: str, examples: Sequence[MatchingExample], scores: Sequence[np.ndarray]) -> dict[str, Hits]:
    """Return expected hits and groups of every metric with ties in random order; equal scores give chance level.

    Raises:
        ValueError: the scores of a 2 x 2 example differ.
    """
    two_by_two = any(scores_IT.shape == (2, 2) for scores_IT in scores)
    if two_by_two and any(np.ptp(scores_IT) for scores_IT in scores):
        raise ValueError("ties in random order: 2 x 2 examples need equal scores")
    places = []
    for example, scores_IT in zip(examples, scores, strict=True):
        right = np.zeros(scores_IT.shape, dtype=bool)
        right[tuple(np.array(example.answer, dtype=int).reshape(-1, 2).T)] = True
        best = scores_IT[right].max(initial=-np.inf)
        places.append(((scores_IT > best).sum(), (scores_IT == best).sum(), (right & (scores_IT == best)).sum()))
    ahead_n, tied_n, right_n = np.array(places).T
    hits = partial(hits_of, kind, examples)
    return expected_hits(hits, ahead_n, tied_n, right_n, two_by_two=two_by_two)


def intervals(
    examples: Sequence[MatchingExample], hits: Mapping[str, Hits], evaluate: EvaluateParams, seed: int
) -> dict[str, Interval]:
    """Return every metric with its clustered bootstrap interval."""
    clusters = [example.cluster for example in examples]
    options = dict(evaluate.model_dump(), seed=seed)
    return {metric: clustered_mean(hits_n, clusters, groups, **options) for metric, (hits_n, groups) in hits.items()}


def headline_differences(
    kind: str,
    examples: Sequence[MatchingExample],
    hits: Mapping[str, Hits],
    others: Mapping[str, Hits],
    evaluate: EvaluateParams,
    seed: int,
) -> dict[str, Difference]:
    """Return `hits` minus `others`, paired, on the headline metric, and on the forced one if there is one."""
    headline, clusters = benchmark(kind).headline, [example.cluster for example in examples]
    return {
        metric: paired_difference(hits_n, others[metric][0], clusters, groups, **evaluate.model_dump(), seed=seed)
        for metric, (hits_n, groups) in hits.items()
        if metric in (headline, f"{FORCED} {headline}")
    }


@dataclass(frozen=True)
class ScoredSplit:
    """A split of a dataset, and what the stage `score` stored for it."""

    kind: str
    examples: list[MatchingExample]
    few_shot: list[MatchingExample]
    methods: Mapping[str, MethodParams]
    stored: StoredEvidence
    scored: Path

    @classmethod
    def of(cls, name: str, params: Params, prepared: Path, scored: Path, split: str = "test") -> ScoredSplit:
        """prepared, scored: the dataset's folders of the stages `prepare` and `score`."""
        examples = scored_examples(prepared, scored, split)
        few_shot = read_examples(prepared / "examples.parquet", "train")
        stored = StoredEvidence(
            scored,
            examples,
            fitting_examples(few_shot, params.methods, params.fusion, params.seed),
            methods=params.methods,
            poolings=params.evidence.poolings,
            noise=params.noise_of(name),
            fusion=params.fusion,
            seed=params.seed,
        )
        return cls(params.datasets[name].kind, examples, few_shot, params.methods, stored, scored)

    def scores(self, method: MethodParams, name: str, stored: StoredEvidence | None = None, **options: Any) -> Scores:
        """Return the score of every pair under a method, a row of params or any other.

        stored: the evidence, by default that of the split; options: the scorer's.
        """
        return SCORERS[method.scorer].scores(name, method, stored or self.stored, **options)

    def tables(self, name: str) -> list[np.ndarray]:
        """Return the scores [I, T] of every example under a method; with a schedule, minus each candidate's rank."""
        method = self.methods[name]
        if not method.has_schedule:
            return tables(self.examples, self.scores(method, name))
        ranks = read_ranks(self.scored, name, self.examples)
        return [
            table(example, dict(zip(pairs([example]), (-ranks_C.astype(float)).tolist(), strict=True)))
            for example, ranks_C in zip(self.examples, ranks, strict=True)
        ]

    def hits(self, scores: Sequence[np.ndarray]) -> dict[str, Hits]:
        """Return hits and groups of every metric, from the scores [I, T] of every example."""
        return ranked_hits(self.kind, self.examples, scores)


SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "category": pa.string(),
        "method": pa.string(),
        "scores": pa.list_(pa.float64()),  # row-major [I, T]
        "rank": pa.int32(),  # of the right pair among the example's candidates, 1 is right
    }
)


def evaluate(name: str, scored: ScoredSplit, params: EvaluateParams, seed: int, target: Path) -> Evaluated:
    """Compute the metrics of every method on a split of dataset `name`; write `scores/<name>.parquet` to target."""
    examples = scored.examples
    hits: dict[str, dict[str, Hits]] = {}
    rows = []
    for method in scored.methods:
        scores = scored.tables(method)
        ranks = ranked(examples, scores)
        hits[method] = hits_of(scored.kind, examples, ranks)
        hits[method] |= forced_hits(scored.kind, examples, scores, ranked_hits)
        rows += [
            dict(id=e.id, category=e.category, method=method, scores=t.ravel().tolist(), rank=int(r))
            for e, t, r in zip(examples, scores, ranks, strict=True)
        ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
    write_atomic(target / "scores" / f"{name}.parquet", sink.getvalue().to_pybytes())
    results = {method: intervals(examples, hits[method], params, seed) for method in scored.methods}
    return Evaluated(results, hits)


def write_metrics(results: dict[str, Results], target: Path) -> None:
    """Write `metrics.json` (dataset → method → metric → value, low, high, n) and the same as rows in `metrics.csv`."""
    write_json(target / "metrics.json", results, indent=2)
    rows = [
        {"dataset": dataset, "method": method, "metric": metric, **interval.as_dict()}
        for dataset, methods in results.items()
        for method, metrics in methods.items()
        for metric, interval in metrics.items()
    ]
    write_csv(target / "metrics.csv", ["dataset", "method", "metric", "value", "low", "high", "n"], rows)
