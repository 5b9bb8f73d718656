"""Studies (`make studies`): train and score the methods again for each variant of params.yaml.

A piece is one variant on one dataset.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from dsd.config import Params
from dsd.datasets import benchmark
from dsd.datasets.preparation import prepare
from dsd.engine.cache import encode
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.evaluation.evaluate import ScoredSplit, hits_of, intervals, ranked
from dsd.experiments.study_results import method_results, read_study
from dsd.experiments.variants import Study
from dsd.models.checkpoint import identify
from dsd.store import check_libraries, digest, libraries, write_json
from dsd.training.loop import train, trainings


def evaluate_variant(
    name: str, split: str, params: Params, methods: Sequence[str], data: Path, trained: Path
) -> dict[str, Any]:
    """Download, prepare, encode, train, score and evaluate dataset `name` under the params of a variant; resumable.

    Args:
        methods: those to return the results of.
        data: the folder that variants of the same data share, with what was trained and scored on it last.
        trained: the dataset's folder of the stage `train`; what it has of the same key is not trained again.

    Returns: method → `method_results`.
    """
    row = params.datasets[name]
    raw, prepared, cached, own, scored = (data / part for part in ("download", "prepare", "cache", "train", "score"))
    if not (prepared / "summary.json").exists():
        benchmark(row.kind).download(row, seed=params.seed, folder=raw, workers=params.runtime.workers)
        prepare(name, row, raw, prepared, images=params.images, seed=params.seed, workers=params.runtime.workers)
        shutil.rmtree(raw)
    if trained.exists() and not own.exists():
        shutil.copytree(trained, own)
    session = Session(name, params, Folders(prepared, cached, own))
    encode(session)
    for training in trainings(params):
        list(train(session, training))
    score(session, scored, split=split)
    evaluated = ScoredSplit.of(name, params, prepared, scored, split)
    results = {}
    for method in methods:
        ranks = ranked(evaluated.examples, evaluated.tables(method))
        hits = hits_of(row.kind, evaluated.examples, ranks)
        metrics = intervals(evaluated.examples, hits, params.evaluate, params.seed)
        results[method] = method_results(evaluated.examples, len(session.examples("train")), metrics, ranks.tolist())
    return results


def missing_pieces(study: Study, target: Path) -> dict[tuple[str, str], list[str]]:
    """Return, by (variant, dataset), the methods that were not run yet, or were run under other params or models."""
    file, known = target / f"{study.name}.json", cache(identify)
    results = read_study(file)

    def done(stored: dict[str, Any] | None, key: str) -> bool:
        if stored is None or stored["key"] != key:
            return False
        check_libraries(file, stored["libraries"], "remove it, then `make studies`")
        return True

    pieces = dict[tuple[str, str], list[str]]()
    for dataset in study.row.datasets:
        for variant, keys in study.pieces(dataset, known).items():
            stored = results.get(variant, {}).get(dataset, {})
            if methods := [method for method, key in keys.items() if not done(stored.get(method), key)]:
                pieces[variant, dataset] = methods
    return pieces


def run_piece(
    study: Study, variant: str, dataset: str, methods: Sequence[str], target: Path, work: Path, trained: Path
) -> None:
    """Run methods of a piece and add them to `<study>.json`: variant → dataset → method → key and `method_results`.

    Args:
        work: the study's folder, where variants of the same data share what is equal.
        trained: the folder of the stage `train`.
    """
    row, file = study.row, target / f"{study.name}.json"
    params, keys = study.variant(variant, dataset, methods), study.keys(dataset, cache(identify))[variant]
    data = work / digest(params.datasets, params.images, params.seed)[:16]
    piece = evaluate_variant(dataset, row.split, params, methods, data, trained / dataset)
    results = read_study(file)
    stored = results.setdefault(variant, {}).setdefault(dataset, {})
    stored |= {m: {"key": keys[m], "libraries": libraries(), **piece[m]} for m in methods}
    results[variant][dataset] = {method: stored[method] for method in row.methods if method in stored}
    ordered = {v: {d: results[v][d] for d in row.datasets if d in results[v]} for v in row.variants if v in results}
    write_json(file, ordered)
