"""The stored results of studies, and their differences from params.yaml. No model runs here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsd.config import EvaluateParams, StudyParams
from dsd.data.examples import MatchingExample
from dsd.evaluation.claims import DatasetHits
from dsd.evaluation.evaluate import hits_of
from dsd.statistics import Interval, paired_difference
from dsd.store import digest, write_json


def piece_results(
    examples: Sequence[MatchingExample],
    metrics: Mapping[str, Mapping[str, Interval]],
    ranks: Mapping[str, Sequence[int]],
) -> dict[str, Any]:
    """What is stored of a variant on a dataset, by method: the metrics, and the ranks for paired tests."""
    return {
        "examples": ids(examples),
        "metrics": {method: {m: v.as_dict() for m, v in row.items()} for method, row in metrics.items()},
        "ranks": {method: " ".join(map(str, row)) for method, row in ranks.items()},  # one line each
    }


def ids(examples: Sequence[MatchingExample]) -> str:
    return digest([example.id for example in examples])


def read_study(file: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The stored results of a study, variant → dataset → keys and `piece_results`; empty where it was not run."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def compare_variants(
    file: Path, row: StudyParams, data: Mapping[str, DatasetHits], evaluate: EvaluateParams, seed: int
) -> dict[str, Any]:
    """Compare the stored variants of a study with the methods as params.yaml has them.

    Args:
        data: hits of the methods of params.yaml on the test examples, by dataset.

    Returns: variant → dataset → `params` (the key that it was run under) and `methods`: method → metric → value, low,
        high, n and, on the same test examples, `difference` (value, low, high, p, n) from the method of params.yaml.
    """
    study, results = read_study(file), dict[str, Any]()
    for variant, dataset in ((v, d) for v in row.variants for d in row.datasets):
        piece, answers = study.get(variant, {}).get(dataset), data[dataset]
        if piece is None or set(piece["ranks"]) != set(row.methods):  # not run, or when the study had other methods
            continue
        metrics = {method: {m: dict(v) for m, v in by_metric.items()} for method, by_metric in piece["metrics"].items()}
        if piece["examples"] == ids(answers.examples):
            clusters = [example.cluster for example in answers.examples]
            for method, ranks in piece["ranks"].items():
                hits = hits_of(answers.kind, answers.examples, np.array(ranks.split(), dtype=int))
                for metric, (hits_n, groups) in hits.items():
                    base_n, _ = answers.methods[method][metric]
                    difference = paired_difference(hits_n, base_n, clusters, groups, **evaluate.model_dump(), seed=seed)
                    metrics[method][metric]["difference"] = difference.as_dict()
        results.setdefault(variant, {})[dataset] = {"params": piece["params"], "methods": metrics}
    return results


def write_studies(results: Mapping[str, Any], target: Path) -> None:
    """Write `studies.json`: study → results of `compare_variants`."""
    write_json(target / "studies.json", results)
