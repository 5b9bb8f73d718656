"""Output of the pipeline's commands."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dsd.terminal import print_table

if TYPE_CHECKING:
    from dsd.estimate import Need
    from dsd.report.leaderboard import Board, Entry
    from dsd.statistics import Interval


def print_needs(needs: Iterable[Need]) -> None:
    """Print what a reproduction needs."""
    rows = []
    for need in needs:
        much = "" if need.problem and not need.amount else amount(need.amount, need.unit)
        rows.append((need.what, need.where, much, "problem" if need.problem else ""))
    print_table(("what", "of", "how much", ""), rows, number="how much")


def amount(value: float, unit: str) -> str:
    """Format an amount; bytes get the prefix that leaves one to three digits before the point."""
    if unit != "bytes":
        return f"{value:,.1f} h" if unit == "h" else f"{value:,.0f}"
    power = min(4, int(math.log10(value) // 3)) if value >= 1 else 0
    return f"{value / 1000**power:.1f} {('', 'k', 'M', 'G', 'T')[power]}B"


def print_leaderboard(board: Board) -> None:
    """Print the leaderboard; tables without rows are omitted."""
    from dsd.report.leaderboard import failures
    from dsd.report.tables import NONE, count, interval, percent

    def score(value: Interval | None) -> str:
        return NONE if value is None else f"{percent(value.value)} %\n{interval(value)}\nn = {count(value.n)}"

    def row(entry: Entry) -> Sequence[str]:
        return (
            f"{entry.label}\nversion {entry.number}",
            *(score(entry.scores.get(name)) for name in board.metrics),
            f"{percent(entry.mean)} %" if entry.scores else NONE,
            f"{entry.verdict or NONE}\n{entry.when:%Y-%m-%d}",
        )

    datasets = (f"{dataset}\n{metric}" for dataset, metric in board.metrics.items())
    headings = ["checkpoint", *datasets, "mean", "verdict"]
    print_table(headings, map(row, board.ranked), gap=1)
    if board.selection:
        print(board.selection)
    print_table(headings, map(row, board.others), title="measured with other params", gap=1)
    failed = failures(board)
    rows = ((row.head, *(cell.text for cell in row.cells)) for row in failed.rows)
    print_table(failed.head, rows, title=failed.caption, gap=1)
    if not board.entries and not board.failures:
        print("no checkpoint is registered; run `dsd promote` or `dsd watch`")
