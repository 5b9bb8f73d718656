"""Read and check the parts of the data folder that the report shows.

Shapes: n test examples; I images, T texts of an example.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import TypeAdapter

from dsd.config import Params
from dsd.data.examples import MatchingExample, read_examples
from dsd.datasets import benchmark
from dsd.errors import DataError, unknown
from dsd.evaluation.ablations import Ablations
from dsd.evaluation.blind import FILE as BLIND
from dsd.evaluation.blind import Blind
from dsd.evaluation.claims import PAPER, Judgement
from dsd.evaluation.evaluate import forced_hits, hits_of, random_hits, ranked_hits
from dsd.metrics import FORCED, Hits
from dsd.schedules.replay import current_comparisons
from dsd.scorers.evidence import read_identities, read_index
from dsd.statistics import Interval

# In order of execution. The time of the report stage is unknown while the report is written.
STAGES = ("pretrain", "download", "prepare", "cache", "train", "score", "evaluate")
SPLITS = ("train", "validation", "test")
Timings = dict[str, dict[str, Any]]  # stage → its record in data/timings


class Claim(NamedTuple):
    number: str
    judgement: Judgement
    comparisons: list[dict[str, Any]]  # rows of comparisons.json


class ClaimsAtPaper(NamedTuple):
    few_shot: dict[str, int]  # dataset → few-shot examples
    claims: list[Claim]


@dataclass(frozen=True)
class DatasetResults:
    """One dataset and all results on it; methods are in the order of params.yaml."""

    name: str
    kind: str
    counts: dict[str, int]  # examples by split
    examples: list[MatchingExample]  # of the test split
    results: dict[str, dict[str, Interval]]  # method → metric → interval
    scores: dict[str, list[NDArray[np.float64]]]  # method → [I, T] of each example
    ranks: dict[str, NDArray[np.int64]]  # method → [n], counted from 1
    ablations: Ablations  # method → key → value → metric → interval
    curves: dict[str, dict[str, list[float]]]  # trained method → column of its training curve
    quarantine: list[dict[str, str]]
    indistinct: dict[str, str]  # examples left out, since two candidates are one: the reason
    summaries: dict[str, dict[str, Any]]  # stage → its counts; prepare, cache and score where recorded
    blind: Blind

    @property
    def methods(self) -> list[str]:
        return list(self.results)

    @property
    def metrics(self) -> list[str]:
        return list(next(iter(self.results.values())))

    def best(self, methods: Iterable[str], metric: str | None = None) -> str:
        """The method with the highest value of a metric, the headline metric by default; the first of equal ones."""
        return max(methods, key=lambda method: self.results[method][metric or self.headline].value)

    @property
    def headline(self) -> str:
        return benchmark(self.kind).headline

    @property
    def leading(self) -> list[str]:
        """The headline metric, and the forced one if there is one."""
        return [metric for metric in (self.headline, f"{FORCED} {self.headline}") if metric in self.metrics]

    @property
    def candidates(self) -> NDArray[np.int64]:
        """[n] number of (image, text) candidates per example."""
        return np.array([len(e.images) * len(e.texts) for e in self.examples])

    @property
    def two_by_two(self) -> bool:
        """Whether ranks encode text and image correctness; see `dsd.metrics.WINOGROUND_RANKS`."""
        return any(len(e.images) == len(e.texts) == 2 for e in self.examples)

    @cached_property
    def chance(self) -> dict[str, float]:
        """The expected value of each metric under random scores, that is with the candidates in random order."""
        equal = [np.zeros((len(e.images), len(e.texts))) for e in self.examples]
        expected = random_hits(self.kind, self.examples, equal)
        expected |= forced_hits(self.kind, self.examples, equal, random_hits)
        return {m: float(np.mean([hits_n[mask].mean() for mask in masks])) for m, (hits_n, masks) in expected.items()}

    @cached_property
    def hits(self) -> dict[str, dict[str, Hits]]:
        """Hits and groups of every metric by method."""
        kind, examples = self.kind, self.examples
        return {
            method: hits_of(kind, examples, self.ranks[method]) | forced_hits(kind, examples, scores, ranked_hits)
            for method, scores in self.scores.items()
        }


@contextmanager
def reading(path: Path, stage: str, content: str) -> Iterator[None]:
    """Turn the absence of a file that `stage` writes, or content other than described, into a DataError of one line."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; run the stage `{stage}`") from None
    except (AttributeError, KeyError, TypeError, ValueError):
        raise DataError(f"{path}: not {content}; run the stage `{stage}` again") from None


