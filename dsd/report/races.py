"""Schedules compared: the published and the calibrated settings, all schedules at equal disagreement, and curves of
accuracy and disagreement over cost. Every cost includes that of a proposer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from dsd.report.charts import Chart, Front, costs
from dsd.report.html import Section
from dsd.report.tables import NONE, REFERENCE, Cell, Row, Table, bounds, count, percent, percent_cell, points_cell
from dsd.schedules.exhaustive import ALL_DRAWS
from dsd.schedules.hierarchical import DIRECTIONS, READINGS
from dsd.schedules.racing import racing_name
from dsd.schedules.replay import CHOSEN_ON, LEARNED_FROM, MEASURED_ON, label_of, matched_name
from dsd.statistics import Interval

Results = Mapping[str, Any]  # of a method on a dataset, see dsd.schedules.replay.compare_settings
Races = Mapping[str, Mapping[str, Results]]  # by dataset and method
HEAD = [
    "schedule",
    "accuracy",
    "minus all draws\npercentage points",
    "disagreement\nwith all draws",
    "evaluations\nper candidate",
    "reduction",
    "seconds\nper image",
    "batch\nfill",
    "setting",
]


def sections(races: Races) -> Iterator[Section]:
    """Two sections per dataset and method: named settings, and all schedules at equal disagreement."""
    for title, results in _panels(races):
        matched = [matched_name(label, rate) for rate in results["within"] for label in by_label(results)]
        named = [name for name in results["chosen"] if name not in matched]
        yield Section(title, note(results), table(title, named, results), [])
        equal = f"{title}, at equal disagreement"
        yield Section(equal, matched_note(results), table(equal, matched, results), [])


def _panels(races: Races) -> list[tuple[str, Results]]:
    return [(f"{dataset}: {method}", row) for dataset, rows in races.items() for method, row in rows.items()]


def note(results: Results) -> str:
    """The number of races, how they were used, whether the promised error rates were met, and a proposer's cost."""
    counts, chosen = results["races"], results["chosen"]
    promised = [row for row in chosen.values() if "delta" in row["setting"]]
    kept = sum(row["disagreement"]["value"] <= row["setting"]["delta"] for row in promised)
    refused = "".join(
        f" {racing_name(p['delta'], p['proposer'], p['budget'])}: refused, the smallest δ that the races support is "
        f"{p['smallest']:.3f}."
        for p in results["promised"]
        if p["threshold"] is None
    )
    alone = "".join(
        f" {proposer} costs as much as {results['costs'][proposer]:.2g} evaluations per race, which every cost here "
        "includes; alone it ranks the all-draws winner in its top "
        + ", ".join(f"{top} in {percent(share)} %" for top, share in shares.items())
        + " of races."
        for proposer, shares in results["recall"].items()
    )
    ties = f" In {count(results['ties'])} no candidate is correct, or an incorrect one is identical: counted as wrong."
    return (
        f"{count(counts[MEASURED_ON])} test races of {results['candidates']:g} candidates, {results['draws']} draws. "
        f"Racing was fitted on {count(counts[LEARNED_FROM])} few-shot races; settings were selected, and racing was "
        f"calibrated, on {count(counts[CHOSEN_ON])} validation races that share no image. "
        f"The stated error rate was met by {kept} of {len(promised)} calibrated settings."
        f"{refused}{alone}{ties if results['ties'] else ''}"
    )


def matched_note(results: Results) -> str:
    rates = ", ".join(f"{100 * rate:g}" for rate in results["within"])
    return (
        f"The cheapest setting of each schedule that disagrees with all draws in at most {rates} % of the validation "
        "races. Costs are comparable at the same rate only."
    )


def table(title: str, names: Iterable[str], results: Results) -> Table:
    """A row for each name of a chosen setting; one that is not among the results was not reached."""
    return Table(title, HEAD, [_row(name, results) for name in names])


def _row(name: str, results: Results) -> Row:
    if (row := results["chosen"].get(name)) is None:
        runs = by_label(results)[name.rsplit(", within ", 1)[0]]
        least = min(run[CHOSEN_ON]["disagreement"] for run in runs)
        reached = Cell(f"not reached: {percent(least)} % at least")
        return Row(name, [Cell(NONE), Cell(NONE), reached, *[Cell(NONE)] * (len(HEAD) - 4)])
    difference, share, live = row["difference"], row["share"], row.get("live", {})
    compared = [
        points_cell(difference["value"], difference["low"], difference["high"]),
        percent_cell(Interval(**row["disagreement"])),
    ]
    itself = row["setting"] == results["chosen"][ALL_DRAWS]["setting"]
    return Row(
        name,
        [
            percent_cell(Interval(**row["accuracy"])),
            *([Cell(REFERENCE)] * len(compared) if itself else compared),
            _cost(results["draws"], share),
            Cell(f"{1 / share['value']:.1f}×"),
            Cell(f"{live['seconds']:.2f}", f"{live['images']} images") if live else Cell(NONE),
            Cell(f"{percent(live['fill'])} %") if live else Cell(NONE),
            Cell(setting(row["setting"])),
        ],
    )


