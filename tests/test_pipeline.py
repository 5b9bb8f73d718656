"""The whole DAG as a user runs it, on tiny models: from a workspace to a report, killed and resumed, once in MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, read_settings, write_settings
from tests.tiny import save_checkpoints, small

pytestmark = pytest.mark.slow


def fill(folder: Path) -> Path:
    """A workspace with the project's code and tiny checkpoints: what a clone is."""
    for name in ("dsd", "flows"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    (folder / ".dvc").mkdir()
    shutil.copy(ROOT / ".dvc" / "config", folder / ".dvc")
    save_checkpoints(folder / "models")
    for results in ("studies", "races"):
        (folder / "data" / results).mkdir(parents=True)
    settings = small(Path("models")).model_dump(mode="json")
    write_settings(settings, folder)
    (folder / "data" / "timings").mkdir(parents=True)
    pretrained = {
        "stage": "pretrain",
        "seconds": 0.0,
        "finished": "2026-01-01T00:00:00+00:00",
        "device": "",
        "details": {},
    }
    (folder / "data" / "timings" / "pretrain.json").write_text(json.dumps(pretrained))
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "clone"],
    ):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def environment() -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    return inherited | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def run(folder: Path, module: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", module]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def reproduce(folder: Path) -> str:
    done = run(folder, "flows.reproduce")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def runs(folder: Path) -> list[tuple[str, ...]]:
    """(kind, dataset, method) of every MLflow run."""
    script = (
        "import json, mlflow; mlflow.set_tracking_uri('sqlite:///mlflow.db');"
        "runs = mlflow.search_runs(search_all_experiments=True, output_format='list');"
        "print(json.dumps([run.data.tags for run in runs]))"
    )
    out = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=True).stdout
    return sorted(
        tuple(tags.get(f"dsd.{key}", "") for key in ("kind", "dataset", "method")) for tags in json.loads(out)
    )


def killed(folder: Path, module: str, when: Callable[[], bool]) -> None:
    """Runs a stage and sends it kill -9 as soon as `when` holds."""
    process = subprocess.Popen([sys.executable, "-m", module], cwd=folder, env=environment(), start_new_session=True)
    while process.poll() is None and not when():
        time.sleep(0.05)
    assert process.poll() is None, "the stage was over before it could be killed"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_from_a_clone_to_a_report_and_back_after_a_kill(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    assert "report: data/report/index.html" in reproduce(folder)
    metrics = (folder / "data/evaluate/metrics.json").read_bytes()
    methods = [
        "clip-finetune",
        "clip-prompt",
        "clip-zero-shot",
        "denoising",
        "dsd",
        "dsd-plus",
        "dsd-released",
        "dsd-zero-shot",
    ]
    assert sorted(json.loads(metrics)["scenes-com"]) == methods
    page = (folder / "data/report/index.html").read_text()
    assert "scenes-com" in page and 'src="http' not in page
    first = runs(folder)
    assert [run[2] for run in first if run[0] == "result"] == methods
    assert [run[2] for run in first if run[0] == "training"] == ["clip-finetune", "clip-prompt", "dsd"]

    assert "up to date" in reproduce(folder)
    assert runs(folder) == first

    # Killed within train and within score: the next call ends with the same bytes.
    for stage, kept in (("train", "state.pt"), ("score", "evidence-*.json")):
        place = folder / "data" / stage / "scenes-com"
        shutil.rmtree(place)
        killed(folder, f"flows.stages.{stage}", lambda place=place, kept=kept: any(place.rglob(kept)))  # type: ignore[misc]
        assert run(folder, f"flows.stages.{stage}").returncode == 0
    assert run(folder, "flows.stages.evaluate").returncode == 0
    assert (folder / "data/evaluate/metrics.json").read_bytes() == metrics


def test_a_users_own_pictures_with_nothing_trained(tmp_path: Path) -> None:
    folder, own = fill(tmp_path / "clone"), tmp_path / "own"
    own.mkdir()
    rows = ["image,text,label"]
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(own / f"{number}.png")
        rows += [f"{number}.png,a red circle,{number % 2}", f"{number}.png,a blue star,{1 - number % 2}"]
    (own / "pairs.csv").write_text("\n".join(rows))
    settings = read_settings(folder)
    row = dict(kind="folder", source=str(own), table="pairs.csv", few_shot=0, sample=0, validation=0)
    settings["datasets"] = {"mine": row | {"test": None, "missing": 0}}
    settings["methods"] = {name: settings["methods"][name] for name in ("denoising", "clip-zero-shot")}
    settings |= {"training": {}, "schedules": {}}
    settings["ablations"]["methods"], settings["races"]["datasets"] = [], {}
    write_settings(settings, folder)
    assert "report: data/report/index.html" in reproduce(folder)
    metrics = json.loads((folder / "data/evaluate/metrics.json").read_text())
    assert {method: row["top1"]["n"] for method, row in metrics["mine"].items()} == {
        "denoising": 4,
        "clip-zero-shot": 4,
    }


def test_a_users_mistake_is_one_line(tmp_path: Path) -> None:
    folder = fill(tmp_path)
    settings = read_settings(folder)
    settings["training"]["dsd"]["learningrate"] = 1
    write_settings(settings, folder)
    done = run(folder, "flows.stages.download")
    assert done.returncode == 1
    assert "did you mean 'training.dsd.learning_rate'" in done.stderr
    assert "Traceback" not in done.stderr
