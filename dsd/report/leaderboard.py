"""The leaderboard: one page over all checkpoints that were measured or failed, with trends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import mean

from dsd.report import environment, figures
from dsd.report.tables import NONE, Cell, Row, Table, count, interval, p_value, percent, points
from dsd.statistics import Difference, Interval
from dsd.store import write_atomic

STAR = "★"


@dataclass(frozen=True)
class Entry:
    """A measured checkpoint, by the number of its version.

    now: whether it was measured with the params of now; values of others need not be of the same examples.
    scores: dataset → headline metric. differences: dataset → the same minus that of the champion of then, `against`.
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
    """A checkpoint that could not be measured; of the given up no more attempts are made."""

    name: str
    source: str
    reason: str
    attempts: int
    given_up: bool
    when: datetime


@dataclass(frozen=True)
class Board:
    """metrics: dataset → the headline metric by which checkpoints are compared. confidence: of all intervals."""

    method: str
    metrics: Mapping[str, str]
    confidence: float
    entries: Sequence[Entry]
    failures: Sequence[Failure]

    @property
    def ranked(self) -> list[Entry]:
        """What was measured with the params of now, the best in the mean of the datasets first."""
        return sorted((entry for entry in self.entries if entry.now), key=lambda e: (-e.mean, -e.number))

    @property
    def others(self) -> list[Entry]:
        """What was measured with other params, the newest first."""
        return sorted((entry for entry in self.entries if not entry.now), key=lambda e: -e.number)


def write(board: Board, target: Path) -> Path:
    """Writes the page and returns its path."""
    champion = next((entry for entry in board.entries if entry.champion), None)
    page = (
        environment()
        .get_template("leaderboard.html.j2")
        .render(
            board=board,
            champion=champion,
            confidence=f"{100 * board.confidence:g} %",
            ranked=scores(board, board.ranked, "Checkpoints measured with the params of now"),
            others=scores(board, board.others, "Checkpoints measured with other params") if board.others else None,
            compared=comparisons(board),
            failed=failures(board) if board.failures else None,
            trends=trends(board),
        )
    )
    write_atomic(target, page.encode())
    return target


def scores(board: Board, entries: Sequence[Entry], caption: str) -> Table:
    """Checkpoints × datasets with intervals, the best of each column marked."""
    best = {name: max((e.scores[name].value for e in entries if name in e.scores), default=0) for name in board.metrics}

    def cell(entry: Entry, name: str) -> Cell:
        if (found := entry.scores.get(name)) is None:
            return Cell(NONE)
        return Cell(f"{percent(found.value)} %", interval(found), "best" if found.value == best[name] else "")

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
    sizes = {name: {e.scores[name].n for e in entries if name in e.scores} for name in board.metrics}
    columns = [
        f"{name}\n{metric}, n = {' or '.join(map(count, sorted(sizes[name]))) or NONE}"
        for name, metric in board.metrics.items()
    ]
    return Table(caption, ["checkpoint", "version", *columns, "mean", "verdict", "measured", "code"], rows)


MARKS = {"promoted": "higher", "kept out": "no", "not compared": "lower"}  # a verdict's colour


def comparisons(board: Board) -> Table:
    """What the gate said of every checkpoint, the newest first, and what that rests on."""

    def cell(entry: Entry, name: str) -> Cell:
        if (d := entry.differences.get(name)) is None:
            return Cell(NONE)
        word = "higher" if d.low > 0 else "lower" if d.high < 0 else ""
        return Cell(points(d.value), f"[{points(d.low)}, {points(d.high)}] p {p_value(d.p)}", word)

    rows = [
        Row(
            entry.label,
            [
                Cell(str(entry.number)),
                Cell(NONE if entry.against is None else str(entry.against)),
                *(cell(entry, name) for name in board.metrics),
                Cell(entry.verdict or NONE, mark=MARKS.get(entry.verdict, "")),
                Cell(entry.reason or "the gate was not asked"),
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
                Cell("given up" if failure.given_up else "is tried again", mark="lower" if failure.given_up else ""),
                Cell(f"{failure.when:%Y-%m-%d %H:%M} UTC"),
                Cell(failure.reason),
            ],
        )
        for failure in board.failures
    ]
    return Table("Checkpoints that failed", ["checkpoint", "attempts", "state", "last attempt", "reason"], rows)


def trends(board: Board) -> list[figures.Drawing]:
    """The metric of each dataset over all checkpoints, in the order of their versions."""
    drawn = []
    for name, metric in board.metrics.items():
        entries = sorted((entry for entry in board.entries if name in entry.scores), key=lambda e: e.number)
        if not entries:
            continue
        places = [(f"{e.name[:12]}\n{e.when:%d %b}", e.scores[name], e.now) for e in entries]
        champion = next((place for place, entry in enumerate(entries) if entry.champion), None)
        drawn.append(figures.trend(name, metric, places, champion))
    return drawn
