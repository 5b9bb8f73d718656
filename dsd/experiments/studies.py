"""Studies (`make studies`): train and score the methods again for each variant of params.yaml.

A piece is one variant on one dataset.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dsd.config import Params
from dsd.datasets import benchmark
from dsd.datasets.preparation import prepare
from dsd.engine.cache import encode
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.evaluation.evaluate import ScoredSplit, hits_of, intervals, ranked
from dsd.experiments.study_results import piece_results, read_study
from dsd.experiments.variants import Study
from dsd.models.checkpoint import locate
from dsd.store import check_libraries, digest, libraries, write_json
from dsd.training.loop import train, trainings


def evaluate_variant(name: str, split: str, params: Params, data: Path, folder: Path) -> dict[str, Any]:
    """Download, prepare, encode, train, score and evaluate dataset `name` under the params of a variant; resumable.

    Args:
        data: the folder that variants of the same data share.
        folder: the variant's own.
    """
    row = params.datasets[name]
    raw, prepared, cached = (data / part for part in ("download", "prepare", "cache"))
    trained, scored = folder / "train", folder / "score"
    if not (prepared / "summary.json").exists():
        benchmark(row.kind).download(row, seed=params.seed, folder=raw, workers=params.runtime.workers)
        prepare(name, row, raw, prepared, images=params.images, seed=params.seed, workers=params.runtime.workers)
        shutil.rmtree(raw)
    session = Session(name, params, Folders(prepared, cached, trained))
    encode(session)
    for training in trainings(params):
        list(train(session, training))
    score(session, scored, split=split)
    evaluated = ScoredSplit.of(name, params, prepared, scored, split)
    ranks = {method: ranked(evaluated.examples, evaluated.tables(method)) for method in params.methods}
    hits = {method: hits_of(row.kind, evaluated.examples, ranks_n) for method, ranks_n in ranks.items()}
    metrics = {
        m: intervals(evaluated.examples, by_metric, params.evaluate, params.seed) for m, by_metric in hits.items()
    }
    return piece_results(evaluated.examples, metrics, {method: ranks_n.tolist() for method, ranks_n in ranks.items()})


def piece_keys(study: Study, variant: str, dataset: str) -> dict[str, str]:
    """Return digests of all inputs of a piece's ranks."""
    params = study.variant(variant, dataset)
    backbones = {params.backbone_of(method) for method in params.methods}
    models = sorted(locate(params.backbones[backbone])[1] for backbone in backbones)
    return {"params": study.key(variant, dataset), "models": digest(models)}


def missing_pieces(study: Study, target: Path) -> list[tuple[str, str]]:
    """The (variant, dataset) that were not run yet, or were run under other params or models."""
    results = read_study(target / f"{study.name}.json")

    def done(variant: str, dataset: str) -> bool:
        piece, keys = results.get(variant, {}).get(dataset), piece_keys(study, variant, dataset)
        if piece is None or any(piece[part] != value for part, value in keys.items()):
            return False
        check_libraries(target / f"{study.name}.json", piece.get("libraries", {}), "remove it, then `make studies`")
        return True

    pieces = [(variant, dataset) for variant in study.row.variants for dataset in study.row.datasets]
    return [piece for piece in pieces if not done(*piece)]


def run_piece(study: Study, variant: str, dataset: str, target: Path, work: Path) -> None:
    """Run one piece of a study and add it to `<study>.json`: variant → dataset → `piece_keys` and `piece_results`.

    Args:
        work: the study's folder; the piece's own folder in it is removed, shared data stays.
    """
    row, file = study.row, target / f"{study.name}.json"
    params, keys = study.variant(variant, dataset), piece_keys(study, variant, dataset)
    data = work / digest(params.datasets, params.images, params.seed)[:16]
    folder = work / digest(keys)[:16]
    piece = evaluate_variant(dataset, row.split, params, data, folder)
    results = read_study(file)
    results.setdefault(variant, {})[dataset] = {**keys, "libraries": libraries(), **piece}
    ordered = {v: {d: results[v][d] for d in row.datasets if d in results[v]} for v in row.variants if v in results}
    write_json(file, ordered)
    shutil.rmtree(folder)
