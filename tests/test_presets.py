"""Presets: their settings stand in params.yaml, everything else as it was, and nothing of the user's is lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from dsd.config import Params, files, load
from dsd.errors import DsdError, ParamsError
from dsd.evaluation import gate
from flows import presets
from flows.presets import applied, put, undo
from tests.conftest import ROOT


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for file in files(ROOT / "params.yaml"):
        shutil.copy(file, tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    Repo.init(no_scm=True).close()
    show = "grep ^seed params.yaml | tee data/report/page > data/evaluate/metrics.json"
    page = f"mkdir -p data/report data/evaluate && {show}"
    kept = "mkdir -p data/score && grep ^seed params.yaml >> data/score/all"
    stages = {
        "score": {"cmd": kept, "params": ["seed"], "outs": [{"data/score": {"persist": True}}]},
        "report": {
            "cmd": page,
            "params": ["seed"],
            "outs": ["data/report", {"data/evaluate/metrics.json": {"cache": False}}],
        },
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": stages}))
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
    undo()
    assert lines() == before
    with pytest.raises(ParamsError, match="--undo: no preset was applied in this workspace"):
        undo()


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


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a workspace but what DVC and presets keep for themselves."""
    names = (file for file in sorted(folder.rglob("*")) if file.is_file())
    own = ("models", ".dvc", "data/before")
    relative = {file.relative_to(folder).as_posix(): file.read_bytes() for file in names}
    return {name: content for name, content in relative.items() if not name.startswith(own)}


@pytest.mark.parametrize("reproduced", [False, True], ids=["in a fresh clone", "after a reproduction"])
def test_undo_brings_back_params_and_results(clone: Path, reproduced: bool) -> None:
    def reproduce() -> None:
        with Repo() as repo:
            repo.reproduce()

    if reproduced:
        reproduce()
    with Path("params.yaml").open("a") as file:
        file.write("# mine, not committed\n")
    states = [contents(clone)]
    for seed in (5, 6):
        put(preset(clone, f"seed: {seed}\n"), commits=nothing)
        put(clone / "mine.yaml", commits=nothing)  # again, as after an interruption
        reproduce()
        assert Path("data/report/page").read_text() == f"seed: {seed}\n"
        states.append(contents(clone))
    for state in states[1::-1]:
        assert undo() == str(clone / "mine.yaml")
        found = contents(clone)
        assert {name: found.get(name) for name in state if name != "mine.yaml"} == {
            name: content for name, content in state.items() if name != "mine.yaml"
        }
        assert set(found) - set(state) <= {"mine.yaml"}
    if reproduced:
        with Repo() as repo:
            assert not repo.status()


def test_undo_says_what_the_cache_lacks(clone: Path) -> None:
    with Repo() as repo:
        repo.reproduce()
    before = lines()
    put(preset(clone, "seed: 5\n"), commits=nothing)
    shutil.rmtree("data/report")
    shutil.rmtree(".dvc/cache")
    with pytest.raises(DsdError, match=r"^--undo: .*the params are those of before: run `dsd reproduce`$"):
        undo()
    assert lines() == before


def test_a_preset_can_add_rows(clone: Path) -> None:
    row = load().datasets["scenes-cls"].model_dump(mode="json", exclude_none=True)
    put(
        preset(
            clone,
            yaml.safe_dump(
                {"datasets.more": row, "gate.datasets.more": {"minimum_effect": 0, "maximum_regression": 0.9}}
            ),
        ),
        commits=nothing,
    )
    assert list(load().datasets)[-1] == "more" == list(load().gate.datasets)[-1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("image.resolution: 64", "image.resolution: unknown section 'image': did you mean 'images'?"),
        ("images.resolutions: 64", "unknown key 'images.resolutions': did you mean 'images.resolution'?"),
        ("seed: 1\nseed: 2", "not valid YAML: the key 'seed' is given twice"),
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


def test_a_folder_is_no_preset(clone: Path) -> None:
    with pytest.raises(ParamsError, match=r"^\.: Is a directory$"):
        applied(Path())


def test_an_unknown_preset_says_which_there_are(clone: Path) -> None:
    (clone / "presets").mkdir()
    preset(clone / "presets", "seed: 5")
    with pytest.raises(ParamsError, match=r"unknown preset 'presets/min\.yaml': did you mean 'presets/mine\.yaml'"):
        applied(Path("presets/min.yaml"))


def test_what_has_no_revision_is_pinned(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsd.estimate.check", nothing)
    path = preset(clone, "backbones.embedded.source: owner/model\nseed: 5\n")
    put(path, commits=lambda params: [("backbones", "embedded", "0" * 40)] if params.seed == 5 else [])
    backbones = yaml.safe_load(Path("params.yaml").read_text())["backbones"]
    assert backbones["embedded"]["revision"] == "0" * 40 and backbones["embedded-clip"]["revision"] is None


PRESETS = sorted((ROOT / "presets").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_presets_make_sense(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, params = applied(path)
    assert path.read_text().startswith("# "), "what it reproduces, what it costs"
    assert set(params.studies) == set(), "studies are of the drawn benchmarks"
    if path.stem == "own-folder":  # of the user's own folder, with the model of his choice
        assert params.backbone == "embedded" and not params.trained
    else:
        assert yaml.safe_load(path.read_text())["backbone"] == params.backbone != "embedded"
    gate.check_gate(params, list(params.datasets))
