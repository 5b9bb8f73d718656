"""The README's numbers are those of metrics.json, and none is typed by hand."""

from __future__ import annotations

import json

import pytest

from dsd.errors import DataError
from dsd.report.readme import BEGIN, END, table, updated
from tests.conftest import ROOT

METRICS = {"d": {"m": {"top1": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}}}


def test_the_table_is_between_the_marks_and_nothing_else_moves() -> None:
    text = f"before\n{BEGIN}\nold\n{END}\nafter"
    new = updated(text, METRICS)
    assert new.startswith("before\n") and new.endswith("\nafter") and "old" not in new
    assert "| d | top1 (n = 10) |" in new and "| m | 50.0 [40.0, 60.0] |" in new
    assert updated(new, METRICS) == new


def test_missing_marks_are_an_error() -> None:
    with pytest.raises(DataError, match="lacks the marks"):
        updated("no marks", METRICS)


def test_the_readme_shows_the_metrics_in_git() -> None:
    path, readme = ROOT / "data" / "evaluate" / "metrics.json", (ROOT / "README.md").read_text()
    shown = readme.split(BEGIN, 1)[1].split(END, 1)[0].strip()
    assert shown == (table(json.loads(path.read_text())) if path.exists() else "")
