"""What is installed: the wheel, its command, and the measurement of a user's own images without a workspace."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

from dsd import EMBEDDED, cli, errors, own
from dsd.engine.encodings import remember
from dsd.errors import DataError
from dsd.matcher import Matcher
from tests.conftest import ROOT

TABLE = "image,text,label\n{0},a red circle,1\n{0},a blue square,0\n"


@pytest.fixture(scope="module")
def matcher(models: Path) -> Matcher:
    return Matcher.from_pretrained(models / "embedded", device="cpu", levels=(0.4,))


def images(folder: Path, count: int) -> list[str]:
    """Different images."""
    for n in range(count):
        pixels = np.random.default_rng(n).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return [f"{n}.png" for n in range(count)]


def table(folder: Path, lines: str) -> Path:
    (folder / "pairs.csv").write_text(lines)
    return folder / "pairs.csv"


def test_own_images_are_scored_as_one_by_one(tmp_path: Path, matcher: Matcher) -> None:
    names = images(tmp_path, 5)
    texts = [[f"a {colour} circle", f"a {colour} square"] for colour in ("red", "blue", "green", "pink", "black")]
    lines = "image,text,label\n"
    for name, of_image in zip(names, texts, strict=True):
        lines += "".join(f"{name},{text},{int(t == 1)}\n" for t, text in enumerate(of_image))
    found = own.evaluate(matcher, table(tmp_path, lines))
    expected = [matcher.score(tmp_path / name, of_image).numpy() for name, of_image in zip(names, texts, strict=True)]
    by_file = {files[0]: scores for files, scores in zip(found.files, found.scores, strict=True)}
    for name, scores_IT in zip(names, expected, strict=True):
        np.testing.assert_allclose(by_file[name], scores_IT, rtol=1e-4, atol=1e-6)
    right = np.mean([scores_IT[0].argmax() == 1 for scores_IT in expected])
    assert found.accuracy["top1"].value == pytest.approx(right)
    assert (found.accuracy["top1"].n, found.chance["top1"], found.left_out) == (5, 0.5, {})


def test_what_cannot_be_measured_is_left_out_and_named(tmp_path: Path, matcher: Matcher) -> None:
    names = images(tmp_path, 2)
    (tmp_path / "same.png").write_bytes((tmp_path / names[0]).read_bytes())
    lines = "id,image,text,label\n"
    lines += f"one,{names[0]},a red circle,1\none,{names[1]},a red circle,0\n"
    lines += f"two,{names[0]},a red circle,1\ntwo,same.png,a red circle,0\n"
    lines += f"three,{names[1]},a red circle,1\nthree,{names[1]},A  RED circle,0\n"
    found = own.evaluate(matcher, table(tmp_path, lines))
    assert found.left_out == {
        "folder/two": "two images have the same pixels",
        "folder/three": "two texts are one to the model",
    }
    assert [example.id for example in found.examples] == ["folder/one"]


def test_a_table_with_nothing_left_is_refused(tmp_path: Path, matcher: Matcher) -> None:
    [name] = images(tmp_path, 1)
    lines = f"image,text,label\n{name},a red circle,1\n{name},A  RED circle,0\n"
    with pytest.raises(DataError, match="no example is left: two texts are one to the model"):
        own.evaluate(matcher, table(tmp_path, lines))


def test_evaluate_prints_and_saves(tmp_path: Path, matcher: Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Matcher, "from_pretrained", lambda *_, **__: matcher)
    path = table(tmp_path, TABLE.format(*images(tmp_path, 1)))
    done = CliRunner().invoke(cli.app, ["evaluate", str(path), "--json", "--scores", str(tmp_path / "scores.csv")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["accuracy"]["top1"]["chance"] == 0.5
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [(row["image"], row["label"]) for row in rows] == [("0.png", "1"), ("0.png", "0")]
    assert [row["best"] for row in rows].count("1") == 1
    shown = CliRunner().invoke(cli.app, ["evaluate", str(path)]).output
    assert "top1" in shown and "50.0 %" in shown


@pytest.mark.parametrize(("lines", "problem"), [("image,text\n", "no column 'label'"), ("", "no column 'image'")])
def test_a_wrong_table_is_one_line(lines: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_matcher", lambda *_: None)
    done = CliRunner().invoke(cli.app, ["evaluate", str(table(tmp_path, lines))])
    assert done.exit_code == 1 and problem in done.output and len(done.output.splitlines()) == 1


def test_an_extra_that_is_missing_is_named() -> None:
    missing = ModuleNotFoundError("No module named 'prefect'", name="prefect.flows")
    assert errors.error_line(missing) == "prefect is not installed; it comes with the extra dsd[pipeline]"
    assert errors.error_line(ModuleNotFoundError("No module named 'own'", name="own")) is None


def test_the_least_recently_used_is_forgotten() -> None:
    recent: dict[str, dict[str, np.ndarray]] = {}
    for used in (["a", "b"], ["c"], ["a"], ["d"]):
        remember(recent, {item: {} for item in used}, 3)
    assert list(recent) == ["c", "a", "d"]


def test_the_embedded_checkpoint_is_the_default() -> None:
    assert EMBEDDED == ROOT / "models/embedded"
    assert Matcher.from_pretrained().backbone.digest == Matcher.from_pretrained(EMBEDDED).backbone.digest


def build(target: Path) -> Path:
    """Build a wheel."""
    own_python = Path(sys.executable).parent
    command = [own_python / "uv", "build", "-q", "--wheel", "--out-dir", target, ROOT]
    subprocess.run(command, check=True, env={**os.environ, "SOURCE_DATE_EPOCH": "1700000000"})
    return next(target.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_works_from_any_folder(tmp_path: Path) -> None:
    wheel = build(tmp_path / "one")
    assert wheel.read_bytes() == build(tmp_path / "two").read_bytes()
    assert wheel.stat().st_size < 15_000_000
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dsd"}
    # The libraries of this environment; its own dsd is behind that of the wheel, and flows is out of reach.
    venv.create(tmp_path / "env", with_pip=False)
    site = next((tmp_path / "env").glob("lib/*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    (site / "libraries.pth").write_text(str(Path(torch.__file__).parents[1]))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [tmp_path / "env/bin/python", "-c", "from dsd.cli import run; run()", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})

    images(tmp_path, 1)
    done = run("match", "0.png", "--text", "a red circle", "--text", "a blue square", "--json")
    assert done.returncode == 0, done.stderr
    ours = Matcher.from_pretrained().score(tmp_path / "0.png", ["a red circle", "a blue square"])
    assert [row["score"] for row in json.loads(done.stdout)] == pytest.approx(ours[0].tolist(), rel=1e-4)


def test_every_supported_python_runs_the_checks() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = "Programming Language :: Python :: 3."
    named = [line.rsplit(" ", 1)[1] for line in project["classifiers"] if line.startswith(python)]
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert all(jobs[job]["strategy"]["matrix"]["python"] == named for job in ("test", "wheel"))
    assert "make docs" in [step.get("run") for step in jobs["docs"]["steps"]]
    assert ".ci/run" in [step.get("run") for step in jobs["test"]["steps"]]
    for file in sorted((ROOT / ".github").rglob("*.yml")):
        assert yaml.safe_load(file.read_text()), file
