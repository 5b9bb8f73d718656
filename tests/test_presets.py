"""Presets: their settings stand in params.yaml, everything else as it was, and nothing of the user's is lost."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from dsd.config import Params, files
from dsd.errors import DsdError, ParamsError
from dsd.evaluation import gate
from flows import presets
from flows.presets import applied, put
from tests.conftest import ROOT


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in files(ROOT / "params.yaml"):
        shutil.copy(file, tmp_path)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def nothing(_: Params) -> list[tuple[str, str, str]]:
    return []


def lines() -> list[str]:
    """All lines of the params files."""
    return [line for file in files() for line in file.read_text().splitlines()]


def preset(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_what_a_preset_names_is_all_that_changes(clone: Path) -> None:
    before = lines()
    put(preset(clone, "images.resolution: 128\nimages.parity: null\nraces.datasets: {}\n"), commits=nothing)
    after = lines()
    changed = [line for line in after if line not in before]
    assert [line.split(" #")[0].strip() for line in changed] == ["resolution: 128", "parity: null", "datasets: {}"]
    assert len([line for line in before if line not in after]) == 5  # two rows were in races.datasets
    put(clone / "mine.yaml", commits=nothing)  # what is there is not written again
    changed = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True).stdout.splitlines()
    assert changed == [" M params.yaml", " M races.yaml", "?? mine.yaml"]


def test_all_files_are_written_or_none(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, write = lines(), presets.write_atomic

    def full(path: Path, data: bytes) -> None:
        if "races" in path.name:
            raise DsdError("disk full")
        write(path, data)

    monkeypatch.setattr(presets, "write_atomic", full)
    with pytest.raises(DsdError, match="disk full"):
        put(preset(clone, "seed: 5\nraces.datasets: {}\n"), commits=nothing)
    assert lines() == before and not list(clone.glob(".*.new"))
    with pytest.raises(ParamsError, match=r"races\.within\.0: Input should be less than or equal to 1"):
        put(preset(clone, "seed: 5\nraces.within: [2]\n"), commits=nothing)
    assert lines() == before


def test_changes_that_are_not_committed_are_kept(clone: Path) -> None:
    for name, key in (("params", "seed: 5"), ("studies", "studies: {}")):
        with Path(f"{name}.yaml").open("a") as file:
            file.write("# mine\n")
        with pytest.raises(ParamsError, match=rf"{name}\.yaml: has changes that are not committed and would be lost"):
            put(preset(clone, f"{key}\n"), commits=nothing)
        assert Path(f"{name}.yaml").read_text().endswith("# mine\n")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("image.resolution: 64", "image.resolution: unknown key 'image': did you mean 'images'?"),
        ("images.resolutions: 64", "images.resolutions: unknown key 'resolutions': did you mean 'resolution'?"),
        ("seed.more: 64", "seed.more: unknown key 'more'"),
        ("images.resolution: large", "images.resolution: Input should be a valid integer"),
        ("[seed, 4]", "not a mapping from keys of params.yaml to values"),
        ("seed: [", "not valid YAML"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_preset(text: str, line: str, clone: Path) -> None:
    path = preset(clone, text)
    with pytest.raises(ParamsError) as error:
        applied(path)
    assert str(error.value).startswith(f"{path}: {line}") and "\n" not in str(error.value)


def test_an_unknown_preset_says_which_there_are(clone: Path) -> None:
    (clone / "presets").mkdir()
    preset(clone / "presets", "seed: 5")
    with pytest.raises(ParamsError, match=r"unknown preset 'presets/min\.yaml': did you mean 'presets/mine\.yaml'"):
        applied(Path("presets/min.yaml"))


def test_what_has_no_revision_is_pinned(clone: Path) -> None:
    path = preset(clone, "backbones.embedded.source: owner/model\nseed: 5\n")
    put(path, commits=lambda params: [("backbones", "embedded", "0" * 40)] if params.seed == 5 else [])
    backbones = yaml.safe_load(Path("params.yaml").read_text())["backbones"]
    assert backbones["embedded"]["revision"] == "0" * 40 and backbones["embedded-clip"]["revision"] is None


@pytest.mark.parametrize("path", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_presets_make_sense(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, params = applied(path)
    assert path.read_text().startswith("# "), "what it reproduces, what it costs"
    assert set(params.studies) == set(), "studies are of the drawn benchmarks"
    assert yaml.safe_load(path.read_text())["backbone"] == params.backbone != "embedded"
    gate.check_gate(params, list(params.datasets))
