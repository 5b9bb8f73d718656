"""The results in the README, from metrics.json: `python -m dsd.report.readme` writes its table and docs/results.svg.

The headline metric of each dataset, see `dsd.metrics.HEADLINES`, for every method.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dsd.config import DatasetParams, MethodParams, load
from dsd.datasets import benchmark
from dsd.errors import DataError, DsdError
from dsd.metrics import WINOGROUND_CHANCE
from dsd.report.figures import STYLE, save_svg
from dsd.report.tables import interval, percent
from dsd.statistics import Interval

BEGIN, END = "<!-- results: written by `make readme` from data/evaluate/metrics.json -->", "<!-- /results -->"
METRICS, README, FIGURE = Path("data/evaluate/metrics.json"), Path("README.md"), Path("docs/results.svg")
INK, DIFFUSION, CLIP = "#1d2026", "#0b57a4", "#a8321f"


@dataclass(frozen=True)
class Column:
    """The headline metric of one dataset for every method; `chance` is that of random scores."""

    dataset: str
    metric: str
    chance: float
    values: dict[str, Interval]


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


def figure(columns: list[Column], methods: Mapping[str, MethodParams]) -> str:
    """The same values as an SVG document: one panel per dataset, intervals as bars, chance dashed."""
    names = list(columns[0].values)
    chance: dict[str, Any] = {"color": INK, "lw": 1, "ls": (0, (3, 2))}
    with matplotlib.rc_context(STYLE):
        drawing = Figure(figsize=(8, 0.85 + 0.24 * len(names)))
        panels = drawing.subplots(1, len(columns), sharey=True, squeeze=False)[0]
        for ax, column in zip(panels, columns, strict=True):
            for row, name in enumerate(names):
                value, clip = column.values[name], methods[name].scorer == "contrastive"
                colour = CLIP if clip else DIFFUSION
                ax.plot([100 * value.low, 100 * value.high], [row, row], color=colour, lw=2, solid_capstyle="round")
                ax.plot(100 * value.value, row, "o", color=colour, ms=5, mew=0)
            ax.axvline(100 * column.chance, **chance)
            ax.set(xlim=(0, 104), ylim=(len(names) - 0.5, -0.7), xticks=(0, 50, 100), title=column.dataset)
            ax.set_xlabel(f"accuracy ({column.metric}), %")
            ax.set_yticks(range(len(names)), names)
            ax.tick_params(axis="y", length=0)
            ax.grid(axis="x")
        handles = [Line2D([], [], color=colour, marker="o", ms=5, lw=2) for colour in (DIFFUSION, CLIP)]
        handles.append(Line2D([], [], **chance))
        labels = ["diffusion model", "CLIP", "chance"]
        drawing.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.13, 1.01), ncols=3, frameon=False)
        drawing.subplots_adjust(left=0.14, right=0.99, top=0.81, bottom=0.17, wspace=0.16)
    return save_svg(drawing, STYLE, "results", facecolor="white")


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
