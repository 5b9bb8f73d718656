"""The stored results of studies, and their differences from params.yaml. No model runs here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsd.data.examples import MatchingExample
from dsd.evaluation.claims import DatasetHits
from dsd.evaluation.evaluate import hits_of
from dsd.experiments.variants import Identify, Study
from dsd.metrics import Hits
from dsd.statistics import Interval, paired_difference
from dsd.store import digest, write_json

Stored = dict[str, dict[str, dict[str, dict[str, Any]]]]  # variant → dataset → method → key and `method_results`


def method_results(
    examples: Sequence[MatchingExample], few_shot: int, metrics: Mapping[str, Interval], ranks: Sequence[int]
) -> dict[str, Any]:
    """What is stored of a method on a dataset under a variant: the metrics, and the ranks for paired tests.

    few_shot: number of examples of the few-shot split.
    """
    return {
        "examples": ids(examples),
        "few_shot": few_shot,
        "metrics": {metric: value.as_dict() for metric, value in metrics.items()},
        "ranks": " ".join(map(str, ranks)),  # one line
    }


def ids(examples: Sequence[MatchingExample]) -> str:
    return digest([example.id for example in examples])


def read_study(file: Path) -> Stored:
    """The stored results of a study; empty where it was not run."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def stored_hits(stored: Mapping[str, Any], data: DatasetHits) -> dict[str, Hits] | None:
    """Return hits and groups of every metric from stored ranks, None if they are of other examples."""
    if stored["examples"] != ids(data.examples):
        return None
    return hits_of(data.kind, data.examples, np.array(stored["ranks"].split(), dtype=int))


def compare_variants(study: Study, file: Path, data: Mapping[str, DatasetHits], identify: Identify) -> dict[str, Any]:
    """Compare the stored variants of a study with the methods as params.yaml has them.

    Args:
        file: the stored results of the study.
        data: hits of the methods of params.yaml on the test examples, by dataset.

    Returns: variant → dataset → method → `current` (whether it was run under the variant's present params and models),
        `unchanged` (whether the variant is for this method what params.yaml is), `few_shot` (number of examples) and
        `metrics`: metric → value, low, high, n and, on the same test examples, `difference` (value, low, high, p, n)
        from the method of params.yaml.
    """
    content, results, params = read_study(file), dict[str, Any](), study.params
    datasets = {dataset for by_dataset in content.values() for dataset in by_dataset}.intersection(study.row.datasets)
    keys = {dataset: study.keys(dataset, identify) for dataset in datasets}
    own = {dataset: study.own_keys(dataset, identify) for dataset in datasets}
    resampling = dict(params.evaluate.model_dump(), seed=params.seed)
    for variant, dataset in ((v, d) for v in study.row.variants for d in study.row.datasets):
        by_method, answers = content.get(variant, {}).get(dataset, {}), data[dataset]
        clusters = [example.cluster for example in answers.examples]
        for method in (method for method in study.row.methods if method in by_method):
            stored = by_method[method]
            metrics = {metric: dict(value) for metric, value in stored["metrics"].items()}
            for metric, (hits_n, groups) in (stored_hits(stored, answers) or {}).items():
                base_n, _ = answers.methods[method][metric]
                difference = paired_difference(hits_n, base_n, clusters, groups, **resampling)
                metrics[metric]["difference"] = difference.as_dict()
            key = keys[dataset][variant][method]
            results.setdefault(variant, {}).setdefault(dataset, {})[method] = {
                "current": stored["key"] == key,
                "unchanged": key == own[dataset][method],
                "few_shot": stored["few_shot"],
                "metrics": metrics,
            }
    return results


def write_studies(results: Mapping[str, Any], target: Path) -> None:
    """Write `studies.json`: study → results of `compare_variants`."""
    write_json(target / "studies.json", results)
