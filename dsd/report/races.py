"""What schedules cost and keep: a table of the best of each, accuracy over cost, and the second paper's tables.

He et al., “Accelerating Diffusion Models for Discriminative Vision and Language Learners”, Tables 1 and 2, Figure 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsd.evaluation.claims import TASKS
from dsd.report import figures
from dsd.report.inputs import Dataset
from dsd.report.tables import NONE, Cell, Row, Table, count, interval, percent, points
from dsd.schedules.exhaustive import ALL_DRAWS
from dsd.schedules.hierarchical import DIRECTIONS, published_name
from dsd.schedules.replay import LEARNED_FROM, MEASURED_ON
from dsd.statistics import Interval

Told = Mapping[str, Any]  # of a method on a dataset, see dsd.schedules.replay.compare_settings
SCHEDULES = ("exhaustive", "staged", "hierarchical", "racing")
# The second paper's accuracy in percent and hours, by dataset: exhaustive, pruned; and CLIP with a ResNet-50.
THEIRS = {
    "CIFAR10": (86.6, 110, 85.5, 57, 75.6),
    "STL10": (94.7, 39, 91.0, 18, 94.3),
    "FGVC": (23.9, 19, 23.1, 11, 19.3),
}


@dataclass(frozen=True)
class Shown:
    title: str
    note: str
    table: Table
    drawings: list[figures.Drawing]


def races(found: Mapping[str, Mapping[str, Told]]) -> Iterator[Shown]:
    """Every method that was raced, by dataset."""
    for dataset, by_method in found.items():
        for method, told in by_method.items():
            title = f"{dataset}: {method}"
            yield Shown(title, note(told), table(title, told), drawings(dataset, method, told))


def note(told: Told) -> str:
    """How many races there were, of what, and whether the promise was kept."""
    counts, promised = told["races"], {n: r for n, r in told["chosen"].items() if "delta" in r["setting"]}
    kept = [name for name, row in promised.items() if row["disagreement"]["value"] <= row["setting"]["delta"]]
    alone = "".join(
        f" {proposer} alone has the winner of all draws among its first "
        + ", ".join(f"{kept} in {percent(share)} %" for kept, share in shares.items())
        + " of races."
        for proposer, shares in told["recall"].items()
    )
    ties = f" In {count(told['ties'])} no candidate is right, or a wrong one is the same: a tie, never right."
    ties = ties if told["ties"] else ""
    return (
        f"{count(counts[MEASURED_ON])} test races of {told['candidates']:g} candidates, {told['draws']} draws. "
        f"Settings were chosen on {count(counts[LEARNED_FROM])} few-shot races; racing learned from "
        f"{count(counts[LEARNED_FROM] - counts['calibration'])} of them and was calibrated on the other "
        f"{count(counts['calibration'])}. Its stated error rate was kept by {len(kept)} of {len(promised)}."
        f"{alone}{ties}"
    )


def table(title: str, told: Told) -> Table:
    rows = []
    for name, row in told["chosen"].items():
        share, live = row["share"], row.get("live", {})
        rows.append(
            Row(
                name,
                [
                    Cell(f"{percent(row['accuracy']['value'])} %", interval(_interval(row["accuracy"]))),
                    Cell(points(row["difference"]["value"]), _range(row["difference"], points)),
                    Cell(f"{percent(row['disagreement']['value'])} %", interval(_interval(row["disagreement"]))),
                    _cost(told["draws"], share),
                    Cell(f"{1 / share['value']:.1f}×"),
                    Cell(f"{live['seconds']:.2f}", f"{live['images']} images") if live else Cell(NONE),
                    Cell(f"{percent(live['fill'])} %") if live else Cell(NONE),
                    Cell(setting(row["setting"])),
                ],
            )
        )
    head = [
        "schedule",
        "right answers",
        "minus that of all draws\npercentage points",
        "another winner\nthan all draws",
        "evaluations\na candidate",
        "fewer than\nall draws",
        "seconds\nan image",
        "batches\nfull",
        "setting",
    ]
    return Table(title, head, rows)


def setting(values: Mapping[str, Any]) -> str:
    """A setting as words, what is null or false left out."""
    told = {key.replace("_", " "): value for key, value in values.items() if value is not None and value is not False}
    return ", ".join(key if value is True else f"{key} {_plain(value)}" for key, value in told.items())


def growth(rows: Sequence[Told]) -> Table | None:
    """Evaluations a candidate of racing as candidates grow, for each kind of noise; None where it was not run."""
    if not rows:
        return None
    noises = list(dict.fromkeys(row["noise"] for row in rows))
    lines = []
    for candidates in dict.fromkeys(row["candidates"] for row in rows):
        cells = []
        for row in (row for row in rows if row["candidates"] == candidates):
            wrong = _interval(row["disagreement"])
            cells += [_cost(row["draws"], row["share"]), Cell(f"{percent(wrong.value)} %", interval(wrong))]
        lines.append(Row(count(candidates), cells))
    head = [part for noise in noises for part in (f"evaluations a candidate\n{noise} noise", "another winner")]
    return Table("Racing as candidates grow, on synthetic evidence", ["candidates", *head], lines)


def drawings(dataset: str, method: str, told: Told) -> list[figures.Drawing]:
    """Accuracy over cost for each schedule, and, as the second paper's Figure 4, for each direction."""
    whole, name = _interval(told["chosen"][ALL_DRAWS]["accuracy"]), figures.slug(f"{dataset}-{method}")
    runs = told["runs"]
    of_schedule = {schedule: [run for run in runs if run["schedule"] == schedule] for schedule in SCHEDULES}
    proposers = dict.fromkeys(run["setting"]["proposer"] for run in of_schedule["racing"])
    lines = {schedule: front(of_schedule[schedule]) for schedule in SCHEDULES if schedule != "racing"} | {
        f"racing, {proposer} first" if proposer else "racing": front(
            run for run in of_schedule["racing"] if run["setting"]["proposer"] == proposer
        )
        for proposer in proposers
    }
    sides = {
        f"from {direction}": front(
            run for run in of_schedule["hierarchical"] if run["setting"]["direction"] == direction
        )
        for direction in DIRECTIONS
    }
    return [
        figures.costs(f"costs-{name}", f"{dataset}: {method}", lines, whole),
        figures.costs(
            f"directions-{name}", f"{dataset}: hierarchical from each side (Figure 4 of the second paper)", sides, whole
        ),
    ]


