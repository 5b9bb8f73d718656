"""The leaderboard: one page of all evaluated and failed checkpoints, with trends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import mean

from scipy.stats import norm

from dsd.report.charts import Chart, trend, vega_bundle
from dsd.report.html import render
from dsd.report.tables import (
    NONE,
    Cell,
    Row,
    Table,
    best_of,
    bounds,
    count,
    names,
    p_value,
    percent,
    percent_cell,
    points,
)
from dsd.statistics import Difference, Interval

STAR = "★"
MARKS = {"promoted": "higher", "kept out": "no", "not compared": "lower"}  # verdict → CSS class


@dataclass(frozen=True)
class Entry:
    """An evaluated checkpoint: one version in the registry.

    now: whether it was evaluated with the current params; other params can mean other examples.
    scores: dataset → headline metric. differences: dataset → that metric minus that of the champion at the time,
    version `against`.
    """

    number: int
    name: str
    source: str
    digest: str
    commit: str
    when: datetime
    champion: bool
    now: bool
    scores: Mapping[str, Interval]
    differences: Mapping[str, Difference]
    against: int | None
    verdict: str
    reason: str

    @property
    def mean(self) -> float:
        return mean(score.value for score in self.scores.values()) if self.scores else 0.0

    @property
    def label(self) -> str:
        return f"{STAR} {self.name}" if self.champion else self.name


@dataclass(frozen=True)
class Failure:
    """A checkpoint whose evaluation failed; one that is given up is not retried."""

    name: str
    source: str
    reason: str
    attempts: int
    given_up: bool
    when: datetime


@dataclass(frozen=True)
class Board:
    """metrics: dataset → headline metric. confidence: of all intervals."""

    method: str
    metrics: Mapping[str, str]
    confidence: float
    entries: Sequence[Entry]
    failures: Sequence[Failure]

    @property
    def ranked(self) -> list[Entry]:
        """Entries with the current params, by descending mean over the datasets."""
        return sorted((entry for entry in self.entries if entry.now), key=lambda e: (-e.mean, -e.number))

    @property
    def selection(self) -> str:
        """A warning that the best of several checkpoints is selected on the test examples; "" for fewer than two.

        It has the expected lead of the best of n equally good checkpoints over their mean on each dataset, with
        independent normal errors (Blom 1958, eq. 6.9.2). Checkpoints that err on the same examples lead by less.
        """
        n, leads = len(self.ranked), []
        if n < 2:
            return ""
        for name in self.metrics:
            if spans := [e.scores[name].high - e.scores[name].low for e in self.ranked if name in e.scores]:
                error = mean(spans) / (2 * norm.isf((1 - self.confidence) / 2))
                leads.append(f"{100 * error * norm.ppf((n - 0.375) / (n + 0.25)):.1f} points on {name}")
        return (
            f"All {n} checkpoints were measured on the same test examples, so the best of them is selected on the test "
            f"set and its value is too high: of {n} equally good checkpoints the best is ahead of their mean by up to "
            f"{names(leads)} by chance alone. Measure it on new examples (another `seed`) before quoting it."
        )

    @property
    def others(self) -> list[Entry]:
        """Entries with other params, newest first."""
        return sorted((entry for entry in self.entries if not entry.now), key=lambda e: -e.number)


def write(board: Board, target: Path) -> Path:
    """Write the page and return its path."""
    return render(
        "leaderboard.html.j2",
        target,
        board=board,
        champion=next((entry for entry in board.entries if entry.champion), None),
        confidence=f"{100 * board.confidence:g} %",
        ranked=scores(board, board.ranked, "Checkpoints evaluated with the current params"),
        others=scores(board, board.others, "Checkpoints evaluated with other params") if board.others else None,
        compared=comparisons(board),
        failed=failures(board) if board.failures else None,
        trends=trends(board),
        vega=vega_bundle(),
    )


def scores(board: Board, entries: Sequence[Entry], caption: str) -> Table:
    """Checkpoints × datasets with intervals, the best of each column marked."""
    columns = {name: [e.scores[name] for e in entries if name in e.scores] for name in board.metrics}
    best = {name: best_of(values) for name, values in columns.items()}

    def cell(entry: Entry, name: str) -> Cell:
        score = entry.scores.get(name)
        return percent_cell(score, mark="best" if score and score.value == best[name] else "")

    rows = [
        Row(
            entry.label,
            [
                Cell(str(entry.number)),
                *(cell(entry, name) for name in board.metrics),
                Cell(f"{percent(entry.mean)} %" if entry.scores else NONE),
                Cell(entry.verdict or NONE, mark=MARKS.get(entry.verdict, "")),
                Cell(f"{entry.when:%Y-%m-%d}"),
                Cell(entry.commit[:8] + "+" * entry.commit.endswith("+")),
            ],
            "total" if entry.champion else "",
        )
        for entry in entries
    ]
    sizes = {name: " or ".join(map(count, sorted({v.n for v in values}))) for name, values in columns.items()}
    heads = [f"{name}\n{metric}, n = {sizes[name] or NONE}" for name, metric in board.metrics.items()]
    return Table(caption, ["checkpoint", "version", *heads, "mean", "verdict", "evaluated", "code"], rows)


def comparisons(board: Board) -> Table:
    """The gate's verdict on every checkpoint, newest first, with the differences that it is based on."""

    def cell(entry: Entry, name: str) -> Cell:
        if (d := entry.differences.get(name)) is None:
            return Cell(NONE)
        mark = "higher" if d.low > 0 else "lower" if d.high < 0 else ""
        return Cell(points(d.value), f"{bounds(d.low, d.high)} p {p_value(d.p)}", mark)

    rows = [
        Row(
            entry.label,
            [
                Cell(str(entry.number)),
                Cell(NONE if entry.against is None else str(entry.against)),
                *(cell(entry, name) for name in board.metrics),
                Cell(entry.verdict or NONE, mark=MARKS.get(entry.verdict, "")),
                Cell(entry.reason or "not submitted to the gate"),
            ],
        )
        for entry in sorted(board.entries, key=lambda e: -e.number)
    ]
    head = ["checkpoint", "version", "against\nversion", *(f"{name}\npercentage points" for name in board.metrics)]
    return Table("Challenger minus champion", [*head, "verdict", "reason"], rows)


def failures(board: Board) -> Table:
    rows = [
        Row(
            failure.name,
            [
                Cell(str(failure.attempts)),
                Cell("given up" if failure.given_up else "to be retried", mark="lower" if failure.given_up else ""),
                Cell(f"{failure.when:%Y-%m-%d %H:%M} UTC"),
                Cell(failure.reason),
            ],
        )
        for failure in board.failures
    ]
    return Table("Failed checkpoints", ["checkpoint", "attempts", "state", "last attempt", "reason"], rows)


def trends(board: Board) -> list[Chart]:
    """The metric of each dataset over all checkpoints, by version."""
    charts = []
    for name, metric in board.metrics.items():
        entries = sorted((entry for entry in board.entries if name in entry.scores), key=lambda e: e.number)
        if entries:
            places = [(f"{e.name[:12]}, {e.when:%d %b}", e.scores[name], e.now) for e in entries]
            champion = next((place for place, entry in enumerate(entries) if entry.champion), None)
            charts.append(trend(name, metric, places, champion))
    return charts
