"""Schedules compared: accuracy and cost of the selected settings, and accuracy over cost of all settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from dsd.report.figures import Plot, costs, slug
from dsd.report.html import Section
from dsd.report.tables import NONE, REFERENCE, Cell, Row, Table, bounds, count, percent, percent_cell, points_cell
from dsd.schedules.exhaustive import ALL_DRAWS
from dsd.schedules.hierarchical import DIRECTIONS
from dsd.schedules.replay import LEARNED_FROM, MEASURED_ON
from dsd.statistics import Interval

Results = Mapping[str, Any]  # of a method on a dataset, see dsd.schedules.replay.compare


def sections(races: Mapping[str, Mapping[str, Results]]) -> Iterator[Section]:
    """One section per dataset and method."""
    for dataset, by_method in races.items():
        for method, results in by_method.items():
            title = f"{dataset}: {method}"
            yield Section(title, note(results), table(title, results), plots(dataset, method, results))


def note(results: Results) -> str:
    """The number of races, how they were used, and whether the stated error rate was met."""
    counts = results["races"]
    promised = [row for row in results["chosen"].values() if "delta" in row["setting"]]
    kept = sum(row["disagreement"]["value"] <= row["setting"]["delta"] for row in promised)
    alone = "".join(
        f" {proposer} alone ranks the all-draws winner in its top "
        + ", ".join(f"{top} in {percent(share)} %" for top, share in shares.items())
        + " of races."
        for proposer, shares in results["recall"].items()
    )
    ties = f" In {count(results['ties'])} no candidate is correct, or an incorrect one is identical: counted as wrong."
    return (
        f"{count(counts[MEASURED_ON])} test races of {results['candidates']:g} candidates, {results['draws']} draws. "
        f"Settings were selected on {count(counts[LEARNED_FROM])} few-shot races; racing was trained on "
        f"{count(counts[LEARNED_FROM] - counts['calibration'])} of them and calibrated on the other "
        f"{count(counts['calibration'])}. The stated error rate was met by {kept} of {len(promised)} racing settings."
        f"{alone}{ties if results['ties'] else ''}"
    )


def table(title: str, results: Results) -> Table:
    rows = []
    everything = results["chosen"][ALL_DRAWS]["setting"]
    for name, row in results["chosen"].items():
        difference, share, live = row["difference"], row["share"], row.get("live", {})
        itself = [Cell(REFERENCE)] * 2 if row["setting"] == everything else []
        rows.append(
            Row(
                name,
                [
                    percent_cell(Interval(**row["accuracy"])),
                    *(
                        itself
                        or [
                            points_cell(difference["value"], difference["low"], difference["high"]),
                            percent_cell(Interval(**row["disagreement"])),
                        ]
                    ),
                    _cost(results["draws"], share),
                    Cell(f"{1 / share['value']:.1f}×"),
                    Cell(f"{live['seconds']:.2f}", f"{live['images']} images") if live else Cell(NONE),
                    Cell(f"{percent(live['fill'])} %") if live else Cell(NONE),
                    Cell(setting(row["setting"])),
                ],
            )
        )
    head = [
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
    return Table(title, head, rows)


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


def plots(dataset: str, method: str, results: Results) -> list[Plot]:
    """Accuracy over cost of each schedule, and, as in Figure 4 of the second paper, of each direction."""
    exhaustive, name = Interval(**results["chosen"][ALL_DRAWS]["accuracy"]), slug(f"{dataset}-{method}")
    kinds = dict.fromkeys(run["schedule"] for run in results["runs"])
    runs = {kind: [run for run in results["runs"] if run["schedule"] == kind] for kind in kinds}

    def by_setting(schedule: str, key: str, value: str | None) -> list[tuple[float, float]]:
        return front(run for run in runs.get(schedule, ()) if run["setting"][key] == value)

    lines = {kind: front(runs[kind]) for kind in kinds if kind != "racing"}
    for proposer in dict.fromkeys(run["setting"]["proposer"] for run in runs.get("racing", ())):
        label = f"racing, {proposer} first" if proposer else "racing"
        lines[label] = by_setting("racing", "proposer", proposer)
    sides = {f"from {side}": by_setting("hierarchical", "direction", side) for side in DIRECTIONS}
    figure_4 = f"{dataset}: hierarchical by direction (Figure 4 of the second paper)"
    plotted = {f"costs-{name}": (f"{dataset}: {method}", lines), f"directions-{name}": (figure_4, sides)}
    return [costs(key, title, fronts, exhaustive) for key, (title, fronts) in plotted.items() if any(fronts.values())]


def front(runs: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """(cost, accuracy) on the test races of the settings that are Pareto-optimal on the few-shot races."""
    optimal, best = [], -1.0
    for run in sorted(runs, key=lambda run: (run[LEARNED_FROM]["evaluations"], -run[LEARNED_FROM]["accuracy"])):
        if run[LEARNED_FROM]["accuracy"] > best:
            best = run[LEARNED_FROM]["accuracy"]
            optimal.append((run[MEASURED_ON]["evaluations"], run[MEASURED_ON]["accuracy"]))
    return optimal


def _cost(draws: int, share: Mapping[str, Any]) -> Cell:
    """Evaluations per candidate, from their share of those at all draws."""

    def text(value: float) -> str:
        return f"{draws * value:.2f}"

    return Cell(text(share["value"]), bounds(share["low"], share["high"], text))
