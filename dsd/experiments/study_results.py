"""The stored results of studies, and their differences from params.yaml. No model runs here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dsd.config import Params
from dsd.data.examples import MatchingExample
from dsd.evaluation.claims import PAPER, AtPaper, ByMetric, DatasetHits, Replicate, judge
from dsd.evaluation.evaluate import hits_of
from dsd.experiments.variants import REPLICATED, Identify, Study, method_key
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
    """Return the digest of the ids of the examples."""
    return digest([example.id for example in examples])


def read_study(file: Path) -> Stored:
    """The stored results of a study; empty where it was not run."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def stored_hits(stored: Mapping[str, Any], data: DatasetHits) -> ByMetric | None:
    """Return hits and groups of every metric from stored ranks, None if they are of other examples."""
    if stored["examples"] != ids(data.examples):
        return None
    return hits_of(data.kind, data.examples, np.array(stored["ranks"].split(), dtype=int))


def compare_variants(
    study: Study, content: Stored, data: Mapping[str, DatasetHits], identify: Identify
) -> dict[str, Any]:
    """Compare the stored variants of a study with the methods as params.yaml has them.

    Args:
        content: the stored results of the study.
        data: hits of the methods of params.yaml on the test examples, by dataset.

    Returns: variant → dataset → method → `current` (whether it was run under the variant's present params and models),
        `unchanged` (whether the variant is for this method what params.yaml is), `few_shot` (number of examples) and
        `metrics`: metric → value, low, high, n and, on the same test examples, `difference` (value, low, high, p, n)
        from the method of params.yaml.
    """
    results, params = dict[str, Any](), study.params
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


def keys_on_test(params: Params, dataset: str, identify: Identify) -> dict[str, str]:
    """Return the key of the ranks on the test split of each method without a schedule."""
    unscheduled = (method for method, row in params.methods.items() if not row.has_schedule)
    return {method: method_key(params, dataset, method, "test", identify) for method in unscheduled}


def hits_by_key(
    params: Params, dataset: str, data: DatasetHits, studies: Mapping[str, Stored], identify: Identify
) -> dict[str, ByMetric]:
    """Return hits by the key of their ranks: of the methods as params.yaml has them, and of all stored results."""
    hits = {key: data.methods[method] for method, key in keys_on_test(params, dataset, identify).items()}
    for stored in (s for study in studies.values() for by in study.values() for s in by.get(dataset, {}).values()):
        if stored["key"] not in hits and (of := stored_hits(stored, data)) is not None:
            hits[stored["key"]] = of
    return hits


def under(params: Params, dataset: str, hits: Mapping[str, ByMetric], identify: Identify) -> dict[str, ByMetric]:
    """Return the hits of each method that was measured under these params; a stale result has another key."""
    return {method: hits[key] for method, key in keys_on_test(params, dataset, identify).items() if key in hits}


def with_replicates(
    params: Params, data: Mapping[str, DatasetHits], studies: Mapping[str, Stored], identify: Identify
) -> dict[str, DatasetHits]:
    """Add the hits with the other few-shot samples and noise sets of all studies.

    Args:
        studies: the stored results by study. A checkpoint is identified only where they have some of a dataset.
    """
    measured = dict(data)
    for dataset, answers in data.items():
        grid = dict[tuple[int, int], dict[str, ByMetric]]()
        variants = [
            study.changed(variant, dataset)
            for study in (Study(name, params) for name in studies)
            for variant, changes in study.row.variants.items()
            if dataset in studies[study.name].get(variant, {}) and changes and set(changes) <= REPLICATED
        ]
        hits = hits_by_key(params, dataset, answers, studies, identify) if variants else {}
        for changed in variants:
            cell = changed.datasets[dataset].sample, changed.noise.sample
            grid.setdefault(cell, {}).update(under(changed, dataset, hits, identify))
        replicates = [Replicate(*cell, methods) for cell, methods in grid.items()]
        measured[dataset] = answers._replace(replicates=replicates)
    return measured


def judge_at_paper(
    params: Params, data: Mapping[str, DatasetHits], studies: Mapping[str, Stored], identify: Identify
) -> dict[str, AtPaper]:
    """Judge the claims with the paper's number of few-shot examples, for each variant of the study of that name.

    They are those about methods of the study, and methods without training, on the datasets of the study.
    """
    judged = {}
    for variant, by_dataset in studies.get(PAPER, {}).items():
        study, few_shot, fewer = Study(PAPER, params), dict[str, int](), dict[str, DatasetHits]()
        for dataset in (name for name in study.row.datasets if name in by_dataset and variant in study.row.variants):
            answers, by_method = data[dataset], by_dataset[dataset]
            hits = hits_by_key(params, dataset, answers, {PAPER: studies[PAPER]}, identify)
            methods = under(study.changed(variant, dataset), dataset, hits, identify)
            if shots := {by_method[method]["few_shot"] for method in methods if method in by_method}:
                [few_shot[dataset]] = shots
                fewer[dataset] = answers._replace(methods=methods, variants={}, replicates=())
        judgements, measured = judge(params, fewer)
        if judgements:
            judged[variant] = AtPaper(few_shot, judgements, measured)
    return judged


def write_studies(results: Mapping[str, Any], target: Path) -> None:
    """Write `studies.json`: study → results of `compare_variants`."""
    write_json(target / "studies.json", results)
