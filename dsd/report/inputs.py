"""What the report is made of: the data folder, read and checked.

Shapes: n test examples; I images, T texts of an example.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsd.config import DatasetParams, Params, trained
from dsd.data.examples import MatchingExample, read_examples
from dsd.datasets import benchmark
from dsd.errors import DataError, unknown
from dsd.evaluation.ablations import Ablations
from dsd.evaluation.claims import Judgement
from dsd.experiments.scaling import read_scaling
from dsd.metrics import HEADLINES, METRICS, Hits
from dsd.schedules.replay import read_comparisons
from dsd.statistics import Interval

# In the order in which they run. The report's own time is not known while it is written.
STAGES = ("pretrain", "download", "prepare", "cache", "train", "score", "evaluate")
SPLITS = ("train", "validation", "test")
Timings = dict[str, dict[str, Any]]  # stage → its record in data/timings
Claims = list[tuple[str, Judgement, list[dict[str, Any]]]]  # number, judgement, rows of comparisons.json


@dataclass(frozen=True)
class Dataset:
    """One benchmark with everything that was found out about it; methods are in the order of params.yaml."""

    name: str
    kind: str
    citation: str
    counts: dict[str, int]  # examples by split
    examples: list[MatchingExample]  # of the test split
    results: dict[str, dict[str, Interval]]  # method → metric → interval
    scores: dict[str, list[NDArray[np.float64]]]  # method → [I, T] of each example
    ranks: dict[str, NDArray[np.int64]]  # method → [n], 1 is right
    ablations: Ablations  # method → key → value → metric → interval
    curves: dict[str, dict[str, list[float]]]  # of each method that learns: its training by step
    quarantine: list[dict[str, str]]
    summaries: dict[str, dict[str, Any]]  # what prepare, cache and score counted; a stage that told nothing is absent

    @property
    def methods(self) -> list[str]:
        return list(self.results)

    @property
    def metrics(self) -> list[str]:
        return list(next(iter(self.results.values())))

    @property
    def headline(self) -> str:
        return HEADLINES[benchmark(self.kind).metrics]

    @property
    def candidates(self) -> NDArray[np.int64]:
        """[n] how many (image, text) candidates each example has."""
        return np.array([len(e.images) * len(e.texts) for e in self.examples])

    @property
    def squares(self) -> bool:
        """Whether an example's rank says which of its two pairs are right; see `dsd.metrics.SQUARE`."""
        return any(len(e.answer) == 2 for e in self.examples)

    def hits(self, ranks: NDArray[np.int64]) -> dict[str, Hits]:
        """Hits and groups of every metric at the given ranks [n]."""
        return METRICS[benchmark(self.kind).metrics](ranks, [e.category for e in self.examples])


