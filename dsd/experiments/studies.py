"""What takes too long for every run: methods trained and scored anew with keys of params.yaml changed, by variant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from dsd.config import Params, backbone_of
from dsd.data.examples import read_examples
from dsd.datasets import benchmark
from dsd.datasets.preparation import prepare
from dsd.engine.encodings import encode
from dsd.engine.score import score
from dsd.evaluation.evaluate import method_scores, ranked, tables
from dsd.experiments import variants
from dsd.models.checkpoint import locate
from dsd.store import digest, write_atomic
from dsd.training.loop import train


def answer(name: str, split: str, params: Params, data: Path, folder: Path) -> dict[str, Any]:
    """The whole way of dataset `name` from nothing to metrics on a split; goes on where it was stopped.

    Args:
        data: a folder for what variants of the same data share.
        folder: one for what is this variant's own.
    """
    row = params.datasets[name]
    raw, prepared, cached = (data / part for part in ("download", "prepare", "cache"))
    trained, scored = folder / "train", folder / "score"
    if not (prepared / "summary.json").exists():
        benchmark(row.kind).download(row, seed=params.seed, folder=raw, workers=params.runtime.workers)
        prepare(name, row, raw, prepared, images=params.images, seed=params.seed, workers=params.runtime.workers)
        shutil.rmtree(raw)
    encode(name, params, prepared, cached)
    for method in params.training:
        list(train(name, method, params, prepared, cached, trained / method))
    score(name, params, prepared, cached, trained, scored, split=split)
    examples = read_examples(prepared / "examples.parquet", split)
    ranks = {
        method: ranked(examples, tables(examples, scores)).tolist()
        for method, scores in method_scores(name, params, examples, prepared, scored)
    }
    return variants.answered(params, row.kind, examples, ranks)


def keys(name: str, variant: str, dataset: str, params: Params) -> dict[str, str]:
    """The digests of all that the ranks of one piece of a study depend on, but for the code."""
    of_variant = variants.changed(params, name, dataset, variant)
    backbones = {backbone_of(of_variant, method) for method in of_variant.methods}
    models = sorted(locate(of_variant.backbones[backbone])[1] for backbone in backbones)
    return {"params": variants.params_key(params, name, dataset, variant), "models": digest(models)}


def missing(name: str, params: Params, target: Path) -> list[tuple[str, str]]:
    """The (variant, dataset) that study `name` has not run yet, or ran under other params or models."""
    row, found = params.studies[name], variants.read(target / f"{name}.json")
    asked = [(variant, dataset) for variant in row.variants for dataset in row.datasets]

    def done(variant: str, dataset: str) -> bool:
        entry, wanted = found.get(variant, {}).get(dataset), keys(name, variant, dataset, params)
        return entry is not None and all(entry[part] == value for part, value in wanted.items())

    return [piece for piece in asked if not done(*piece)]


def run(name: str, variant: str, dataset: str, params: Params, target: Path, work: Path) -> None:
    """Runs one piece of study `name` and adds it to `<name>.json`: variant → dataset → what was found.

    Args:
        work: a folder of this study's own; what the piece leaves there is removed once it is done.
    """
    row, file = params.studies[name], target / f"{name}.json"
    of_variant = variants.changed(params, name, dataset, variant)
    wanted = keys(name, variant, dataset, params)
    data = work / digest(of_variant.datasets, of_variant.images, of_variant.seed)[:16]
    folder = work / digest(wanted)[:16]
    result = answer(dataset, row.split, of_variant, data, folder)
    found = variants.read(file)
    found.setdefault(variant, {})[dataset] = {**wanted, **result}
    ordered = {v: {d: found[v][d] for d in row.datasets if d in found[v]} for v in row.variants if v in found}
    write_atomic(file, (json.dumps(ordered, indent=1) + "\n").encode())
    shutil.rmtree(folder)
