"""Results of the studies: a table each, and the curve over the number of few-shot examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from dsd.config import Params, StudyParams
from dsd.experiments.variants import FEW_SHOT, REPLICATED
from dsd.report.charts import Chart, Series, sweep
from dsd.report.html import Section
from dsd.report.inputs import DatasetResults
from dsd.report.tables import NONE, REFERENCE, Cell, Row, Table, interval, p_value, percent, points
from dsd.statistics import Interval

BASELINE = "params.yaml"  # the variant without changes: the results of the report itself


def sections(
    params: Params, studies: Mapping[str, Any], datasets: Sequence[DatasetResults], series: Series
) -> Iterator[Section]:
    """Every study with results, in the order of params.yaml."""
    by_name = {dataset.name: dataset for dataset in datasets}
    stored = [
        _Study(name, row, studies[name], [by_name[dataset] for dataset in row.datasets])
        for name, row in params.studies.items()
        if studies.get(name)
    ]
    for study in stored:
        yield Section(study.name, study.note(), study.table(), study.charts(stored, series), study.row.methods)


@dataclass(frozen=True)
class _Study:
    name: str
    row: StudyParams
    results: Mapping[str, Any]  # variant → dataset → method → current, unchanged, few_shot, metrics
    datasets: Sequence[DatasetResults]

    @property
    def baseline(self) -> list[str]:
        return [BASELINE] if self.row.split == "test" else []

    def marked(self, variant: str, method: str, mark: str) -> list[bool]:
        """`current` or `unchanged` of the stored results of a method under a variant, by dataset."""
        by_dataset = self.results.get(variant, {}).values()
        return [bool(by_method[method][mark]) for by_method in by_dataset if method in by_method]

    def in_force(self, variant: str) -> bool:
        """Whether params.yaml has the values of a variant, for every method and dataset."""
        return all(all(self.marked(variant, method, "unchanged")) for method in self.row.methods)

    def value(self, variant: str, dataset: DatasetResults, method: str) -> Interval | None:
        """The headline metric of a variant, None if it was not measured."""
        if variant == BASELINE:
            return dataset.results.get(method, {}).get(dataset.headline) if self.baseline else None
        v = self._metric(variant, dataset, method)
        return Interval(v["value"], v["low"], v["high"], v["n"]) if v else None

    def _metric(self, variant: str, dataset: DatasetResults, method: str) -> dict[str, Any] | None:
        result = self.results.get(variant, {}).get(dataset.name, {}).get(method)
        return result and result["metrics"][dataset.headline]

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
                if not any(self.value(variant, dataset, method) for dataset in self.datasets):
                    continue  # not run, or the variant does not concern the method
                cells = [self._cell(variant, dataset, method) for dataset in self.datasets]
                total = self.mean(variant, method)
                last = Cell(NONE if total is None else percent(total), mark="best" if variant == best else "")
                head = variant + ("" if all(self.marked(variant, method, "current")) else " (other params)")
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
        if self.baseline and (variant == BASELINE or all(self.marked(variant, method, "unchanged"))):
            text = f"; {REFERENCE}"
        return Cell(percent(value.value), interval(value) + text)

    def _spread(self) -> list[Row]:
        """Mean and standard deviation over few-shot samples and noise sets."""
        if not self.baseline or not all(set(change) <= REPLICATED for change in self.row.variants.values()):
            return []
        rows = []
        for method in self.row.methods:
            cells = []
            for dataset in self.datasets:
                results = (self.value(variant, dataset, method) for variant in (BASELINE, *self.results))
                values = [v.value for v in results if v]
                spread = f"± {percent(stdev(values))}, {len(values)} results" if len(values) > 1 else ""
                cells.append(Cell(percent(mean(values)) if values else NONE, spread))
            rows.append(Row("mean ± standard deviation", [Cell(method), *cells, Cell("")], "total"))
        return rows

    def note(self) -> str:
        if self.baseline:
            return "In each cell: the interval, and the paired difference from the same method with params.yaml."
        in_force = next(filter(self.in_force, self.results), None)
        current = f"params.yaml has “{in_force}”" if in_force else "params.yaml has none of them"
        sentences = []
        for method in self.row.methods:
            measured = sum(self.mean(variant, method) is not None for variant in self.results)
            sentences.append(f"{method}: of {measured} variants, “{self.best(method)}” has the best mean; {current}.")
        return " ".join(sentences)

    def shots(self, dataset: DatasetResults, method: str) -> list[tuple[float, Interval]]:
        """(few-shot examples, headline metric) of each variant that was measured on a dataset."""
        return [
            (self.results[variant][dataset.name][method]["few_shot"], value)
            for variant in self.results
            if (value := self.value(variant, dataset, method)) is not None
        ]

    @property
    def varies_shots(self) -> bool:
        return bool(self.baseline) and all(set(change) == {FEW_SHOT} for change in self.row.variants.values())

    def charts(self, studies: Sequence[_Study], series: Series) -> list[Chart]:
        """The curve over few-shot examples on each dataset, with the results of all studies that vary their number."""
        if not self.varies_shots or len(self.row.variants) == 1:
            return []
        charts = []
        for dataset in self.datasets:
            lines = {}
            for method in self.row.methods:
                places = [p for study in studies if study.varies_shots for p in study.shots(dataset, method)]
                if own := self.value(BASELINE, dataset, method):
                    places.append((dataset.counts["train"], own))
                lines[method] = sorted(places, key=lambda place: place[0])
            charts.append(sweep(dataset, lines, series))
        return charts
