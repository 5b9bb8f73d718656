"""What the studies tell: a table each, and a curve where a study gives one key several amounts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from dsd.config import Params, StudyParams
from dsd.experiments.variants import Study
from dsd.report import figures
from dsd.report.inputs import Dataset
from dsd.report.tables import NONE, Cell, Row, Table, interval, p_value, percent, points
from dsd.statistics import Difference, Interval

SAMPLE = "dataset.sample"  # its values name samples and are no amounts
AS_IS = "as params.yaml has it"


@dataclass(frozen=True)
class Shown:
    name: str
    note: str
    table: Table
    drawings: list[figures.Drawing]


def studies(
    params: Params, found: Mapping[str, Any], datasets: Sequence[Dataset], series: figures.Series
) -> Iterator[Shown]:
    """Every study that was run, in the order of params.yaml."""
    by_name = {dataset.name: dataset for dataset in datasets}
    for name, row in params.studies.items():
        if told := found.get(name):
            study = _Study(name, row, told, [by_name[dataset] for dataset in row.datasets], params)
            yield Shown(name, study.note(), study.table(), study.drawings(series))


@dataclass(frozen=True)
class _Study:
    name: str
    row: StudyParams
    told: Mapping[str, Any]  # variant → dataset → params, methods
    datasets: Sequence[Dataset]
    params: Params

    def value(self, variant: str, dataset: Dataset, method: str) -> Interval | None:
        """The headline of a variant, None where it was not run; `AS_IS` is what the report is about."""
        if variant == AS_IS:
            row = dataset.results.get(method, {}) if self.row.split == "test" else {}
            return row.get(dataset.headline)
        found = self.told.get(variant, {}).get(dataset.name)
        if found is None:
            return None
        v = found["methods"][method][dataset.headline]
        return Interval(v["value"], v["low"], v["high"], v["n"])

    def difference(self, variant: str, dataset: Dataset, method: str) -> Difference | None:
        found = self.told.get(variant, {}).get(dataset.name)
        d = found and found["methods"][method][dataset.headline].get("difference")
        return Difference(**d) if d else None

    def mean(self, variant: str, method: str) -> float | None:
        """Over the datasets, None where one was not run."""
        values = [self.value(variant, dataset, method) for dataset in self.datasets]
        return mean(v.value for v in values if v) if all(values) else None

    @property
    def rows(self) -> list[tuple[str, str]]:
        variants = [*([AS_IS] if self.row.split == "test" else []), *self.told]
        return [(method, variant) for method in self.row.methods for variant in variants]

    def stale(self, variant: str) -> bool:
        """Whether some of it was found when params.yaml was another."""
        return any(
            found["params"] != Study(self.name, self.params).key(variant, dataset)
            for dataset, found in self.told.get(variant, {}).items()
        )

    def best(self, method: str) -> str | None:
        """The variant with the highest mean."""
        means = {variant: self.mean(variant, method) for variant in self.told}
        known = {variant: value for variant, value in means.items() if value is not None}
        return max(known, key=lambda variant: known[variant]) if known else None

    def table(self) -> Table:
        rows = []
        for method, variant in self.rows:
            cells = [self._cell(variant, dataset, method) for dataset in self.datasets]
            total = self.mean(variant, method)
            mark = "best" if self.row.split == "validation" and variant == self.best(method) else ""
            head = variant + (" (other params)" if self.stale(variant) else "")
            last = Cell(NONE if total is None else percent(total), mark=mark)
            rows.append(Row(head, [Cell(method), *cells, last]))
        heads = [f"{d.name}\n{d.headline}, n = {self._n(d)}" for d in self.datasets]
        caption = f"{self.name}: {self.row.split} split"
        return Table(caption, ["variant", "method", *heads, "mean"], [*rows, *self._spread()])

    def _n(self, dataset: Dataset) -> str:
        found = [self.value(variant, dataset, method) for method, variant in self.rows]
        return str(next((v.n for v in found if v), NONE))

    def _cell(self, variant: str, dataset: Dataset, method: str) -> Cell:
        value, difference = self.value(variant, dataset, method), self.difference(variant, dataset, method)
        if value is None:
            return Cell(NONE)
        told = f"; {points(difference.value)}, p {p_value(difference.p)}" if difference else ""
        return Cell(percent(value.value), interval(value) + told)

    def _spread(self) -> list[Row]:
        """Mean and standard deviation over samples."""
        if not self.amounts(SAMPLE) or self.row.split != "test":
            return []
        rows = []
        for method in self.row.methods:
            cells = []
            for dataset in self.datasets:
                several = [self.value(variant, dataset, method) for variant in (AS_IS, *self.told)]
                found = [v.value for v in several if v]
                spread = f"± {percent(stdev(found))}, {len(found)} samples" if len(found) > 1 else ""
                cells.append(Cell(percent(mean(found)) if found else NONE, spread))
            rows.append(Row("mean ± standard deviation", [Cell(method), *cells, Cell("")], "total"))
        return rows

    def amounts(self, key: str) -> dict[str, float]:
        """The amount that each variant gives to the key; nothing unless all change this key alone."""
        changes = self.row.variants
        if not all(set(change) == {key} and isinstance(change[key], int | float) for change in changes.values()):
            return {}
        return {variant: float(change[key] or 0) for variant, change in changes.items()}

    def note(self) -> str:
        if self.row.split == "test":
            return (
                "Beside each value: its interval, and the paired difference from the same method as params.yaml has it."
            )
        said = []
        for method in self.row.methods:
            force = [variant for variant in self.told if Study(self.name, self.params).in_force(variant)]
            best = self.best(method)
            done = sum(self.mean(variant, method) is not None for variant in self.told)
            chosen = f"params.yaml has “{force[0]}”" if force else "params.yaml has none of them"
            said.append(f"{method}: of {done} the best by the mean is “{best}”; {chosen}.")
        return " ".join(said)

    def drawings(self, series: figures.Series) -> list[figures.Drawing]:
        key = next(iter(next(iter(self.row.variants.values()))), SAMPLE)
        amounts = {} if key == SAMPLE else self.amounts(key)
        if not amounts or self.row.split != "test":
            return []
        found = []
        for dataset in self.datasets:
            now = getattr(self.params.datasets[dataset.name], key.removeprefix("dataset."), None)
            if now is None:
                continue
            places = sorted([*amounts.items(), (AS_IS, float(now))], key=lambda place: place[1])
            lines = {
                method: [(x, v) for variant, x in places if (v := self.value(variant, dataset, method)) is not None]
                for method in self.row.methods
            }
            found.append(figures.curve(dataset, self.name, key, lines, series))
        return found
