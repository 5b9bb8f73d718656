"""Terminal output of the commands: tables, JSON, and the heat map file."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsd.errors import DsdError
from dsd.store import write_atomic

if TYPE_CHECKING:
    from dsd.estimate import Need
    from dsd.matcher import Heatmap
    from dsd.report.leaderboard import Board, Entry
    from dsd.statistics import Interval


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(
    headings: Iterable[str], rows: Iterable[Sequence[str]], *, number: str = "", title: str | None = None, gap: int = 2
) -> None:
    """Print a table that fits the terminal, or nothing if it has no rows; never wrap the column `number`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, gap - 1), pad_edge=False, title=title, title_justify="left")
    for heading in headings:
        aligned = "right" if heading == number else "left"
        table.add_column(heading, justify=aligned, overflow="fold", no_wrap=heading in ("", number))
    for row in rows:
        table.add_row(*row)
    if table.rows:
        Console(highlight=False, markup=False).print(table)


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


def check_heatmap(path: Path) -> None:
    """Raise DsdError unless an image file can be written at this path; done before a checkpoint is opened."""
    from matplotlib.figure import Figure

    kinds = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in kinds:
        raise DsdError(f"--heatmap {path}: not the name of an image file; it must end in one of .{', .'.join(kinds)}")
    if not path.parent.is_dir():
        raise DsdError(f"--heatmap {path}: no folder {path.parent}")
    check_output("--heatmap", path)


def check_output(option: str, path: Path) -> None:
    """Raise DsdError unless a file can be written at this path, where folders may be made."""
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir() or not (there.is_dir() and os.access(there, os.W_OK)):
        raise DsdError(f"{option} {path}: {'a folder' if path.is_dir() else f'{there} is no writable folder'}")


def save_heatmap(heatmap: Heatmap, path: Path) -> None:
    """Save the image, and next to it a copy per word overlaid with that word's heat map, as one image file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.2 * (len(heatmap.words) + 1), 2.5), layout="constrained")
    axes = figure.subplots(1, len(heatmap.words) + 1)
    for panel in axes:
        panel.imshow(heatmap.picture)
        panel.axis("off")
    for panel, word, map_RR in zip(axes[1:], heatmap.words, heatmap.maps, strict=True):
        panel.imshow(map_RR, cmap="inferno", alpha=0.6, vmin=0, vmax=1)
        panel.set_title(word)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix(".").lower())
    try:
        write_atomic(path, image.getvalue())
    except OSError as error:
        raise DsdError(f"--heatmap {path}: {error.strerror}") from None
