"""The first paper's tables and figures in its layout, with our numbers, and its own beside them, named as its own.

He et al. 2023, “Discriminative Diffusion Models as Few-shot Vision and Language Learners”, Tables 1 and 2, Figures 3
to 6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dsd.config import ContrastiveMethod, Params, prompted
from dsd.evaluation.claims import TASKS
from dsd.report import figures
from dsd.report.inputs import Dataset
from dsd.report.tables import NONE, Cell, Row, Table, interval, percent
from dsd.statistics import Interval

# The paper's accuracy in percent, by its row and our name of the metric; it gives no intervals.
ROWS = ("CLIP (fine-tuning)", "CLIP (prompt learning)", "DSD")
THEIRS: dict[str, tuple[str, dict[str, tuple[float, float, float]]]] = {
    "matching": (
        "ComVG",
        {
            "subject": (80.77, 78.88, 80.81),
            "object": (82.49, 79.51, 83.17),
            "predicate": (60.50, 60.41, 63.51),
            "micro": (76.10, 74.24, 78.11),
        },
    ),
    "referring": ("RefCOCOg", {"top1": (69.88, 69.40, 73.07), "top5": (84.57, 84.48, 84.91)}),
    "answering": (
        "VQAv2",
        {"binary": (66.94, 67.32, 70.59), "other": (5.10, 5.16, 6.77), "all": (17.86, 18.03, 20.43)},
    ),
}
HEADS = {"micro": "average", "top1": "top-1", "top5": "top-5"}
LAYOUT = {"Table 1": ("matching", "referring"), "Table 2": ("answering",)}


def ours(params: Params) -> dict[str, str | None]:
    """The method that stands for each of the paper's rows."""
    tuned = {m.tuned: name for name, m in params.methods.items() if isinstance(m, ContrastiveMethod)}
    return dict(zip(ROWS, (tuned.get("projections"), tuned.get("context"), prompted(params)), strict=True))


def of_task(datasets: Sequence[Dataset], task: str) -> Dataset | None:
    return next((dataset for dataset in datasets if dataset.kind in TASKS[task]), None)


def tables(params: Params, datasets: Sequence[Dataset]) -> Iterator[Table]:
    """Tables 1 and 2: a row of the paper's numbers, on its data, over one of ours, on ours."""
    for name, tasks in LAYOUT.items():
        columns = [(task, metric) for task in tasks for metric in THEIRS[task][1] if of_task(datasets, task)]
        heads = [f"{HEADS.get(m, m)}\n{THEIRS[task][0]} / {_name(of_task(datasets, task))}" for task, m in columns]
        rows = []
        for number, row in enumerate(ROWS):
            theirs = [Cell(f"{THEIRS[task][1][metric][number]:.2f}") for task, metric in columns]
            rows.append(Row(row, [Cell("the paper"), *theirs], "chance"))
            method = ours(params)[row]
            found = [_cell(of_task(datasets, task), method, metric) for task, metric in columns]
            rows.append(Row(row, [Cell(f"here ({method})"), *found]))
        if columns:
            yield Table(f"{name} of the paper, and the same here", ["method", "numbers of", *heads], rows)


def _cell(dataset: Dataset | None, method: str | None, metric: str) -> Cell:
    if dataset is None or method not in dataset.results:
        return Cell(NONE)
    value = dataset.results[method][metric]
    return Cell(percent(value.value), interval(value))


def _name(dataset: Dataset | None) -> str:
    return NONE if dataset is None else dataset.name


def drawings(params: Params, datasets: Sequence[Dataset]) -> list[figures.Drawing]:
    """Figures 3 to 6: layers, heads, pooling and noise of the few-shot method, on the data of Table 1."""
    if (method := prompted(params)) is None:
        return []
    shown = [d for d in (of_task(datasets, task) for task in ("matching", "referring")) if d and method in d.ablations]
    found = []
    for number, key, title in (
        (3, "layers", "last layers of the U-Net"),
        (4, "heads", "random heads of each layer"),
        (5, "pooling", "pooling"),
        (6, "levels", "noise level, alone and together"),
    ):
        lines = {
            f"{d.name}, {d.headline}{suffix}": values
            for d in shown
            for suffix, values in _lines(key, {v: row[d.headline] for v, row in d.ablations[method][key].items()})
        }
        if lines:
            found.append(figures.redrawn(f"Figure {number}", title, lines))
    return found


def _lines(key: str, found: Mapping[str, Interval]) -> Iterator[tuple[str, dict[str, Interval]]]:
    """Suffixes of a line's name, and its values from left to right."""
    if key == "heads":
        for how in ("weighted", "mean"):
            some = {text.split()[0]: value for text, value in found.items() if text.endswith(f" {how}")}
            yield f", {how}", dict(sorted(some.items())) | {"all": found[how]}
    elif key == "levels":
        yield "", {text if "," not in text else "together": value for text, value in sorted(found.items(), key=_last)}
    else:
        yield "", dict(reversed(list(found.items())))


def _last(item: tuple[str, Interval]) -> tuple[bool, str]:
    return "," in item[0], item[0]
