"""Evidence to scores to metrics with intervals. No model is run here.

Shapes: I images, T texts of an example; E pairs, K draws, P poolings, L layers, H heads.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsd.config import (
    ContrastiveMethod,
    CrossAttentionMethod,
    DenoisingMethod,
    FusionMethod,
    Params,
    ReleasedMethod,
    noise_of,
    raced,
)
from dsd.data.examples import MatchingExample, Pair, pairs, read_examples
from dsd.datasets import benchmark
from dsd.errors import DataError
from dsd.metrics import METRICS, Hits, rank
from dsd.scorers import cross_attention, denoising, fusion, released
from dsd.scorers.evidence import Evidence, normalises, read_evidence, read_places, read_shards, unconditional
from dsd.scorers.fusion import Scores
from dsd.statistics import Interval, clustered_mean
from dsd.store import write_atomic

Results = dict[str, dict[str, Interval]]  # method → metric → interval


class Evaluated(NamedTuple):
    """What `evaluate` found out about a dataset, by method in the order of params.yaml and metric."""

    results: Results
    hits: dict[str, dict[str, Hits]]


def attention_scores(
    evidence: Evidence,
    method: CrossAttentionMethod,
    poolings: Sequence[str],
    chosen_LH: NDArray[np.bool_] | None = None,
) -> Scores:
    """DSD: the chosen pooling reduced over heads and layers, averaged over the draws of the method's levels.

    Args:
        poolings: those of the evidence, in its order.
        chosen_LH: heads that count; None is all of them.
    """
    draws = [k for k, draw in enumerate(evidence.draws) if draw.level in method.levels]
    pooled, attribution = evidence.attention[:, draws, poolings.index(method.pooling)], evidence.attribution[:, draws]
    if chosen_LH is not None:
        attribution = attribution * chosen_LH
    scores = cross_attention.reduce(pooled, attribution, layers=method.layers, heads=method.heads)
    return dict(zip(evidence.pairs, scores.mean(-1).tolist(), strict=True))


def denoising_scores(evidence: Evidence, method: DenoisingMethod) -> Scores:
    """The Diffusion Classifier, normalised by the unconditional error where images are compared."""
    chosen = [k for k, draw in enumerate(evidence.draws) if draw.level in method.levels]
    error = evidence.error[:, chosen]
    scores = denoising.reduce(error, unconditional(evidence, error))
    return dict(zip(evidence.pairs, scores.tolist(), strict=True))


def released_scores(evidence: Evidence, method: ReleasedMethod, poolings: Sequence[str]) -> Scores:
    """The published implementation's rule, with the unconditional half where images are compared."""
    chosen = [k for k, draw in enumerate(evidence.draws) if draw.level in method.levels]
    layers = released.last_blocks(evidence.layers)
    logits = evidence.attention[:, chosen, poolings.index("logits")][..., layers, :]
    attribution, error = evidence.attribution[:, chosen][..., layers, :], evidence.error[:, chosen]
    logits, error = (np.stack([unconditional(evidence, values), values]) for values in (logits, error))
    scores = released.reduce(logits, attribution, error, size=evidence.latent, denoising=method.denoising)
    return dict(zip(evidence.pairs, scores.tolist(), strict=True))


def clip_scores(scored: Path, method: str, asked: Sequence[Pair]) -> Scores:
    """CLIP: the stored cosines."""
    return dict(zip(asked, read_shards(scored, method)["cosine"].tolist(), strict=True))


def table(example: MatchingExample, scores: Scores) -> np.ndarray:
    """The example's scores [I, T]."""
    return np.array([[scores[Pair(image, text)] for text in example.texts] for image in example.images])


def tables(examples: Sequence[MatchingExample], scores: Scores) -> list[np.ndarray]:
    """The scores [I, T] of every example."""
    return [table(example, scores) for example in examples]


def ranked(examples: Sequence[MatchingExample], found: Sequence[np.ndarray]) -> NDArray[np.int64]:
    """[n] the rank of the right pair of every example."""
    return np.array([rank(scores_IT, example.answer) for scores_IT, example in zip(found, examples, strict=True)])


def hits_of(kind: str, examples: Sequence[MatchingExample], ranks_n: NDArray[np.int64]) -> dict[str, Hits]:
    """Hits and groups of every metric of a dataset kind.

    Raises:
        DataError: a metric counts examples of a category that none has.
    """
    try:
        return METRICS[benchmark(kind).metrics](ranks_n, [example.category for example in examples])
    except ValueError as error:
        raise DataError(f"{kind}, {len(examples)} examples: {error}") from None


