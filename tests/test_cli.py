"""The command line: tables, JSON, heat maps, and one line per user error."""

from __future__ import annotations

import errno
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dsd import __version__, matcher
from dsd.errors import CheckpointError
from dsd.estimate import Need
from dsd.matcher import Heatmap
from flows.cli import app
from tests.conftest import ROOT


class Fake:
    """A matcher that prefers the text "right" and the image b.png."""

    @classmethod
    def from_pretrained(cls, path_or_id: str, prompt: Path | None = None, method: str = "") -> Self:
        if path_or_id == "absent":
            raise CheckpointError("absent: no such checkpoint folder")
        return cls()

    def score(self, images: list[Path], texts: list[str]) -> torch.Tensor:
        return torch.tensor([[(text == "right") + 0.1 * (image.name == "b.png") for text in texts] for image in images])

    def shares(self, scores_IT: torch.Tensor) -> torch.Tensor:
        return scores_IT.softmax(-1)

    def heatmap(self, image: Path, text: str) -> Heatmap:
        return Heatmap([text], np.zeros((1, 8, 8), np.float32), np.zeros((8, 8, 3), np.uint8))


@pytest.fixture(autouse=True)
def _fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two images in the current folder, and no model."""
    monkeypatch.setattr(matcher, "Matcher", Fake)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(name)


def run(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["match", *arguments])
    assert result.exit_code == code, result.output
    return result


def test_table_marks_the_best_text_of_each_image() -> None:
    lines = run("a.png", "b.png", "--text", "wrong", "--text", "right").output.splitlines()
    assert [line.split() for line in lines if "best" in line] == [
        ["a.png", "right", "1.00000", "73.1", "%", "best"],
        ["b.png", "right", "1.10000", "73.1", "%", "best"],
    ]


def test_a_single_text_has_one_best_image() -> None:
    matches = json.loads(run("a.png", "b.png", "--text", "right", "--json").output)
    assert [(row["image"], row["best"]) for row in matches] == [("a.png", False), ("b.png", True)]
    assert sum(row["share"] for row in matches) == pytest.approx(1)  # of the images, as there is one text


def test_a_tie_has_no_best() -> None:
    lines = run("a.png", "b.png", "--text", "wrong", "--text", "false").output.splitlines()
    assert not any("best" in line for line in lines)
    assert "best" not in run("a.png", "a.png", "--text", "right").output


def test_heatmap_is_written(tmp_path: Path) -> None:
    run("a.png", "--text", "right", "--heatmap", str(tmp_path / "where.png"))
    assert (tmp_path / "where.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "absent"], "dsd: absent: no such checkpoint folder"),
        (["--heatmap", "where.nonsense"], "dsd: --heatmap where.nonsense: "),
        (
            ["--heatmap", "no/such/folder/where.png"],
            "dsd: --heatmap no/such/folder/where.png: no folder no/such/folder",
        ),
        (["--heatmap", "folder.png"], "dsd: --heatmap folder.png: a folder"),
        (["--prompt", "models:/dsd-prompt-x/1"], "dsd: models:/dsd-prompt-x/1: no such version: sqlite:///"),
    ],
)
def test_a_user_error_is_one_line(arguments: list[str], message: str) -> None:
    Path("folder.png").mkdir()
    before = sorted(Path().iterdir())
    result = run("a.png", "--text", "right", *arguments, code=1)
    assert result.output.startswith(message)
    assert len(result.output.splitlines()) == 1 and sorted(Path().iterdir()) == before


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "where")

    monkeypatch.setattr(Fake, "heatmap", full)
    result = run("a.png", "--text", "right", "--heatmap", "where.png", code=1)
    assert result.output.startswith("dsd: where: disk full, ") and len(result.output.splitlines()) == 1


def test_every_image_that_cannot_be_read_has_a_line(tmp_path: Path) -> None:
    Path("broken.png").write_bytes(Path("a.png").read_bytes()[:40])
    Path("text.png").write_text("no image")
    result = run("absent.png", "a.png", "broken.png", "text.png", "--text", "right", "--checkpoint", "absent", code=1)
    names = [line.split(": ")[:2] for line in result.output.splitlines()]
    assert names == [["dsd", "absent.png"], ["dsd", "broken.png"], ["dsd", "text.png"]]


@pytest.mark.parametrize("command", [[], ["match"], ["reproduce"], ["doctor"]])
def test_help_shows_examples(command: list[str]) -> None:
    done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    assert "Examples:" in done.output and f"  dsd {' '.join(command)}" in done.output
    assert max(map(len, done.output.splitlines())) <= 80


def dry_run(monkeypatch: pytest.MonkeyPatch, problem: str | None) -> Any:
    needs = [Need("checkpoint embedded", "models/embedded", 2.5e9, "bytes", problem), Need("time", "", 0.5, "h", None)]
    monkeypatch.setattr("dsd.estimate.needs", lambda params, free: iter(needs))
    monkeypatch.setattr("dsd.config.load", lambda: None)
    return CliRunner().invoke(app, ["reproduce", "--dry-run", "--json"])


def test_a_dry_run_for_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    done = dry_run(monkeypatch, None)
    assert done.exit_code == 0
    assert json.loads(done.stdout)[0] == {
        "what": "checkpoint embedded", "where": "models/embedded", "amount": 2.5e9, "unit": "bytes", "problem": None,
    }  # fmt: skip
    done = dry_run(monkeypatch, "gone")
    assert (done.exit_code, json.loads(done.stdout)[0]["problem"]) == (1, "gone")


def test_json_is_of_a_dry_run_alone() -> None:
    done = CliRunner().invoke(app, ["reproduce", "--json"])
    assert (done.exit_code, done.output.splitlines()) == (1, [done.output.strip()])
    assert done.output.startswith("dsd: --json: only with --dry-run")


def test_version() -> None:
    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"dsd {__version__}\n")


def test_the_version_is_cheap() -> None:
    script = (
        "import sys; from flows.cli import app; app(['--version'], standalone_mode=False); "
        "print({'torch', 'prefect', 'mlflow', 'dvc', 'yaml'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f"dsd {__version__}\nset()\n"


def test_a_busy_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        done = CliRunner().invoke(app, ["serve", "--port", str(port)])
    assert (done.exit_code, done.output) == (1, f"dsd: --host 127.0.0.1 --port {port}: address already in use\n")
    done = CliRunner().invoke(app, ["serve", "--host", "nowhere.invalid"])
    assert done.exit_code == 1 and done.output.startswith("dsd: --host nowhere.invalid --port 5000: ")
    assert len(done.output.splitlines()) == 1