def setting(values: Mapping[str, Any]) -> str:
    """A setting in words, without keys that are null or false."""
    shown = {key.replace("_", " "): value for key, value in values.items() if value is not None and value is not False}
    return ", ".join(key if value is True else f"{key} {_plain(value)}" for key, value in shown.items())


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def growth(rows: Sequence[Results]) -> Table | None:
    """The cost of racing by number of candidates and kind of noise; None if it was not measured."""
    if not rows:
        return None
    noises = list(dict.fromkeys(row["noise"] for row in rows))
    lines = []
    for candidates in dict.fromkeys(row["candidates"] for row in rows):
        cells = []
        for row in (row for row in rows if row["candidates"] == candidates):
            cells += [_cost(row["draws"], row["share"]), percent_cell(Interval(**row["disagreement"]))]
        lines.append(Row(count(candidates), cells))
    head = [part for noise in noises for part in (f"evaluations per candidate\n{noise} noise", "disagreement")]
    return Table("Racing by number of candidates, on synthetic evidence", ["candidates", *head], lines)


def charts(races: Races) -> list[Chart]:
    """Disagreement with all draws over cost; accuracy over cost of each schedule; and, as in Figure 4 of the second
    paper, accuracy over cost of each direction and reading of the hierarchical one."""
    panels = _panels(races)
    if not panels:
        return []
    labelled = {title: by_label(results) for title, results in panels}
    sides = {title: _by_side(results) for title, results in panels}
    levels = {title: Interval(**results["chosen"][ALL_DRAWS]["accuracy"]) for title, results in panels}
    found = [
        costs("Error over cost", _fronts(labelled, "disagreement"), "disagreement with all draws", {}),
        costs("Accuracy over cost", _fronts(labelled, "accuracy"), "accuracy", levels),
    ]
    if any(any(some.values()) for some in sides.values()):
        figure_4 = "Hierarchical by direction and reading (Figure 4 of the second paper)"
        found.append(costs(figure_4, _fronts(sides, "accuracy"), "accuracy", levels))
    return found


def _by_side(results: Results) -> dict[str, list[Results]]:
    """The runs of the hierarchical schedule by direction and reading."""
    sides: dict[str, list[Results]] = {f"from {side}, {r}": [] for r in READINGS for side in DIRECTIONS}
    for run in results["runs"]:
        if run["schedule"] == "hierarchical":
            sides[f"from {run['setting']['direction']}, {run['setting']['reading']}"].append(run)
    return sides


def by_label(results: Results) -> dict[str, list[Results]]:
    """The runs of each schedule."""
    runs: dict[str, list[Results]] = {}
    for run in results["runs"]:
        runs.setdefault(label_of(run["schedule"], run["setting"]), []).append(run)
    return runs


def _fronts(panels: Mapping[str, Mapping[str, Sequence[Results]]], key: str) -> list[Front]:
    return [
        Front(panel, label, front(some, key)) for panel, runs in panels.items() for label, some in runs.items() if some
    ]


def front(runs: Iterable[Results], key: str) -> list[tuple[float, float]]:
    """(cost, value of `key`) on the test races of the settings that are Pareto-optimal on the validation races.

    key: "accuracy", the more the better, or "disagreement", the less the better.
    """
    sign = 1 if key == "accuracy" else -1
    optimal, best = list[tuple[float, float]](), -np.inf
    for run in sorted(runs, key=lambda run: (run[CHOSEN_ON]["evaluations"], -sign * run[CHOSEN_ON][key])):
        if sign * run[CHOSEN_ON][key] > best:
            best = sign * run[CHOSEN_ON][key]
            optimal.append((run[MEASURED_ON]["evaluations"], run[MEASURED_ON][key]))
    return optimal


def _cost(draws: int, share: Mapping[str, Any]) -> Cell:
    """Evaluations per candidate, from their share of those at all draws."""

    def text(value: float) -> str:
        return f"{draws * value:.2f}"

    return Cell(text(share["value"]), bounds(share["low"], share["high"], text))
