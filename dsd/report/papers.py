"""The tables and figures of the two papers in their layout: the published numbers, and ours on our data.

He et al. 2023, “Discriminative Diffusion Models as Few-shot Vision and Language Learners”, Tables 1 and 2, Figures 3
to 6. He et al., “Accelerating Diffusion Models for Discriminative Vision and Language Learners”, Tables 1 and 2; its
Figure 4 is among the charts of `dsd.report.races`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

from dsd.evaluation.claims import TASKS
from dsd.report.charts import Chart, paper_figure
from dsd.report.inputs import DatasetResults
from dsd.report.tables import NONE, Cell, Row, Table, percent_cell
from dsd.schedules.exhaustive import ALL_DRAWS
from dsd.schedules.hierarchical import CLEAN, READINGS, published_name
from dsd.statistics import Interval

# Accuracy of the first paper in percent, by its row and our name of the metric; it gives no intervals.
ROWS = ("CLIP (fine-tuning)", "CLIP (prompt learning)", "DSD")
FIRST_PAPER: dict[str, tuple[str, dict[str, tuple[float, float, float]]]] = {
    "matching": ("ComVG", {
        "subject": (80.77, 78.88, 80.81), "object": (82.49, 79.51, 83.17),
        "predicate": (60.50, 60.41, 63.51), "micro": (76.10, 74.24, 78.11),
    }),
    "referring": ("RefCOCOg", {"top1": (69.88, 69.40, 73.07), "top5": (84.57, 84.48, 84.91)}),
    "answering": ("VQAv2", {
        "binary": (66.94, 67.32, 70.59), "other": (5.10, 5.16, 6.77), "all": (17.86, 18.03, 20.43),
    }),
}  # fmt: skip
METRIC_NAMES = {"micro": "average", "top1": "top-1", "top5": "top-5"}
LAYOUT = {"Table 1": ("matching", "referring"), "Table 2": ("answering",)}
# Of the second paper: accuracy in percent and hours, exhaustive, then hierarchical; accuracy of CLIP with a ResNet-50.
SECOND_PAPER = {
    "CIFAR10": (86.6, 110, 85.5, 57, 75.6),
    "STL10": (94.7, 39, 91.0, 18, 94.3),
    "FGVC": (23.9, 19, 23.1, 11, 19.3),
}


def _of_task(datasets: Sequence[DatasetResults], task: str) -> DatasetResults | None:
    return next((dataset for dataset in datasets if dataset.kind in TASKS[task]), None)


def first_paper(ours: Sequence[str | None], datasets: Sequence[DatasetResults]) -> Iterator[Table]:
    """Tables 1 and 2: each of `ROWS` with the published numbers, then with those of the method of `ours`."""
    for name, tasks in LAYOUT.items():
        columns = [
            (FIRST_PAPER[task][0], metric, values, dataset)
            for task in tasks
            if (dataset := _of_task(datasets, task))
            for metric, values in FIRST_PAPER[task][1].items()
        ]
        rows = []
        for number, (row, method) in enumerate(zip(ROWS, ours, strict=True)):
            theirs = [Cell(f"{values[number]:.2f}") for _, _, values, _ in columns]
            rows.append(Row(row, [Cell("published"), *theirs], "chance"))
            here = [percent_cell(d.results.get(method or "", {}).get(metric), "") for _, metric, _, d in columns]
            rows.append(Row(row, [Cell(f"ours ({method})"), *here]))
        heads = [f"{METRIC_NAMES.get(m, m)}\n{benchmark} / {d.name}" for benchmark, m, _, d in columns]
        if columns:
            yield Table(f"{name} of the first paper", ["method", "numbers", *heads], rows)


def first_paper_figures(method: str | None, datasets: Sequence[DatasetResults]) -> list[Chart]:
    """Figures 3 to 6: layers, heads, pooling and noise of the few-shot method, on the datasets of Table 1."""
    tasks = (_of_task(datasets, task) for task in LAYOUT["Table 1"])
    drawn = [d for d in tasks if d is not None and method in d.ablations]
    plots = []
    for number, key, title in (
        (3, "layers", "last layers of the U-Net"),
        (4, "heads", "random heads of each layer"),
        (5, "pooling", "pooling"),
        (6, "levels", "noise level, alone and together"),
    ):
        lines = {
            f"{d.name}, {d.headline}{suffix}": values
            for d in drawn
            for suffix, values in _lines(key, {v: row[d.headline] for v, row in d.ablations[method or ""][key].items()})
        }
        if lines:
            plots.append(paper_figure(f"Figure {number}", title, lines))
    return plots


def _lines(key: str, values: Mapping[str, Interval]) -> Iterator[tuple[str, dict[str, Interval]]]:
    """(suffix of the line's name, its values from left to right)."""
    if key == "heads":
        for how in (how for how in ("weighted", "mean") if how in values):
            some = {text.split()[0]: value for text, value in values.items() if text.endswith(f" {how}")}
            yield f", {how}", dict(sorted(some.items(), key=lambda item: int(item[0]))) | {"all": values[how]}
    elif key == "levels":
        ordered = sorted(values.items(), key=lambda item: ("," in item[0], item[0]))
        yield "", {text if "," not in text else "together": value for text, value in ordered}
    else:
        yield "", dict(reversed(list(values.items())))


def classified(races: Mapping[str, Any], datasets: Sequence[DatasetResults]) -> list[DatasetResults]:
    """The classification datasets with races: the counterparts of the second paper's datasets."""
    return [dataset for dataset in datasets if dataset.kind in TASKS["classifying"] and dataset.name in races]


def second_paper(
    races: Mapping[str, Mapping[str, Any]], datasets: Sequence[DatasetResults], clip: str | None
) -> Iterator[Table]:
    """Tables 1 and 2: the published numbers above ours, which have a row for each reading of the schedule."""
    ours = [
        (dataset, f"ours ({method})", results["chosen"])
        for dataset in classified(races, datasets)
        for method, results in races[dataset.name].items()
    ]
    if not ours:
        return
    readings = [(reading, published_name(CLEAN, reading)) for reading in READINGS]
    rows = [
        _published(name, f"{whole:.1f}", f"{hours} h", f"{pruned:.1f}", f"{fewer} h")
        for name, (whole, hours, pruned, fewer, _) in SECOND_PAPER.items()
    ]
    for (dataset, label, chosen), (reading, hierarchical) in product(ours, readings):
        cells = [cell for name in (ALL_DRAWS, hierarchical) for cell in _accuracy_and_time(chosen[name])]
        rows.append(Row(dataset.name, [Cell(f"{label}, {reading}"), *cells]))
    head = ["dataset", "numbers", "exhaustive\naccuracy", "time", "hierarchical\naccuracy", "time"]
    yield Table("Table 1 of the second paper", head, rows)

    rows = [
        _published(name, f"{small:.1f}", f"{pruned:.1f}") for name, (_, _, pruned, _, small) in SECOND_PAPER.items()
    ]
    for (dataset, label, chosen), (reading, hierarchical) in product(ours, readings):
        known = dataset.results.get(clip or "", {}).get(dataset.headline)
        cells = [percent_cell(known, ""), percent_cell(Interval(**chosen[hierarchical]["accuracy"]), "")]
        rows.append(Row(dataset.name, [Cell(f"{label}, {reading}"), *cells]))
    head = ["dataset", "numbers", f"small CLIP\nResNet-50 / {clip}", "hierarchical"]
    yield Table("Table 2 of the second paper", head, rows)


def _published(dataset: str, *texts: str) -> Row:
    return Row(dataset, [Cell("published"), *map(Cell, texts)], "chance")


def _accuracy_and_time(row: Mapping[str, Any]) -> list[Cell]:
    live = row.get("live")
    time = Cell(f"{live['seconds']:.2f} s per image", f"{live['evaluations']:.0f} evaluations") if live else Cell(NONE)
    return [percent_cell(Interval(**row["accuracy"]), ""), time]
