"""The results as matrices of methods × metrics, and the paired difference of every method from every other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from dsd.report.inputs import DatasetResults
from dsd.report.tables import NONE, bounds, count, interval, p_value, percent, points
from dsd.statistics import Difference, Interval, Resampling, paired_difference

# dataset → reference → method → metric → method minus reference
Differences = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Difference]]]]


def verdict_on(difference: Difference) -> str:
    """How a compares with b, by the interval of a − b."""
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "no difference shown"


def differences(datasets: Sequence[DatasetResults], resampling: Resampling) -> Differences:
    """Of all ordered pairs of methods, with the clusters and resamples of the metrics' own intervals."""
    return {dataset.name: _differences(dataset, resampling) for dataset in datasets}


def _differences(dataset: DatasetResults, resampling: Resampling) -> dict[str, dict[str, dict[str, Difference]]]:
    clusters = [example.cluster for example in dataset.examples]
    pairs: dict[str, dict[str, dict[str, Difference]]] = {method: {} for method in dataset.methods}
    for a, b in combinations(dataset.methods, 2):
        rows = {
            metric: paired_difference(hits_n, dataset.hits[b][metric][0], clusters, groups, **resampling)
            for metric, (hits_n, groups) in dataset.hits[a].items()
            if metric in dataset.metrics
        }
        pairs[b][a] = rows
        pairs[a][b] = {m: Difference(-d.value, -d.high, -d.low, d.p, d.n) for m, d in rows.items()}
    return pairs


def leaders(dataset: DatasetResults, differences: Differences) -> list[str]:
    """The best method by the headline metric, then those that it is not shown to outperform."""
    best = dataset.best(dataset.methods)
    others = {m: differences[dataset.name][m][best][dataset.headline] for m in dataset.methods if m != best}
    ranked = sorted(others, key=lambda method: -dataset.results[method][dataset.headline].value)
    return [best, *(method for method in ranked if verdict_on(others[method]) != "higher")]


@dataclass(frozen=True)
class Gap:
    """A paired difference in words; sign: ▲ or ▼ if its interval excludes zero."""

    text: str
    interval: str
    p: str
    sign: str


def gap(difference: Difference | None) -> Gap:
    if difference is None:
        return Gap(NONE, "", "", "")
    sign = {"higher": "▲", "lower": "▼"}.get(verdict_on(difference), "")
    d = difference
    return Gap(points(d.value), bounds(d.low, d.high), p_value(d.p), sign)


@dataclass(frozen=True)
class Entry:
    """One cell: a value with its interval, and its difference from the reference that is shown first."""

    value: float
    text: str
    interval: str
    best: bool
    gap: Gap | None


@dataclass(frozen=True)
class Line:
    method: str
    model: str
    entries: list[Entry | None]


@dataclass(frozen=True)
class Head:
    dataset: str
    metric: str
    n: str
    chance: str
    blind: str
    blind_interval: str


@dataclass(frozen=True)
class Matrix:
    """Methods × metrics. gaps: reference → method → column → gap; None where one of the two has no result."""

    name: str
    caption: str
    reference: str
    heads: list[Head]
    lines: list[Line]
    gaps: dict[str, dict[str, list[Gap | None]]]


def matrix(
    name: str,
    caption: str,
    columns: Sequence[tuple[DatasetResults, str]],
    models: Mapping[str, str],
    reference: str,
    differences: Differences,
) -> Matrix:
    """The matrix of the metrics `columns`; `models`: method → the backbone that it uses."""
    methods = [method for method in models if any(method in d.results for d, _ in columns)]
    best = {(d.name, metric): d.results[d.best(d.methods, metric)][metric].value for d, metric in columns}

    def gaps(of: str) -> dict[str, list[Gap | None]]:
        rows = {m: [differences[d.name].get(of, {}).get(m, {}).get(metric) for d, metric in columns] for m in methods}
        return {method: [gap(d) if d else None for d in row] for method, row in rows.items()}

    every = {of: gaps(of) for of in methods}

    def entry(method: str, column: int, dataset: DatasetResults, metric: str) -> Entry | None:
        if method not in dataset.results:
            return None
        value = dataset.results[method][metric]
        first = every[reference][method][column]
        return Entry(
            value.value, percent(value.value), interval(value), value.value == best[dataset.name, metric], first
        )

    lines = [Line(m, models[m], [entry(m, n, *column) for n, column in enumerate(columns)]) for m in methods]
    return Matrix(name, caption, reference, [_head(*column) for column in columns], lines, every)


def metrics_shown(dataset: DatasetResults) -> list[str]:
    """The metrics, without the micro average where it is the macro average for every method."""
    return [metric for metric in dataset.metrics if not (metric == "micro" and _balanced(dataset))]


def _balanced(dataset: DatasetResults) -> bool:
    """Whether micro and macro average are the same number with the same interval, as with equally many examples."""
    rows = dataset.results.values()
    return {"micro", "macro"} <= set(dataset.metrics) and all(
        (percent(row["micro"].value), interval(row["micro"])) == (percent(row["macro"].value), interval(row["macro"]))
        for row in rows
    )


def _head(dataset: DatasetResults, metric: str) -> Head:
    blind: Interval = dataset.blind.metrics[metric]
    n = count(next(iter(dataset.results.values()))[metric].n)
    label = f"{metric} (= micro)" if metric == "macro" and _balanced(dataset) else metric
    return Head(dataset.name, label, n, percent(dataset.chance[metric]), percent(blind.value), interval(blind))