def read_json(path: Path, stage: str) -> Any:
    """The content of a JSON file that `stage` writes; DataError, in one line, where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the stage `{stage}`") from None
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); run the stage `{stage}` again") from None


def read_datasets(params: Params, data: Path, timings: Timings) -> list[Dataset]:
    """Every dataset of the params, in their order; `timings` are those of `read_timings`.

    Raises:
        DataError: something that the stages before must have left is missing, broken, or of other params.
    """
    path = data / "evaluate" / "metrics.json"
    metrics = read_json(path, "evaluate")
    if set(metrics) != set(params.datasets):
        raise DataError(
            f"{path}: holds {_listed(metrics)}, params.yaml has {_listed(params.datasets)}; "
            "run the stage `evaluate` again"
        )
    results = {name: _results(path, name, metrics[name], params) for name in params.datasets}
    ablations = _ablations(data / "evaluate" / "ablations.json")
    return [_dataset(name, params, data, timings, results[name], ablations.get(name, {})) for name in params.datasets]


def read_claims(data: Path) -> Claims:
    """The judged claims and what each rests on, by number."""
    folder = data / "evaluate"
    claims, rows = (read_json(folder / f"{name}.json", "evaluate") for name in ("claims", "comparisons"))
    try:
        return [(number, Judgement(**claim), rows[number]) for number, claim in claims.items()]
    except (KeyError, TypeError):
        raise DataError(f"{folder / 'claims.json'}: not judged claims; run the stage `evaluate` again") from None


def read_studies(data: Path) -> dict[str, Any]:
    """What dsd.experiments.study_results.compare_variants tells of each study."""
    return dict(read_json(data / "evaluate" / "studies.json", "evaluate"))


def read_races(params: Params, data: Path) -> dict[str, dict[str, Any]]:
    """The schedule comparisons by dataset and method; a dataset without one is absent."""
    found = {name: read_comparisons(data / "races" / f"{name}.json") for name in params.races.datasets}
    return {name: told for name, told in found.items() if told}


def read_growth(data: Path) -> list[dict[str, Any]]:
    """What `dsd.experiments.scaling` has told; nothing where it was not run."""
    return list(read_scaling(data / "races").get("rows", []))


def _ablations(path: Path) -> dict[str, Ablations]:
    found = read_json(path, "evaluate")
    try:
        return {
            dataset: {
                method: {
                    key: {value: {m: Interval(**v) for m, v in row.items()} for value, row in by_value.items()}
                    for key, by_value in by_key.items()
                }
                for method, by_key in by_method.items()
            }
            for dataset, by_method in found.items()
        }
    except (AttributeError, TypeError):
        raise DataError(
            f"{path}: not intervals by dataset, method, key and value; run the stage `evaluate` again"
        ) from None


def read_timings(data: Path) -> Timings:
    """data/timings by stage, in the order of the stages; one that has left no timing is absent."""
    paths = {stage: data / "timings" / f"{stage}.json" for stage in STAGES}
    found = {stage: read_json(path, stage) for stage, path in paths.items() if path.exists()}
    for stage, record in found.items():
        if not {"seconds", "finished", "device", "details"} <= set(record):
            raise DataError(f"{paths[stage]}: not the record of a stage; run the stage `{stage}` again")
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _results(path: Path, name: str, rows: dict[str, Any], params: Params) -> dict[str, dict[str, Interval]]:
    for method in rows:
        if method not in params.methods:
            raise DataError(
                f"{path}: {name}: {unknown('method', method, params.methods)}; run the stage `evaluate` again"
            )
    try:
        found = {m: {k: Interval(**v) for k, v in rows[m].items()} for m in params.methods if m in rows}
    except (TypeError, AttributeError):
        raise DataError(
            f"{path}: {name}: an entry is not {{value, low, high, n}}; run the stage `evaluate` again"
        ) from None
    if not found or len({tuple(row) for row in found.values()}) != 1 or not all(found.values()):
        raise DataError(f"{path}: {name}: every method needs the same metrics; run the stage `evaluate` again")
    return found


def _dataset(
    name: str,
    params: Params,
    data: Path,
    timings: Timings,
    results: dict[str, dict[str, Interval]],
    ablations: Ablations,
) -> Dataset:
    row: DatasetParams = params.datasets[name]
    prepared = data / "prepare" / name
    path = prepared / "examples.parquet"
    if not path.exists():
        raise DataError(f"{path}: no such file; run the stage `prepare`")
    by_split = {split: read_examples(path, split) for split in SPLITS}
    scores, ranks = _scores(data / "evaluate" / "scores" / f"{name}.parquet", list(results), by_split["test"])
    summaries = {"prepare": read_json(prepared / "summary.json", "prepare")}
    # What a run did, rather than what it made, stands beside its timing: it must make no later stage stale.
    for stage in ("cache", "score"):
        if stage in timings and name in timings[stage]["details"]:
            summaries[stage] = timings[stage]["details"][name]
    return Dataset(
        name,
        row.kind,
        benchmark(row.kind).citation,
        {split: len(examples) for split, examples in by_split.items()},
        by_split["test"],
        results,
        scores,
        ranks,
        ablations,
        {m: _curve(data / "train" / name / m / "curve.csv") for m in trained(params) if m in results},
        read_json(prepared / "quarantine.json", "prepare"),
        summaries,
    )


def _scores(
    path: Path, methods: Sequence[str], examples: Sequence[MatchingExample]
) -> tuple[dict[str, list[NDArray[np.float64]]], dict[str, NDArray[np.int64]]]:
    """Scores and ranks by method, in the order of the examples."""
    if not path.exists():
        raise DataError(f"{path}: no such file; run the stage `evaluate`")
    rows = {(row["method"], row["id"]): row for row in pq.read_table(path).to_pylist()}
    shapes = [(len(e.images), len(e.texts)) for e in examples]
    try:
        found = {method: [rows[method, e.id] for e in examples] for method in methods}
        scores = {
            method: [np.array(row["scores"]).reshape(shape) for row, shape in zip(column, shapes, strict=True)]
            for method, column in found.items()
        }
    except (KeyError, ValueError):
        raise DataError(f"{path}: not the scores of the test examples; run the stage `evaluate` again") from None
    return scores, {method: np.array([row["rank"] for row in column]) for method, column in found.items()}


def _curve(path: Path) -> dict[str, list[float]]:
    if not path.exists():
        raise DataError(f"{path}: no such file; run the stage `train`")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return {name: [float(row[name]) for row in rows] for name in ("step", "loss", "accuracy")}
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{path}: not a curve of step, loss and accuracy; run the stage `train` again") from None
