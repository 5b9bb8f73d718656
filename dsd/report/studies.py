"""Results of the studies: a table each, and a plot where a study varies one number of the datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from dsd.config import DatasetParams, Params, StudyParams
from dsd.experiments.variants import Study
from dsd.report.figures import Plot, Series, sweep
from dsd.report.html import Section
from dsd.report.inputs import DatasetResults
from dsd.report.tables import NONE, REFERENCE, Cell, Row, Table, interval, p_value, percent, points
from dsd.statistics import Interval

SAMPLE = "dataset.sample"  # its values are names of samples, not amounts
BASELINE = "params.yaml"  # the variant without changes: the results of the report itself


def sections(
    params: Params, studies: Mapping[str, Any], datasets: Sequence[DatasetResults], series: Series
) -> Iterator[Section]:
    """Every study with results, in the order of params.yaml."""
    by_name = {dataset.name: dataset for dataset in datasets}
    for name, row in params.studies.items():
        if results := studies.get(name):
            variants = Study(name, params)
            stale = {
                variant
                for variant, by_dataset in results.items()
                if any(r["params"] != variants.key(variant, d) for d, r in by_dataset.items())
            }
            current = next((variant for variant in results if variants.in_force(variant)), None)
            study = _Study(name, row, results, [by_name[dataset] for dataset in row.datasets], stale, current)
            yield Section(name, study.note(), study.table(), study.plots(params.datasets, series))


@dataclass(frozen=True)
class _Study:
    name: str
    row: StudyParams
    results: Mapping[str, Any]  # variant → dataset → params, methods
    datasets: Sequence[DatasetResults]
    stale: set[str]  # variants that were measured with other params
    current: str | None  # the variant whose values params.yaml has

    @property
    def baseline(self) -> list[str]:
        return [BASELINE] if self.row.split == "test" else []

    def value(self, variant: str, dataset: DatasetResults, method: str) -> Interval | None:
        """The headline metric of a variant, None if it was not measured."""
        if variant == BASELINE:
            return dataset.results.get(method, {}).get(dataset.headline) if self.baseline else None
        v = self._metric(variant, dataset, method)
        return Interval(v["value"], v["low"], v["high"], v["n"]) if v else None

    def _metric(self, variant: str, dataset: DatasetResults, method: str) -> dict[str, Any] | None:
        result = self.results.get(variant, {}).get(dataset.name)
        return result and result["methods"][method][dataset.headline]

    def mean(self, variant: str, method: str) -> float | None:
        """The mean over the datasets, None if one was not measured."""
        values = [self.value(variant, dataset, method) for dataset in self.datasets]
        return mean(v.value for v in values if v) if all(values) else None

    def best(self, method: str) -> str | None:
        """The variant with the highest mean."""
        means = {variant: self.mean(variant, method) for variant in self.results}
        known = {variant: value for variant, value in means.items() if value is not None}
        return max(known, key=lambda variant: known[variant]) if known else None

    def table(self) -> Table:
        rows, variants = [], [*self.baseline, *self.results]
        for method in self.row.methods:
            best = self.best(method) if self.row.split == "validation" else None
            for variant in variants:
                cells = [self._cell(variant, dataset, method) for dataset in self.datasets]
                total = self.mean(variant, method)
                last = Cell(NONE if total is None else percent(total), mark="best" if variant == best else "")
                head = variant + (" (other params)" if variant in self.stale else "")
                rows.append(Row(head, [Cell(method), *cells, last]))
        heads = [f"{d.name}\n{d.headline}, n = {self._n(d)}" for d in self.datasets]
        caption = f"{self.name}: {self.row.split} split"
        return Table(caption, ["variant", "method", *heads, "mean"], [*rows, *self._spread()])

    def _n(self, dataset: DatasetResults) -> str:
        values = (self.value(v, dataset, m) for m in self.row.methods for v in (*self.baseline, *self.results))
        return str(next((v.n for v in values if v), NONE))

    def _cell(self, variant: str, dataset: DatasetResults, method: str) -> Cell:
        value = self.value(variant, dataset, method)
        if value is None:
            return Cell(NONE)
        difference = (self._metric(variant, dataset, method) or {}).get("difference")
        text = f"; {points(difference['value'])}, p {p_value(difference['p'])}" if difference else ""
        if self.baseline and variant in (BASELINE, self.current):
            text = f"; {REFERENCE}"
        return Cell(percent(value.value), interval(value) + text)

    def _spread(self) -> list[Row]:
        """Mean and standard deviation over samples."""
        if not self.baseline or not self.amounts(SAMPLE):
            return []
        rows = []
        for method in self.row.methods:
            cells = []
            for dataset in self.datasets:
                samples = (self.value(variant, dataset, method) for variant in (BASELINE, *self.results))
                values = [v.value for v in samples if v]
                spread = f"± {percent(stdev(values))}, {len(values)} samples" if len(values) > 1 else ""
                cells.append(Cell(percent(mean(values)) if values else NONE, spread))
            rows.append(Row("mean ± standard deviation", [Cell(method), *cells, Cell("")], "total"))
        return rows

    def amounts(self, key: str) -> dict[str, float]:
        """The number that each variant sets the key to; empty unless all change this key alone."""
        changes = self.row.variants
        if not all(set(change) == {key} and isinstance(change[key], int | float) for change in changes.values()):
            return {}
        return {variant: float(change[key] or 0) for variant, change in changes.items()}

    def note(self) -> str:
        if self.baseline:
            return "In each cell: the interval, and the paired difference from the same method with params.yaml."
        current = f"params.yaml has “{self.current}”" if self.current else "params.yaml has none of them"
        sentences = []
        for method in self.row.methods:
            measured = sum(self.mean(variant, method) is not None for variant in self.results)
            sentences.append(f"{method}: of {measured} variants, “{self.best(method)}” has the best mean; {current}.")
        return " ".join(sentences)

    def plots(self, rows: Mapping[str, DatasetParams], series: Series) -> list[Plot]:
        key = next(iter(next(iter(self.row.variants.values()))), SAMPLE)
        amounts = {} if key == SAMPLE else self.amounts(key)
        if not amounts or not self.baseline:
            return []
        plots = []
        for dataset in self.datasets:
            current = getattr(rows[dataset.name], key.removeprefix("dataset."), None)
            if current is None:
                continue
            places = sorted([*amounts.items(), (BASELINE, float(current))], key=lambda place: place[1])
            lines = {
                method: [(x, v) for variant, x in places if (v := self.value(variant, dataset, method)) is not None]
                for method in self.row.methods
            }
            plots.append(sweep(dataset, self.name, key, lines, series))
        return plots
