"""What a study asks and what it found: params with keys changed, and how far their results are from those without.

The study itself, which trains and scores, is `dsd.experiments.studies`; nothing here runs a model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from pydantic_core import to_jsonable_python

from dsd.config import Params, mistake
from dsd.data.examples import MatchingExample
from dsd.errors import ParamsError, unknown
from dsd.evaluation.claims import Answers
from dsd.evaluation.evaluate import hits_of, intervals
from dsd.metrics import Hits
from dsd.statistics import Difference, paired_difference
from dsd.store import digest, write_atomic
from dsd.versions import versioned

Findings = dict[str, dict[str, dict[str, Any]]]  # variant → dataset → what `answered` makes


def changed(params: Params, study: str, dataset: str, variant: str) -> Params:
    """The params of a variant: the dataset alone, the methods of the study, and the keys that the variant changes.

    A key is a path such as `prompt.rank`; `dataset.` at its beginning stands for the row of the dataset.

    Raises:
        ParamsError: a key that is not there or a value that it cannot have; one line.
    """
    content: dict[str, Any] = params.model_dump(mode="json")
    _change(content, params, study, dataset, variant)
    try:
        whole = Params.model_validate(content)
    except ValidationError as error:
        raise ParamsError(mistake(error.errors()[0], f"studies.{study}.variants.{variant}")) from None
    methods = params.studies[study].methods
    return whole.model_copy(
        update={
            "datasets": {dataset: whole.datasets[dataset]},
            "methods": {name: whole.methods[name] for name in methods},
            "training": {name: row for name, row in whole.training.items() if name in methods},
        }
    )


def _change(content: dict[str, Any], params: Params, study: str, dataset: str, variant: str) -> None:
    for key, value in params.studies[study].variants[variant].items():
        *path, last = key.replace("dataset.", f"datasets.{dataset}.", 1).split(".")
        node = content
        for part in [*path, last]:
            if not isinstance(node, dict) or part not in node:
                choices = list(node) if isinstance(node, dict) else []
                raise ParamsError(f"studies.{study}.variants.{variant}.{key}: {unknown('key', part, choices)}")
            inner, node = node, node[part]
        inner[last] = value


def params_key(params: Params, study: str, dataset: str, variant: str) -> str:
    """The digest of all params that the ranks of a variant depend on."""
    content = _ranked_by(params)
    _change(content, params, study, dataset, variant)
    methods = params.studies[study].methods
    content["datasets"] = content["datasets"][dataset]
    for section in ("methods", "training"):
        content[section] = {name: row for name, row in content[section].items() if name in methods}
    return versioned("studies", digest(content))


def _ranked_by(params: Params) -> dict[str, Any]:
    """The sections that scores and ranks depend on."""
    sections = {
        "seed": params.seed,
        "backbone": params.backbone,
        "backbones": params.backbones,
        "images": params.images,
        "datasets": params.datasets,
        "noise": params.noise,
        "evidence": params.evidence,
        "prompt": params.prompt,
        "context": params.context,
        "training": params.training,
        "methods": params.methods,
        "fusion": params.fusion,
    }
    return dict(to_jsonable_python(sections))


def in_force(params: Params, study: str, variant: str) -> bool:
    """Whether a variant changes nothing: params.yaml has its values, on every dataset."""
    for dataset in params.studies[study].datasets:
        before, after = _ranked_by(params), _ranked_by(params)
        _change(after, params, study, dataset, variant)
        if before != after:
            return False
    return True


def answered(
    params: Params, kind: str, examples: Sequence[MatchingExample], ranks: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """What a study keeps of a variant on a dataset: every metric with its interval, and the ranks for paired tests."""
    hits = {method: hits_of(kind, examples, np.array(found)) for method, found in ranks.items()}
    metrics = {method: intervals(params, examples, found) for method, found in hits.items()}
    return {
        "examples": ids(examples),
        "metrics": {method: {m: v.as_dict() for m, v in found.items()} for method, found in metrics.items()},
        "ranks": {method: " ".join(map(str, found)) for method, found in ranks.items()},  # one line each
    }


def ids(examples: Sequence[MatchingExample]) -> str:
    return digest([example.id for example in examples])


def read(file: Path) -> Findings:
    """What a study has found so far; nothing where it was not run."""
    return dict(json.loads(file.read_text())) if file.exists() else {}


def compare(params: Params, study: str, folder: Path, data: Mapping[str, Answers]) -> dict[str, Any]:
    """What `<study>.json` in the folder tells: variant → dataset → `params` (the key that it was found under) and
    `methods`: method → metric → value, low, high, n and, on the same test examples, `difference` (value, low, high, p,
    n) from the method without the changes.

    Args:
        data: by dataset, how the methods without changes answered the test examples.
    """
    row, found = params.studies[study], read(folder / f"{study}.json")
    told: dict[str, Any] = {}
    for variant, dataset in ((v, d) for v in row.variants for d in row.datasets):
        entry, answers = found.get(variant, {}).get(dataset), data[dataset]
        if entry is None or set(entry["ranks"]) != set(row.methods):  # not run, or when the study had other methods
            continue
        metrics = {method: {m: dict(v) for m, v in of.items()} for method, of in entry["metrics"].items()}
        if entry["examples"] == ids(answers.examples):
            for method, ranks in entry["ranks"].items():
                hits = hits_of(answers.kind, answers.examples, np.array(ranks.split(), dtype=int))
                for metric, difference in _differences(params, answers, method, hits):
                    metrics[method][metric]["difference"] = difference.as_dict()
        told.setdefault(variant, {})[dataset] = {"params": entry["params"], "methods": metrics}
    return told


def _differences(
    params: Params, answers: Answers, method: str, hits: Mapping[str, Hits]
) -> Iterator[tuple[str, Difference]]:
    settings = dict(params.evaluate.model_dump(), seed=params.seed)
    clusters = [example.cluster for example in answers.examples]
    for metric, (hits_n, groups) in hits.items():
        base_n, _ = answers.methods[method][metric]
        yield metric, paired_difference(hits_n, base_n, clusters, groups, **settings)


def write(found: Mapping[str, Any], target: Path) -> None:
    """`studies.json`: study → what `compare` makes of it."""
    write_atomic(target / "studies.json", (json.dumps(found, indent=1) + "\n").encode())