def intervals(params: Params, examples: Sequence[MatchingExample], hits: Mapping[str, Hits]) -> dict[str, Interval]:
    """Every metric with its clustered bootstrap interval."""
    clusters = [example.cluster for example in examples]
    options = dict(params.evaluate.model_dump(), seed=params.seed)
    return {metric: clustered_mean(hits_n, clusters, groups, **options) for metric, (hits_n, groups) in hits.items()}


def reader(name: str, params: Params, examples: Sequence[MatchingExample], scored: Path) -> Callable[[str], Evidence]:
    """The stored evidence of the examples by prompt ("none", "few-shot"), each read once."""

    @lru_cache(maxsize=2)
    def read(prompt: str) -> Evidence:
        normalised = normalises(params.methods, prompt)
        return read_evidence(scored, prompt, examples, noise_of(params, name), params.seed, normalised)

    return read


def method_tables(
    name: str, params: Params, examples: Sequence[MatchingExample], prepared: Path, scored: Path
) -> Iterator[tuple[str, list[np.ndarray]]]:
    """(method, scores [I, T] of every example), method by method."""
    exhaustive = method_scores(name, params, examples, prepared, scored)
    others = raced(params)
    for row in params.methods:
        yield row, raced_tables(scored, row, examples) if row in others else tables(examples, next(exhaustive)[1])


def raced_tables(scored: Path, method: str, examples: Sequence[MatchingExample]) -> list[np.ndarray]:
    """Of a method with a schedule, minus the place that each candidate ended at: a race ranks, and no more."""
    places = read_places(scored, method, examples)
    return [
        table(example, dict(zip(pairs([example]), (-place_C.astype(float)).tolist(), strict=True)))
        for example, place_C in zip(examples, places, strict=True)
    ]


def method_scores(
    name: str, params: Params, examples: Sequence[MatchingExample], prepared: Path, scored: Path
) -> Iterator[tuple[str, Scores]]:
    """(method, scores of every pair of the examples), for every method whose schedule is exhaustive."""
    read, poolings = reader(name, params, examples, scored), params.evidence.poolings
    others = raced(params)
    for row, method in params.methods.items():
        if row in others:
            continue
        if isinstance(method, ContrastiveMethod):
            yield row, clip_scores(scored, row, pairs(examples))
        elif isinstance(method, CrossAttentionMethod):
            yield row, attention_scores(read(method.prompt), method, poolings)
        elif isinstance(method, ReleasedMethod):
            yield row, released_scores(read(method.prompt), method, poolings)
        elif isinstance(method, FusionMethod):
            fitted = fusion.learn(fusion.fitted_on(name, params, prepared, scored), method, params)
            yield row, fusion.scores(fitted, read("none"), read("few-shot"), method, poolings)
        elif isinstance(method, DenoisingMethod):
            yield row, denoising_scores(read(method.prompt), method)


SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "category": pa.string(),
        "method": pa.string(),
        "scores": pa.list_(pa.float64()),  # row-major [I, T]
        "rank": pa.int32(),  # of the right pair among the example's candidates, 1 is right
    }
)


def evaluate(name: str, params: Params, prepared: Path, scored: Path, target: Path) -> Evaluated:
    """Metrics of every method on the test split of dataset `name`; writes `scores/<name>.parquet` under target."""
    examples = read_examples(prepared / "examples.parquet", "test")
    hits: dict[str, dict[str, Hits]] = {}
    rows = []
    for method, found in method_tables(name, params, examples, prepared, scored):
        ranks = ranked(examples, found)
        hits[method] = hits_of(params.datasets[name].kind, examples, ranks)
        rows += [
            dict(id=e.id, category=e.category, method=method, scores=t.ravel().tolist(), rank=int(r))
            for e, t, r in zip(examples, found, ranks, strict=True)
        ]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), sink)
    write_atomic(target / "scores" / f"{name}.parquet", sink.getvalue().to_pybytes())
    return Evaluated({method: intervals(params, examples, hits[method]) for method in params.methods}, hits)


def write_metrics(results: dict[str, Results], target: Path) -> None:
    """`metrics.json` (dataset → method → metric → value, low, high, n) and the same as rows in `metrics.csv`."""
    nested = {
        d: {m: {k: v.as_dict() for k, v in row.items()} for m, row in rows.items()} for d, rows in results.items()
    }
    write_atomic(target / "metrics.json", (json.dumps(nested, indent=2) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "method", "metric", "value", "low", "high", "n"])
    for dataset, rows in nested.items():
        for method, row in rows.items():
            for metric, v in row.items():
                writer.writerow([dataset, method, metric, v["value"], v["low"], v["high"], v["n"]])
    write_atomic(target / "metrics.csv", text.getvalue().encode())