def read_json(path: Path, stage: str) -> Any:
    """The content of a JSON file that `stage` writes; raise DataError if it is missing or malformed."""
    with reading(path, stage, "JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


def read_datasets(params: Params, data: Path, timings: Timings) -> list[DatasetResults]:
    """Every dataset of the params, in their order; `timings` as returned by `read_timings`.

    Raises:
        DataError: an output of an earlier stage is missing, malformed, or was made with other params.
    """
    path = data / "evaluate" / "metrics.json"
    metrics = read_json(path, "evaluate")
    if set(metrics) != set(params.datasets):
        raise DataError(
            f"{path}: has {_listed(metrics)}, params.yaml {_listed(params.datasets)}; run the stage `evaluate` again"
        )
    results = {name: _results(path, name, metrics[name], list(params.methods)) for name in params.datasets}
    ablations = _ablations(data / "evaluate" / "ablations.json")
    baselines = _baselines(data / "evaluate" / BLIND, results)
    datasets = []
    for name, row in params.datasets.items():
        prepared = data / "prepare" / name
        file = prepared / "examples.parquet"
        with reading(file, "prepare", "examples"):
            examples = {split: read_examples(file, split) for split in SPLITS}
        indistinct = read_index(data / "score" / name)["indistinct"]
        examples["test"] = [example for example in examples["test"] if example.id not in indistinct]
        scores, ranks = _scores(data / "evaluate" / "scores" / f"{name}.parquet", list(results[name]), examples["test"])
        summaries = {"prepare": read_json(prepared / "summary.json", "prepare")}
        # Counts of one run are stored with its timing, not with its outputs, so that they make no later stage stale.
        for stage in ("cache", "score"):
            if stage in timings and name in timings[stage]["details"]:
                summaries[stage] = timings[stage]["details"][name]
        datasets.append(
            DatasetResults(
                name,
                row.kind,
                {split: len(rows) for split, rows in examples.items()},
                examples["test"],
                results[name],
                scores,
                ranks,
                ablations.get(name, {}),
                {m: _curve(data / "train" / name / m / "curve.csv") for m in params.trained if m in results[name]},
                read_json(prepared / "quarantine.json", "prepare"),
                indistinct,
                summaries,
                baselines[name],
            )
        )
    return datasets


def read_claims(data: Path) -> tuple[list[Claim], list[ClaimsAtPaper]]:
    """The judged claims and their comparisons, by number; and those at the paper's number of few-shot examples."""
    folder = data / "evaluate"
    claims, rows = (read_json(folder / f"{name}.json", "evaluate") for name in ("claims", "comparisons"))

    def judged(claims: Mapping[str, Any], rows: Mapping[str, Any]) -> list[Claim]:
        return [Claim(number, Judgement(**claim), rows[number]) for number, claim in claims.items()]

    with reading(folder / "claims.json", "evaluate", "judged claims"):
        paper, paper_rows = claims.pop(PAPER, {}), rows.pop(PAPER, {})
        return judged(claims, rows), [
            ClaimsAtPaper(at["few_shot"], judged(at["claims"], paper_rows[variant])) for variant, at in paper.items()
        ]


def read_races(datasets: Iterable[str], data: Path) -> dict[str, dict[str, Any]]:
    """The schedule comparisons by dataset and method; datasets without current results are absent."""
    identities = {name: read_identities(data / "score" / name) for name in datasets}
    races = {name: current_comparisons(data / "races" / f"{name}.json", identities[name]) for name in datasets}
    return {name: by_method for name, by_method in races.items() if by_method}


def read_timings(data: Path) -> Timings:
    """The records of data/timings by stage, in order of execution; stages without a record are absent."""
    paths = {stage: data / "timings" / f"{stage}.json" for stage in STAGES}
    timings = {stage: read_json(path, stage) for stage, path in paths.items() if path.exists()}
    for stage, record in timings.items():
        if not {"seconds", "finished", "device", "details"} <= set(record):
            raise DataError(f"{paths[stage]}: not the record of a stage; run the stage `{stage}` again")
    return timings


def _ablations(path: Path) -> dict[str, Ablations]:
    content = read_json(path, "evaluate")
    with reading(path, "evaluate", "intervals by dataset, method, key and value"):
        return TypeAdapter(dict[str, Ablations]).validate_python(content)


def _baselines(path: Path, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Blind]:
    """The blind baseline of each dataset, with a difference from every method of `results`."""
    content = read_json(path, "evaluate")
    with reading(path, "evaluate", "the blind baseline of every dataset and method"):
        baselines = TypeAdapter(dict[str, Blind]).validate_python(content)
        if any(methods.keys() - baselines[dataset].differences.keys() for dataset, methods in results.items()):
            raise ValueError
        return baselines


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "nothing"


def _results(path: Path, dataset: str, rows: dict[str, Any], methods: Sequence[str]) -> dict[str, dict[str, Interval]]:
    again = "run the stage `evaluate` again"
    for method in rows:
        if method not in methods:
            raise DataError(f"{path}: {dataset}: {unknown('method', method, methods)}; {again}")
    with reading(path, "evaluate", f"value, low, high and n of {dataset}"):
        results = {m: {k: Interval(**v) for k, v in rows[m].items()} for m in methods if m in rows}
    if not results or len({tuple(row) for row in results.values()}) != 1 or not all(results.values()):
        raise DataError(f"{path}: {dataset}: every method needs the same metrics; {again}")
    return results


def _scores(
    path: Path, methods: Sequence[str], examples: Sequence[MatchingExample]
) -> tuple[dict[str, list[NDArray[np.float64]]], dict[str, NDArray[np.int64]]]:
    """Scores and ranks by method, in the order of the examples."""
    shapes = [(len(e.images), len(e.texts)) for e in examples]
    with reading(path, "evaluate", "the scores of the test examples"):
        rows = {(row["method"], row["id"]): row for row in pq.read_table(path).to_pylist()}
        columns = {method: [rows[method, e.id] for e in examples] for method in methods}
        scores = {
            method: [np.array(row["scores"]).reshape(shape) for row, shape in zip(column, shapes, strict=True)]
            for method, column in columns.items()
        }
    return scores, {method: np.array([row["rank"] for row in column]) for method, column in columns.items()}


def _curve(path: Path) -> dict[str, list[float]]:
    with reading(path, "train", "a curve of step, loss and accuracy"), path.open(newline="") as file:
        rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in ("step", "loss", "accuracy")}
