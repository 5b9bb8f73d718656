"""The command line: tables, JSON, heat maps, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from dsd import matcher
from dsd.errors import CheckpointError
from dsd.matcher import Heatmap
from flows.cli import app


class Fake:
    """A matcher that likes the text "right" and the picture b.png."""

    @classmethod
    def from_pretrained(cls, path_or_id: str, prompt: Path | None = None, method: str = "") -> Self:
        if path_or_id == "absent":
            raise CheckpointError("absent: no such checkpoint folder")
        return cls()

    def score(self, images: list[Path], texts: list[str]) -> torch.Tensor:
        return torch.tensor([[(text == "right") + 0.1 * (image.name == "b.png") for text in texts] for image in images])

    def heatmap(self, image: Path, text: str) -> Heatmap:
        return Heatmap([text], np.zeros((1, 8, 8), np.float32), np.zeros((8, 8, 3), np.uint8))


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matcher, "Matcher", Fake)


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["match", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_table_marks_the_best_text_of_each_picture() -> None:
    lines = run("a.png", "b.png", "--text", "wrong", "--text", "right").output.splitlines()
    assert [line.split() for line in lines if "best" in line] == [
        ["a.png", "right", "1.00000", "best"],
        ["b.png", "right", "1.10000", "best"],
    ]


def test_a_single_text_has_one_best_picture() -> None:
    found = json.loads(run("a.png", "b.png", "--text", "right", "--json").output)
    assert [(row["image"], row["best"]) for row in found] == [("a.png", False), ("b.png", True)]


def test_heatmap_is_written(tmp_path: Path) -> None:
    run("a.png", "--text", "right", "--heatmap", str(tmp_path / "where.png"))
    assert (tmp_path / "where.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "absent"], "dsd: absent: no such checkpoint folder"),
        (["--heatmap", "where.nonsense"], "dsd: --heatmap where.nonsense: "),
        (["--heatmap", "no/such/folder/where.png"], "dsd: --heatmap no/such/folder/where.png: "),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    result = run("a.png", "--text", "right", *arguments, code=1)
    assert result.output.startswith(message)
    assert len(result.output.splitlines()) == 1


def test_help_shows_examples() -> None:
    assert "dsd match photo.png --text" in run("--help").output
