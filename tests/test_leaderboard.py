"""The leaderboard shows the registry: champion, intervals, verdicts, failures and trends."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dsd.report.leaderboard import Board, Entry, Failure, scores, trends, write
from dsd.statistics import Difference, Interval
from flows.cli import app
from flows.registry.registry import Registry
from flows.watch.tick import tick
from tests.test_watch import Dag, change, checkpoint, fresh, watched  # noqa: F401 (fixtures)

COM, REF = "scenes-com", "scenes-ref"
START = datetime(2026, 11, 1, 12, 0, tzinfo=UTC)


def entry(number: int, name: str, share: float, **changes: object) -> Entry:
    score = {dataset: Interval(share, share - 0.03, share + 0.03, 500) for dataset in (COM, REF)}
    fields = dict(
        number=number, name=name, source=f"/checkpoints/{name}", digest=f"{number:032x}", commit="c" * 40,
        when=START + timedelta(days=number), champion=False, now=True, scores=score, differences={}, against=None,
        verdict="kept out", reason="not shown to be better, and a tie keeps the champion",
    )  # fmt: skip
    return Entry(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.fixture
def board() -> Board:
    gain = {REF: Difference(0.06, 0.02, 0.1, 0.004, 500), COM: Difference(-0.004, -0.03, 0.02, 0.8, 500)}
    entries = [
        entry(1, "first", 0.5, verdict="promoted", reason="there was no champion", now=False),
        entry(2, "first", 0.52, verdict="promoted", reason="the champion itself, measured on other examples"),
        entry(3, "worse", 0.47, against=2, differences={REF: Difference(-0.05, -0.09, -0.01, 0.02, 500)}),
        entry(4, "best", 0.58, champion=True, verdict="promoted", reason="better", against=2, differences=gain),
        entry(5, "<b>bold</b>", 0.56, verdict="", reason=""),
    ]
    failed = Failure("broken", "/checkpoints/broken", "cache: lacks the component vae/", 3, True, START)
    return Board("dsd", {COM: "macro", REF: "top1"}, 0.95, entries, [failed])


class Page(HTMLParser):
    """The tables of a page as rows of texts by caption, and its external references."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        shown = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
        self.external = re.findall(r'(?:src|href)="(?!#|data:)([^"]*)"', shown)
        self._caption, self._open = "", ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self._open = tag if tag in ("caption", "th", "td", "tr", "span", "small") else ""
        if tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        if tag in ("th", "td"):
            self.tables[self._caption][-1].append("")

    def handle_data(self, data: str) -> None:
        if self._open == "caption":
            self._caption = data.strip() or self._caption
        elif self._open in ("th", "td", "span", "small") and data.strip() and self._caption:
            self.tables[self._caption][-1][-1] += data.strip() + " "


def test_the_page_lists_every_checkpoint_once_in_order(board: Board, tmp_path: Path) -> None:
    text = write(board, tmp_path / "page" / "index.html").read_text()
    page = Page(text)
    assert list(page.tables) == [
        "Checkpoints evaluated with the current params",
        "Checkpoints evaluated with other params",
        "Challenger minus champion",
        "Failed checkpoints",
    ]
    now = page.tables["Checkpoints evaluated with the current params"][1:]
    assert [row[0].strip() for row in now] == ["★ best", "<b>bold</b>", "first", "worse"]
    assert now[0][2] == "58.0 % [55.0, 61.0] "
    assert [row[0].strip() for row in page.tables["Checkpoints evaluated with other params"][1:]] == ["first"]
    best = page.tables["Challenger minus champion"][2]
    assert (best[3], best[4]) == ("−0.4 [−3.0, +2.0] p 0.800 ", "+6.0 [+2.0, +10.0] p 0.004 ")
    assert page.tables["Failed checkpoints"][1] == [
        "broken ", "3 ", "given up ", "2026-11-01 12:00 UTC ", "cache: lacks the component vae/ ",
    ]  # fmt: skip
    assert not page.external and "<b>bold" not in text


def test_trends_are_chronological_with_the_champion_marked(board: Board) -> None:
    plots = trends(board)
    assert [plot.caption for plot in plots] == [COM, REF]
    assert "from 50.0 % to 56.0 % over 5 checkpoints; champion 58.0 %" in plots[0].svg


def test_the_board_warns_that_the_best_is_selected_on_the_test_set(board: Board, tmp_path: Path) -> None:
    """Four checkpoints, each with a standard error of 3 / 1.96 points: the best of four leads by 1.03 of them."""
    line = (
        "of 4 equally good checkpoints the best is ahead of their mean by up to 1.6 points on scenes-com and 1.6 points"
    )
    assert line in board.selection and line in write(board, tmp_path / "index.html").read_text()
    alone = Board("dsd", board.metrics, 0.95, board.entries[:2], [])
    assert not alone.selection and "selected on the test" not in write(alone, tmp_path / "alone.html").read_text()


def test_a_checkpoint_without_results_of_the_method_has_no_value(board: Board) -> None:
    bare = entry(6, "bare", 0.5, scores={})
    [row] = scores(board, [bare], "").rows
    assert [cell.text for cell in row.cells][1:4] == ["–", "–", "–"]


def test_an_empty_board_is_a_page(tmp_path: Path) -> None:
    text = write(Board("dsd", {COM: "macro"}, 0.95, [], []), tmp_path / "index.html").read_text()
    assert "There is no champion yet." in text and "No checkpoint has been evaluated yet." in text


def test_the_command_shows_the_registry(watched: Path, fresh: Dag) -> None:  # noqa: F811
    run = CliRunner().invoke(app, ["leaderboard"])
    assert run.exit_code == 0 and run.output.startswith("no checkpoint is registered; run `dsd promote`")
    for name in ("b", "c"):
        checkpoint(watched, name)
    fresh.right = {"embedded": 100, "b": 180}
    fresh.failing = {"c": "score: out of memory"}
    tick()
    board = json.loads(CliRunner().invoke(app, ["leaderboard", "--json"]).stdout)
    assert [(e["name"], e["champion"], e["verdict"]) for e in board["entries"]] == [
        ("b", True, "promoted"),
        ("embedded", False, "promoted"),
    ]
    difference = board["entries"][0]["differences"][REF]
    assert difference["value"] == pytest.approx(0.4) and difference["low"] > 0.3 and board["entries"][0]["against"] == 1
    assert [(f["name"], f["attempts"], f["given_up"]) for f in board["failures"]] == [("c", 1, False)]
    shown = CliRunner().invoke(app, ["leaderboard"], env={"COLUMNS": "80"}).output
    for part in ("★ b ", "version 2 ", " 90.0 % ", " [85.0, 95.0] ", " n = 200 ", "promoted", "score: out of memory"):
        assert part in shown
    run = CliRunner().invoke(app, ["leaderboard", "--html", "elsewhere/page.html"])
    assert run.output == "page: elsewhere/page.html\n" and "★ b" in Path("elsewhere/page.html").read_text()
    change(seed=1)
    board = json.loads(CliRunner().invoke(app, ["leaderboard", "--json"]).stdout)
    assert [e["now"] for e in board["entries"]] == [False, False] and len(Registry().versions()) == 2


def test_what_only_reads_creates_no_database(workspace: Path) -> None:
    before = sorted(workspace.iterdir())
    shown = CliRunner().invoke(app, ["leaderboard"])
    assert shown.exit_code == 0 and "no checkpoint is registered" in shown.output
    served = CliRunner().invoke(app, ["serve"])
    assert served.exit_code == 1 and served.output.startswith("dsd: models:/dsd-backbone@champion: no such version")
    assert sorted(workspace.iterdir()) == before
