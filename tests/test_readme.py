"""The README's table and figure are generated from metrics.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsd.config import Params, files, load
from dsd.errors import DataError
from dsd.report.readme import BEGIN, END, FIGURE, METRICS, Column, columns, figure, main, table, updated
from dsd.statistics import Interval
from tests.conftest import ROOT

VALUES = {"dsd": Interval(0.5, 0.4, 0.6, 10), "clip-zero-shot": Interval(0.25, 0.2, 0.3, 10)}
COLUMNS = [Column("d", "top1", 0.125, VALUES)]


@pytest.fixture
def shipped() -> tuple[list[Column], Params]:
    params = load(ROOT / "params.yaml")
    return columns(json.loads((ROOT / METRICS).read_text()), params.datasets), params


def test_the_table_has_values_intervals_and_chance() -> None:
    assert table(COLUMNS).splitlines() == [
        "| accuracy, % | d<br><sub>top1, n = 10</sub> |",
        "| --- | --- |",
        "| dsd | 50.0 <sub>[40.0, 60.0]</sub> |",
        "| clip-zero-shot | 25.0 <sub>[20.0, 30.0]</sub> |",
        "| *chance* | 12.5 |",
    ]


def test_only_the_text_between_the_markers_changes() -> None:
    new = updated(f"before\n{BEGIN}\nold\n{END}\nafter", "table")
    assert new == f"before\n{BEGIN}\ntable\n{END}\nafter"
    assert updated(new, "table") == new


def test_missing_markers_are_reported() -> None:
    with pytest.raises(DataError, match="lacks the markers"):
        updated("no markers", "table")


def test_columns_are_the_headline_metrics(shipped: tuple[list[Column], Params]) -> None:
    cols, _ = shipped
    metrics = json.loads((ROOT / METRICS).read_text())
    assert [c.dataset for c in cols] == list(metrics)
    for column in cols:
        for method, value in column.values.items():
            assert value.as_dict() == metrics[column.dataset][method][column.metric]
    assert {c.dataset: (c.metric, c.chance) for c in cols} == {
        "scenes-com": ("macro", 1 / 2),
        "scenes-ref": ("top1", 1 / 10),
        "scenes-vqa": ("all", 1 / 13),
        "scenes-cls": ("top1", 1 / 96),
    }


def test_the_readme_shows_the_metrics_in_git(shipped: tuple[list[Column], Params]) -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.split(BEGIN, 1)[1].split(END, 1)[0].strip() == table(shipped[0])
    assert f"({FIGURE})" in readme


def test_the_figure_shows_the_metrics_in_git(shipped: tuple[list[Column], Params]) -> None:
    """Equal to the byte with the pinned vl-convert; `make readme` writes it."""
    cols, params = shipped
    assert (ROOT / FIGURE).read_text() == figure(cols, params.methods)
    assert (ROOT / FIGURE).stat().st_size < 100_000


def test_the_figure_is_deterministic_and_follows_the_values(shipped: tuple[list[Column], Params]) -> None:
    methods = shipped[1].methods
    drawn = figure(COLUMNS, methods)
    assert drawn == figure(COLUMNS, methods) and "<dc:date>" not in drawn
    moved = [Column("d", "top1", 0.125, VALUES | {"dsd": Interval(0.51, 0.4, 0.6, 10)})]
    assert drawn != figure(moved, methods)


def test_make_readme_writes_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("README.md", *map(str, files()), str(METRICS)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / FIGURE).parent.mkdir()
    monkeypatch.chdir(tmp_path)
    main()
    for path in (Path("README.md"), FIGURE):
        assert path.read_bytes() == (ROOT / path).read_bytes()
    (tmp_path / METRICS).unlink()
    with pytest.raises(SystemExit, match=r"readme: .*metrics\.json"):
        main()
