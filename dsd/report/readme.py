"""The results in the README, from metrics.json: `python -m dsd.report.readme` writes its table and docs/results.svg.

The headline metric of each dataset, see `Benchmark.headline`, for every method.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dsd.config import DatasetParams, load
from dsd.datasets import benchmark
from dsd.errors import DataError, DsdError
from dsd.metrics import WINOGROUND_CHANCE
from dsd.report.charts import accuracy, document
from dsd.report.tables import Column, interval, percent
from dsd.statistics import Interval

BEGIN, END = "<!-- results: written by `make readme` from data/evaluate/metrics.json -->", "<!-- /results -->"
METRICS, README, FIGURE = Path("data/evaluate/metrics.json"), Path("README.md"), Path("docs/results.svg")


def columns(metrics: Mapping[str, Any], datasets: Mapping[str, DatasetParams]) -> list[Column]:
    """One column per dataset of metrics.json."""
    columns = []
    for dataset, methods in metrics.items():
        row, source = datasets[dataset], benchmark(datasets[dataset].kind)
        expected, metric = source.expected(row), source.headline
        chance = WINOGROUND_CHANCE[0] if source.metrics == "winoground" else 1 / (expected.images * expected.texts)
        columns.append(Column(dataset, metric, chance, {m: Interval(**v[metric]) for m, v in methods.items()}))
    return columns


def table(columns: list[Column]) -> str:
    """A Markdown table of methods × datasets in percent with intervals, and chance."""
    heads = [f"{c.dataset}<br><sub>{c.metric}, n = {next(iter(c.values.values())).n}</sub>" for c in columns]
    rows = [["accuracy, %", *heads], ["---"] * (1 + len(columns))]
    for method in columns[0].values:
        values = [column.values[method] for column in columns]
        rows.append([method, *(f"{percent(v.value)} <sub>{interval(v)}</sub>" for v in values)])
    rows.append(["*chance*", *(percent(column.chance) for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def figure(columns: list[Column], methods: Iterable[str]) -> str:
    """The same values as an SVG document: one panel per dataset, intervals as bars, chance dashed."""
    series = {name: number for number, name in enumerate(methods)}
    return document(accuracy(columns, series, len(columns), "Accuracy"))


def updated(readme: str, table: str) -> str:
    """The README with the table between its markers.

    Raises:
        DataError: a marker is missing.
    """
    if BEGIN not in readme or END not in readme:
        raise DataError(f"{README}: lacks the markers {BEGIN} and {END}")
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{table}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    try:
        params = load()
        shown = columns(json.loads(METRICS.read_text()), params.datasets)
        README.write_text(updated(README.read_text(), table(shown)))
        FIGURE.write_text(figure(shown, params.methods))
    except (DsdError, FileNotFoundError) as error:
        sys.exit(f"readme: {error}")


if __name__ == "__main__":
    main()