def front(runs: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(cost, accuracy) on the test races of the settings that none is both cheaper and better than on the learning
    races."""
    found, best = [], -1.0
    for run in sorted(runs, key=lambda run: (run[LEARNED_FROM]["evaluations"], -run[LEARNED_FROM]["accuracy"])):
        if run[LEARNED_FROM]["accuracy"] > best:
            best = run[LEARNED_FROM]["accuracy"]
            found.append((run[MEASURED_ON]["evaluations"], run[MEASURED_ON]["accuracy"]))
    return found


def classified(found: Mapping[str, Mapping[str, Told]], datasets: Sequence[Dataset]) -> list[Dataset]:
    """The datasets that stand for those of the second paper, as far as they were raced."""
    return [dataset for dataset in datasets if dataset.kind in TASKS["classifying"] and dataset.name in found]


def paper(found: Mapping[str, Mapping[str, Told]], datasets: Sequence[Dataset], clip: str | None) -> Iterator[Table]:
    """Tables 1 and 2: the paper's numbers, on its data, over ours, on ours."""
    ours = [
        (dataset, method, told["chosen"])
        for dataset in classified(found, datasets)
        for method, told in found[dataset.name].items()
    ]
    if not ours:
        return
    rows = [
        Row(
            name,
            [Cell("the paper"), Cell(f"{whole:.1f}"), Cell(f"{hours} h"), Cell(f"{pruned:.1f}"), Cell(f"{fewer} h")],
            "chance",
        )
        for name, (whole, hours, pruned, fewer, _) in THEIRS.items()
    ]
    for dataset, method, chosen in ours:
        cells = [cell for name in (ALL_DRAWS, published_name("clean")) for cell in _pair(chosen[name])]
        rows.append(Row(dataset.name, [Cell(f"here ({method})"), *cells]))
    head = ["dataset", "numbers of", "exhaustive\naccuracy", "time", "hierarchical\naccuracy", "time"]
    yield Table("Table 1 of the second paper, and the same here", head, rows)

    rows = [
        Row(name, [Cell("the paper"), Cell(f"{small:.1f}"), Cell(f"{pruned:.1f}")], "chance")
        for name, (_, _, pruned, _, small) in THEIRS.items()
    ]
    for dataset, method, chosen in ours:
        accuracy = _interval(chosen[published_name("clean")]["accuracy"])
        known = dataset.results.get(clip or "", {}).get(dataset.headline)
        small_cell = Cell(percent(known.value), interval(known)) if known else Cell(NONE)
        cells = [Cell(f"here ({method})"), small_cell, Cell(percent(accuracy.value), interval(accuracy))]
        rows.append(Row(dataset.name, cells))
    head = ["dataset", "numbers of", f"a small CLIP\nResNet-50 / {clip}", "hierarchical"]
    yield Table("Table 2 of the second paper, and the same here", head, rows)


def _pair(row: Mapping[str, Any]) -> list[Cell]:
    accuracy, live = _interval(row["accuracy"]), row.get("live")
    time = Cell(f"{live['seconds']:.2f} s an image", f"{live['evaluations']:.0f} evaluations") if live else Cell(NONE)
    return [Cell(percent(accuracy.value), interval(accuracy)), time]


def _cost(draws: int, share: Mapping[str, Any]) -> Cell:
    """Evaluations a candidate, of a share of those at all draws."""
    return Cell(f"{draws * share['value']:.2f}", _range(share, lambda value: f"{draws * value:.2f}"))


def _interval(value: Mapping[str, Any]) -> Interval:
    return Interval(**value)


def _range(value: Mapping[str, Any], text: Callable[[float], str]) -> str:
    return f"[{text(value['low'])}, {text(value['high'])}]"


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
