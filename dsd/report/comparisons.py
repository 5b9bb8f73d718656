"""Paired comparisons of methods on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsd.report.inputs import DatasetResults
from dsd.report.tables import Cell, Row, Table, count, p_value, points_cell
from dsd.statistics import Difference, Resampling, paired_difference


def verdict_on(difference: Difference) -> str:
    """How a compares with b, by the interval of a − b."""
    if difference.low > 0:
        return "higher"
    return "lower" if difference.high < 0 else "no difference shown"


@dataclass(frozen=True)
class Comparison:
    """One metric on one dataset: method a minus method b on the same examples."""

    dataset: str
    metric: str
    difference: Difference
    overlap: bool  # whether the intervals of the two methods overlap

    @property
    def verdict(self) -> str:
        return verdict_on(self.difference)


ByOpponent = Mapping[str, Sequence[Comparison]]  # comparisons of one method with each opponent, over all datasets


def compare(
    dataset: DatasetResults, a: str, b: str, metrics: Sequence[str], resampling: Resampling
) -> list[Comparison]:
    """a − b on metrics of the dataset, with the clusters and resamples of the metrics' own intervals."""
    clusters = [example.cluster for example in dataset.examples]
    hits_a, hits_b = dataset.hits[a], dataset.hits[b]
    rows = []
    for metric in metrics:
        hits_n, groups = hits_a[metric]
        difference = paired_difference(hits_n, hits_b[metric][0], clusters, groups, **resampling)
        one, other = dataset.results[a][metric], dataset.results[b][metric]
        rows.append(Comparison(dataset.name, metric, difference, one.low <= other.high and other.low <= one.high))
    return rows


def compare_all(
    method: str, first: str | None, datasets: Sequence[DatasetResults], resampling: Resampling
) -> dict[str, list[Comparison]]:
    """A method against every other, `first` first, on all datasets with results of both."""
    rows: dict[str, list[Comparison]] = {}
    for dataset in datasets:
        others = [other for other in dataset.methods if other != method] if method in dataset.results else []
        for other in sorted(others, key=lambda other: other != first):
            rows.setdefault(other, []).extend(compare(dataset, method, other, dataset.metrics, resampling))
    return rows


def table(a: str, b: str, comparisons: Sequence[Comparison]) -> Table:
    rows = [
        Row(
            c.dataset,
            [
                Cell(c.metric),
                points_cell(c.difference.value, c.difference.low, c.difference.high),
                Cell(c.verdict, mark=c.verdict.split()[0]),
                Cell(p_value(c.difference.p)),
                Cell(count(c.difference.n)),
                Cell("overlap" if c.overlap else "disjoint"),
            ],
        )
        for c in comparisons
    ]
    head = ["dataset", "metric", "difference\npercentage points", f"{a} is", "p", "n", "intervals"]
    return Table(f"{a} − {b}", head, rows)
