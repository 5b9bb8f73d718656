"""The watch evaluates new checkpoints once, gives up on repeated failures, and does not change the workspace."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from mlflow.entities import Run
from typer.testing import CliRunner

from dsd.config import BackboneParams, load
from dsd.data.examples import MatchingExample, write_examples
from dsd.errors import DsdError
from dsd.models.checkpoint import locate
from dsd.scorers.evidence import write_index
from flows import tracking
from flows.cli import app
from flows.command import last_line
from flows.registry.attempts import KILLED
from flows.registry.registry import CHAMPION, Registry
from flows.reproduce import free_port
from flows.stores import DATABASE, MLFLOW
from flows.watch import tick as watching
from flows.watch.clone import clone
from flows.watch.tick import tick, tick_lock
from tests.conftest import ROOT, read_settings, write_settings
from tests.hubserver import COMMIT, Hub, connected, files_of

REF = "scenes-ref"
EXAMPLES = [MatchingExample(f"e{n}", (f"i{n}",), ("a", "b"), ((0, 0),), "color") for n in range(200)]


@dataclass
class Dag:
    """A fake of the clone and of its DAG: the number of right answers of each checkpoint, and the failures."""

    right: dict[str, int] = field(default_factory=dict)
    failing: dict[str, str | BaseException] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)

    def clone(self, target: Path, name: str, row: BackboneParams) -> Path:
        target.mkdir(parents=True, exist_ok=True)
        settings = read_settings()
        settings["backbones"][name] = row.model_dump(mode="json")
        write_settings({**settings, "backbone": name}, target)
        (target / "dvc.lock").write_text("schema: '2.0'\n")
        return target

    def reproduce(self, target: Path, lock: int, attempt: str) -> None:
        params = load(target / "params.yaml")
        name = Path(params.backbones[params.backbone].source).name
        self.ran.append(name)
        if name in self.failing:
            error = self.failing[name]
            raise DsdError(error) if isinstance(error, str) else error
        measure(target, self.right.get(name, 100), params.seed)


def measure(folder: Path, right: int, seed: int) -> None:
    """Write the results of a reproduction; another seed has other examples."""
    questions(folder, seed)
    rows = [{"method": "dsd", "rank": 1 if n < right else 2} for n in range(len(EXAMPLES) - seed)]
    scores = folder / "data/evaluate/scores"
    scores.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), scores / f"{REF}.parquet")
    share = right / len(EXAMPLES)
    interval = {"value": share, "low": share - 0.05, "high": share + 0.05, "n": len(EXAMPLES)}
    (scores.parent / "metrics.json").write_text(json.dumps({REF: {"dsd": {"top1": interval}}}))


def questions(folder: Path, seed: int) -> None:
    path = folder / "data/prepare" / REF / "examples.parquet"
    if not path.exists():
        write_examples(path, (("test", e) for e in EXAMPLES[seed:]))
        write_index(folder / "data/score" / REF, {}, [], 1, {})


@pytest.fixture
def watched(workspace: Path, database: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with a backbone of its own, one dataset and nothing in its sources; its folder of checkpoints."""
    shutil.copy(database, workspace)
    checkpoint(workspace / "models", "embedded", "100")
    settings = read_settings()
    settings["datasets"] = {REF: settings["datasets"][REF]}
    settings["gate"]["datasets"] = {REF: settings["gate"]["datasets"][REF]}
    settings["evaluate"]["resamples"] = 100
    settings |= {"studies": {}}
    settings["races"]["datasets"] = {}
    write_settings(settings)
    return workspace / "checkpoints"


@pytest.fixture
def fresh(watched: Path, monkeypatch: pytest.MonkeyPatch) -> Dag:
    """The fake, where nothing was evaluated yet."""
    found = Dag()
    monkeypatch.setattr(watching, "clone", found.clone)
    monkeypatch.setattr(watching, "reproduce", found.reproduce)
    return found


@pytest.fixture
def dag(fresh: Dag) -> Dag:
    """The fake, where the backbone of the workspace is the champion, as version 1."""
    fresh.right["embedded"] = 60
    assert tick().lines == ["embedded: evaluated, version 1", "embedded: version 1 promoted: there was no champion"]
    fresh.ran.clear()
    return fresh


def change(**changes: Any) -> None:
    write_settings({**read_settings(), **changes})


def watch_settings(**changes: Any) -> None:
    found = read_settings()["watch"]
    change(watch={**found, **changes})


def checkpoint(folder: Path, name: str, content: str = "") -> Path:
    """As much of a checkpoint as its digest is made of."""
    (folder / name / "unet").mkdir(parents=True, exist_ok=True)
    (folder / name / "unet" / "config.json").write_text(content or name)
    return folder / name


def attempts(status: str | None = None) -> list[Run]:
    found = tracking.Runs().find("attempt")
    return [run for run in found if status in (None, run.info.status)]


def test_every_new_checkpoint_is_evaluated_once_and_challenges_the_champion(watched: Path, dag: Dag) -> None:
    for name in ("a", "b"):
        checkpoint(watched, name)
    (watched / "notes").mkdir()
    (watched / ".b.tmp" / "unet").mkdir(parents=True)
    (watched / "notes.txt").touch()
    dag.right |= {"a": 100, "b": 180}
    report = tick()
    assert (report.failed, dag.ran) == (0, ["a", "b"])
    assert [line.partition(":")[0] for line in report.lines] == ["a", "a", "b", "b"]
    assert report.lines[1].startswith("a: version 2 promoted: better on scenes-ref +20.0 points")
    assert report.lines[3].startswith("b: version 3 promoted: better on scenes-ref +40.0 points")
    champion = Registry().alias(CHAMPION)
    assert champion is not None and (champion.number, champion.name) == (3, "b")
    assert champion.row.digest == champion.digest and champion.source == str(watched.resolve() / "b")
    assert {run.info.status for run in attempts()} == {"FINISHED"}
    assert not list(Path(".watch").glob("*/"))
    page = Path("data/leaderboard/index.html")
    before = page.stat().st_mtime_ns
    assert (tick().lines, dag.ran, page.stat().st_mtime_ns) == (["nothing new"], ["a", "b"], before)


def test_the_first_champion_is_the_backbone_of_the_workspace(watched: Path, fresh: Dag) -> None:
    """Not the first checkpoint of a source: nothing would have tested that one."""
    checkpoint(watched, "a")
    fresh.right = {"a": 60, "embedded": 100}
    rows: list[BackboneParams] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watching, "clone", lambda *args: rows.append(args[2]) or fresh.clone(*args))
        report = tick()
    assert fresh.ran == ["embedded", "a"]
    assert rows[0] == load().backbones["embedded"]  # as it is, so that what was reproduced is restored
    assert report.lines[:2] == [
        "embedded: evaluated, version 1",
        "embedded: version 1 promoted: there was no champion",
    ]
    assert report.lines[3].startswith("a: version 2 kept out: ")


@pytest.mark.parametrize("trouble", ["fails", "is not there"])
def test_without_it_there_is_no_champion(trouble: str, watched: Path, fresh: Dag) -> None:
    checkpoint(watched, "a")
    if trouble == "fails":
        fresh.failing = {"embedded": "score: out of memory"}
    else:
        Path("models").rename("elsewhere")
    waits = "a: version 1 not compared: there is no champion: the backbone of the workspace has to be evaluated first"
    report = tick()
    assert report.failed == 1 and waits in report.lines and Registry().alias(CHAMPION) is None
    for _ in range(3):
        tick()
    assert Registry().alias(CHAMPION) is None
    fresh.failing, fresh.right = {}, {"embedded": 60}
    if trouble == "fails":
        checkpoint(Path("models"), "embedded", "mended")
    else:
        Path("elsewhere").rename("models")
    report = tick()
    assert report.failed == 0 and report.lines[1] == "embedded: version 2 promoted: there was no champion"
    assert report.lines[2].startswith("a: version 1 promoted: better on scenes-ref")


def test_each_evaluation_is_a_flow_run_of_the_tick(watched: Path, dag: Dag, prefect_server: None) -> None:
    from prefect.client.orchestration import get_client

    from flows.watch.deployment import watch

    for name in ("a", "b"):
        checkpoint(watched, name)
    dag.failing = {"b": "score: out of memory"}
    state = watch(return_state=True)
    assert state.is_failed() and "b: failed: score: out of memory" in str(state.message)
    with get_client(sync_client=True) as client:
        runs = {run.id: run for run in client.read_flow_runs()}
        tasks = {task.id: task for task in client.read_task_runs()}
    own = {run.name: run for run in runs.values() if run.parent_task_run_id in tasks}
    parents = {runs[tasks[run.parent_task_run_id].flow_run_id].name for run in own.values()}
    assert parents == {runs[state.state_details.flow_run_id].name}
    assert own["a"].state.is_completed() and own["b"].state.is_failed()
    assert own["b"].state.message == "score: out of memory"
    checkpoint(watched, "c")
    dag.failing = {"c": ZeroDivisionError()}
    with pytest.raises(ZeroDivisionError):
        watch()


def test_a_tick_that_finds_nothing_new_loads_no_torch(watched: Path, dag: Dag) -> None:
    checkpoint(watched, "a")
    (watched / "pickle.ckpt").write_bytes(b"")
    watch_settings(attempts=1)
    tick()
    script = (
        "from flows.watch.tick import tick; import sys; "
        "print(tick().lines, {'torch', 'prefect', 'dvc'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "['nothing new'] set()\n", done.stderr


def test_other_files_and_other_params_are_another_evaluation(watched: Path, dag: Dag) -> None:
    checkpoint(watched, "a")
    tick()
    checkpoint(watched, "a", "other weights")
    tick()
    assert dag.ran == ["a", "a"]
    watch_settings(cron="0 4 * * *", sources={"checkpoints": watch_sources()["checkpoints"]})
    change(runtime={**read_settings()["runtime"], "batch_size": 1})
    assert tick().lines == ["nothing new"]
    change(seed=1)
    tick()
    assert (dag.ran, len(Registry().versions())) == (["a", "a", "a"], 4)


def watch_sources() -> dict[str, Any]:
    return dict(read_settings()["watch"]["sources"])


def test_after_a_change_of_params_the_champion_is_first_and_then_all_others(watched: Path, dag: Dag) -> None:
    for name in ("a", "b", "c"):
        checkpoint(watched, name)
    dag.right |= {"a": 80, "b": 180, "c": 90}
    tick()
    watch_settings(sources={"registered": {"kind": "registered"}})
    change(seed=1)
    dag.ran.clear()
    report = tick()
    assert dag.ran == ["b", "embedded", "a", "c"] and report.failed == 0
    champion = Registry().alias(CHAMPION)
    assert champion is not None and (champion.number, champion.name, champion.against) == (5, "b", 3)
    assert champion.reason == "the champion itself, measured on other examples than before"
    assert [version.verdict for version in Registry().versions()][:2] == ["kept out", "kept out"]


def test_a_version_that_cannot_be_compared_yet_is_compared_later(watched: Path, dag: Dag) -> None:
    checkpoint(watched, "a")
    tick()
    watch_settings(sources={"checkpoints": watch_sources()["checkpoints"]})
    change(seed=1)
    (watched / "a").rename(watched.parent / "elsewhere")
    checkpoint(watched, "b")
    dag.right["b"] = 180
    told = tick()
    assert "not compared: scenes-ref: the champion was measured on other examples" in told.lines[1]
    assert tick().lines == ["nothing new"]
    (watched.parent / "elsewhere").rename(watched / "a")
    report = tick()
    assert [line.partition(" promoted")[0] for line in report.lines[1:]] == ["a: version 4", "b: version 3"]
    champion = Registry().alias(CHAMPION)
    assert champion is not None and champion.name == "b"


def test_a_failure_is_recorded_retried_and_given_up_and_does_not_affect_others(watched: Path, dag: Dag) -> None:
    for name in ("a", "b"):
        checkpoint(watched, name)
    dag.failing = {"a": "score: checkpoints/a: lacks the component vae/"}
    report = tick()
    assert report.lines[0] == "a: failed: score: checkpoints/a: lacks the component vae/" and report.failed == 1
    assert dag.ran == ["a", "b"]
    assert [path.is_dir() for path in Path(".watch").glob("*/")] == [True]  # the next attempt resumes it
    for _ in range(3):
        tick()
    assert dag.ran == ["a", "b", "a", "a"]
    reasons = {run.data.tags["dsd.reason"] for run in attempts("FAILED")}
    assert (reasons, len(attempts("FAILED"))) == ({"score: checkpoints/a: lacks the component vae/"}, 3)
    assert not list(Path(".watch").glob("*/"))
    page = Path("data/leaderboard/index.html").read_text()
    assert "lacks the component vae/" in page and "given up" in page
    dag.failing = {}
    checkpoint(watched, "a", "mended")
    assert tick().lines[0] == "a: evaluated, version 3"
    assert "Failed checkpoints" in Path("data/leaderboard/index.html").read_text()  # the other digest did


def test_a_checkpoint_that_cannot_be_opened_has_attempts_too(watched: Path, dag: Dag) -> None:
    watched.mkdir()
    (watched / "old.ckpt").write_bytes(b"")
    (watched / "one.safetensors").write_bytes(b"")
    report = tick()
    assert report.lines == [
        f"old.ckpt: failed: {watched.resolve()}/old.ckpt: a pickle, which is never opened; convert it to .safetensors",
        f"one.safetensors: failed: {watched.resolve()}/one.safetensors: one file needs config: a folder or hub id of "
        "the same architecture",
    ]
    tick(), tick()
    assert (tick().lines, len(attempts("FAILED")), dag.ran) == (["nothing new"], 6, [])


def test_one_file_is_evaluated_with_the_config_of_its_source(watched: Path, dag: Dag) -> None:
    checkpoint(watched.parent, "settings")
    watched.mkdir()
    (watched / "one.safetensors").write_bytes(b"weights")
    watch_settings(sources={"own": {"kind": "folder", "path": "checkpoints", "config": "settings", "revision": None}})
    assert tick().lines[0] == "one.safetensors: evaluated, version 2"
    row = Registry().versions()[0].row
    assert (row.config, row.family) == (str((watched.parent / "settings").resolve()), "stable-diffusion")


def test_a_repository_is_evaluated_at_the_commit_of_its_branch(
    watched: Path, dag: Dag, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path, "model")
    files = {**files_of(tmp_path / "model"), "text_encoder_2/config.json": b"{}"}
    rows = {
        name: {"kind": "hub", "source": f"own/{name}", "revision": "main"} for name in ("model", "vanished", "empty")
    }
    watch_settings(sources=rows)
    with connected(Hub({"own/model": files, "own/empty": {}}), tmp_path, monkeypatch):
        report = tick()
        assert tick().failed == 2  # an error of the network is not an attempt
    assert sorted(line.partition(":")[0] for line in report.lines) == [
        "model", "model", "watch.sources.empty", "watch.sources.vanished",
    ]  # fmt: skip
    assert "own/empty@main: no diffusion model in the diffusers layout" in report.lines[1] + report.lines[0]
    version, _ = Registry().versions()
    assert (version.digest, version.row.revision, version.row.family) == (
        f"own/model@{COMMIT}",
        COMMIT,
        "stable-diffusion-xl",
    )
    assert dag.ran == ["model"] and not attempts("FAILED")


def test_a_folder_of_xl_is_registered_under_the_digest_that_opens_it(watched: Path, dag: Dag) -> None:
    (checkpoint(watched, "xl") / "text_encoder_2").mkdir()
    assert tick().lines[0] == "xl: evaluated, version 2"
    row = Registry().versions()[0].row
    assert row.family == "stable-diffusion-xl" and locate(row)[1] == row.digest


def test_a_source_that_cannot_be_read_keeps_its_clone(watched: Path, dag: Dag) -> None:
    dag.failing = {"a": "killed"}
    watch_settings(attempts=2)
    checkpoint(watched, "a")
    tick()
    watch_settings(sources={"gone": {"kind": "hub", "source": "own/gone", "revision": "main"}})
    assert tick().failed == 1
    assert len(list(Path(".watch").glob("*/"))) == 1


def test_a_stopped_attempt_does_not_count_and_a_defect_keeps_its_traceback(watched: Path, dag: Dag) -> None:
    checkpoint(watched, "a")
    for error in (KeyboardInterrupt(), ZeroDivisionError()):
        dag.failing = {"a": error}
        with pytest.raises(type(error)):
            tick()
    assert [run.info.status for run in attempts()] == ["KILLED", "KILLED", "FINISHED"]
    dag.failing = {}
    assert tick().lines[0] == "a: evaluated, version 2"


def test_a_killed_tick_counts_as_a_failed_attempt_and_is_resumed(watched: Path, dag: Dag) -> None:
    checkpoint(watched, "a")
    process = multiprocessing.get_context("fork").Process(target=killed_within, args=(dag,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    run, _ = attempts()
    assert run.info.status == "RUNNING"
    [kept] = Path(".watch").glob("*/")
    assert (kept / "partial").exists()
    assert tick().lines[0] == "a: evaluated, version 2"
    [failed] = attempts("FAILED")
    assert failed.data.tags["dsd.reason"] == KILLED


def killed_within(dag: Dag) -> None:
    def reproduce(target: Path, lock: int, attempt: str) -> None:
        (target / "partial").touch()
        os.kill(os.getpid(), signal.SIGKILL)

    watching.reproduce = reproduce
    tick()


def test_a_tick_that_was_killed_between_registry_and_gate_is_finished(watched: Path, fresh: Dag) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registry, "challenge", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tick()
    assert Registry().alias(CHAMPION) is None
    assert tick().lines == ["embedded: version 1 promoted: there was no champion"]
    assert fresh.ran == ["embedded"] and "★ embedded" in Path("data/leaderboard/index.html").read_text()


SLOWLY = """
import sys, time
from pathlib import Path
from flows.watch import tick as watch
from tests.test_watch import Dag
dag = Dag()
def reproduce(*arguments):
    Path("evaluations").open("a").write("one\\n")
    time.sleep(2)
    dag.reproduce(*arguments)
watch.clone, watch.reproduce = dag.clone, reproduce
Path(sys.argv[1]).touch()
while not all(Path(name).exists() for name in ("ready0", "ready1")):
    time.sleep(0.01)
print(*watch.tick().lines, sep="\\n")
"""


def test_two_ticks_at_once_evaluate_once(watched: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SLOWLY, f"ready{n}"], stdout=subprocess.PIPE, text=True, env=environment
        )
        for n in range(2)
    ]
    outputs = sorted((process.communicate()[0] for process in processes), key=len)
    assert outputs[0] in ("another tick is running\n", "nothing new\n")
    assert outputs[1].startswith("embedded: evaluated, version 1\n")
    assert Path("evaluations").read_text() == "one\n" and len(Registry().versions()) == 1


def test_a_child_that_inherits_the_lock_holds_it(tmp_path: Path) -> None:
    """A run that outlives its tick excludes the next tick."""
    with tick_lock(tmp_path / "lock") as lock:
        assert lock is not None
        child = subprocess.Popen([sys.executable, "-c", "input()"], pass_fds=[lock], stdin=subprocess.PIPE)
        with tick_lock(tmp_path / "lock") as second:
            assert second is None
    with tick_lock(tmp_path / "lock") as while_it_lives:
        assert while_it_lives is None
    child.communicate(b"\n")
    with tick_lock(tmp_path / "lock") as after:
        assert after is not None


# A DAG of two stages: the examples, and the number of right answers, which the config of the checkpoint has.
STAGE = """
import os, sys, time
from pathlib import Path
from dsd.models.checkpoint import locate
from dsd.config import load
from tests.test_watch import measure, questions
with open(os.environ["RAN"], "a") as file:
    file.write(sys.argv[1] + " ")
if sys.argv[1] == "prepare":
    questions(Path(), 0)
else:
    params = load()
    folder, _ = locate(params.backbones[params.backbone])
    answer = (folder / "unet" / "config.json").read_text()
    while answer == "wait" and not os.path.exists(os.environ["RAN"] + ".go"):
        Path(os.environ["RAN"] + ".waits").touch()
        time.sleep(0.05)
    if answer == "fail":
        sys.exit("evaluate: no such component")
    measure(Path(), 100 if answer == "wait" else int(answer), 0)
"""
STAGES = {
    "prepare": {"cmd": "python stage.py prepare", "params": ["datasets"], "outs": ["data/prepare"]},
    "evaluate": {
        "cmd": "python stage.py evaluate",
        "params": ["backbone", "backbones"],
        "deps": ["data/prepare"],
        "outs": ["data/evaluate/scores", {"data/evaluate/metrics.json": {"cache": False}}],
    },
}


@pytest.fixture
def small_project(watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace with this DAG, reproduced once; the file that lists the stages that have run since."""
    for name in ("dsd", "flows", "tests"):
        shutil.copytree(ROOT / name, name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".dvcignore", ".")
    Path("stage.py").write_text(STAGE)
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": STAGES}))
    Path(".gitignore").write_text((ROOT / ".gitignore").read_text() + "/ran*\n__pycache__/\n")
    checkpoint(Path("models"), "embedded", "100")
    git("init", "-q")
    dvc("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "start")
    ran = tmp_path / "ran"
    monkeypatch.setenv("RAN", str(ran))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    dvc("repro", "-q")
    assert ran.read_text() == "prepare evaluate "
    ran.unlink()
    return ran


def everything() -> dict[str, tuple[int, int]]:
    """Size and time of every file of the workspace, except the stores and the files of the watch."""
    own = (
        ".watch",
        "mlflow.db",
        "mlartifacts",
        ".prefect",
        "data/leaderboard",
        "ran",
        ".git/index",
        ".dvc/tmp",
        ".dvc/cache",
    )
    files = [path for path in Path().rglob("*") if path.is_file() and not str(path).startswith(own)]
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files if "__pycache__" not in p.parts}


@pytest.mark.slow
def test_the_dag_runs_in_a_clone_and_does_not_change_the_workspace(watched: Path, small_project: Path) -> None:
    before, status, data = everything(), git("status", "--porcelain"), dvc("status")
    for name, right in (("better", "180"), ("broken", "fail")):
        checkpoint(watched, name, right)
    report = tick()
    assert report.lines[0] == "embedded: evaluated, version 1" and report.failed == 1
    assert report.lines[2] == "better: evaluated, version 2"
    assert report.lines[-1] == "broken: failed: evaluate: no such component"
    # The examples were restored from DVC's cache; metrics.json, which is in Git in this project, was not.
    assert small_project.read_text() == "evaluate evaluate evaluate "
    assert (git("status", "--porcelain"), dvc("status")) == (status, data)
    assert {name: what for name, what in everything().items() if not name.startswith("checkpoints")} == before
    version = Registry().versions()[0]
    assert version.commit == git("rev-parse", "HEAD").strip() and version.metrics[REF]["dsd"]["top1"]["value"] == 0.9
    [run] = attempts("FAILED")
    log = tracking.Runs().client.download_artifacts(run.info.run_id, "run.err")
    assert Path(log).read_text().splitlines()[-1] == "evaluate: no such component"
    assert "★ better" in Path("data/leaderboard/index.html").read_text()
    assert len(list(Path(".watch").glob("*/"))) == 1


@pytest.mark.slow
def test_the_whole_dag_on_tiny_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stages of dvc.yaml on another checkpoint than that of the workspace, with params that are not committed."""
    from safetensors.torch import load_file, save_file  # they load torch

    from tests.test_pipeline import fill, reproduce

    folder = fill(tmp_path)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for results in ("races", "studies"):  # a folder without files is not in git
        Path("data", results, ".keep").touch()
        git("add", "-f", f"data/{results}/.keep")
    git("commit", "-qm", "folders")
    change(gate={"method": "dsd", "datasets": {"scenes-com": {"minimum_effect": 0.0, "maximum_regression": 1.0}}})
    assert "report: " in reproduce(folder)
    weights = "unet/diffusion_pytorch_model.safetensors"
    shutil.copytree("models/embedded", "checkpoints/other")
    scaled = {name: 1.01 * tensor for name, tensor in load_file(f"models/embedded/{weights}").items()}
    save_file(scaled, f"checkpoints/other/{weights}", metadata={"format": "pt"})
    before, status, data = everything(), git("status", "--porcelain"), dvc("status")
    monkeypatch.setattr("flows.watch.tick.shutil.rmtree", lambda *_, **__: None)
    report = tick()
    assert report.lines == ["other: evaluated, version 1", "other: version 1 promoted: there was no champion"]
    assert (everything(), git("status", "--porcelain"), dvc("status")) == (before, status, data)
    [log] = Path(".watch").glob("*/run.log")
    for stage in ("download", "prepare"):
        assert f"Stage '{stage}' didn't change, skipping" in log.read_text()
    [version] = Registry().versions()
    assert version.row.family == "stable-diffusion" and len(version.metrics["scenes-com"]) == 8
    assert [run.data.tags["dsd.dataset"] for run in tracking.Runs().find("training")] == ["scenes-com"] * 4
    assert Registry().prompt("models:/dsd-prompt-scenes-com@champion", Path(".watch")).exists()
    assert "★ other" in Path("data/leaderboard/index.html").read_text()


@pytest.mark.slow
def test_a_killed_tick_ends_its_run_and_the_next_resumes_it(watched: Path, small_project: Path) -> None:
    checkpoint(watched, "a", "wait")
    command = [sys.executable, "-m", "flows.cli", "watch", "--once"]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    waits = Path(f"{small_project}.waits")
    until(waits.exists)
    assert tick().lines == ["another tick is running"]
    process.kill()
    process.wait()
    Path(f"{small_project}.go").touch()
    until(lambda: tick().lines != ["another tick is running"])
    assert [version.name for version in Registry().versions()] == ["a", "embedded"]
    assert sorted(run.info.status for run in attempts()) == ["FAILED", "FINISHED", "FINISHED"]
    assert small_project.read_text() == "evaluate evaluate evaluate "


def until(holds: Callable[[], bool], seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.parametrize("store", ["files", "postgres"])
def test_a_server_a_worker_and_a_deployment(
    store: str,
    watched: Path,
    small_project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    """The three commands of the README, on a free port; it ticks when it is time to, and the gate compares."""
    watch_settings(cron="* * * * *")
    for name, right in (("a", "150"), ("b", "190"), ("c", "152")):
        checkpoint(watched, name, right)
    port = str(free_port())
    own = {"PREFECT_HOME": str(tmp_path / "prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    if store == "postgres":
        postgres = request.getfixturevalue("postgres")
        monkeypatch.setenv(MLFLOW, postgres())
        own[DATABASE] = postgres().replace("postgresql:", "postgresql+asyncpg:")
        Path("mlflow.db").unlink()
    environment = {**os.environ, **own, "PYTHONPATH": str(ROOT)}

    def start(*command: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", *command], env=environment, start_new_session=True)

    def output(*command: str) -> str:
        done = subprocess.run([sys.executable, "-m", *command], env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    started = [start("prefect", "server", "start", "--host", "127.0.0.1", "--port", port)]
    try:
        until(lambda: answers(f"{own['PREFECT_API_URL']}/health"))
        assert "dsd: --pool dsd: " in output("flows.cli", "watch", "--pool", "dsd")  # no worker has created it yet
        started.append(start("prefect", "worker", "start", "--pool", "dsd", "--type", "process"))
        until(lambda: "dsd" in output("prefect", "work-pool", "ls"))
        assert "watch/watch: in the work pool dsd, at * * * * *\n" in output("flows.cli", "watch", "--pool", "dsd")
        shown = output("prefect", "deployment", "inspect", "watch/watch")
        assert "'cron': '* * * * *'" in shown and "CANCEL_NEW" in shown
        verdicts = ["kept out", "promoted", "promoted", "promoted"]
        until(lambda: [version.verdict for version in Registry().versions()] == verdicts)
        assert [version.name for version in Registry().versions()] == ["c", "b", "a", "embedded"]
        champion = Registry().alias(CHAMPION)
        assert champion is not None and (champion.name, champion.against) == ("b", 2)
        assert Path("mlflow.db").exists() == (store == "files")
    finally:
        for process in reversed(started):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def git(*arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def project(workspace: Path) -> Path:
    """A workspace in git with DVC, one stage whose output is in DVC's cache, and files that are not in Git."""
    dag = {"stages": {"step": {"cmd": "mkdir -p data/step && touch data/step/done", "outs": ["data/step"]}}}
    Path("dvc.yaml").write_text(yaml.safe_dump(dag))
    Path(".gitignore").write_text("/data/\n/.watch/\n/own/\n")
    git("init", "-q")
    dvc("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "start")
    dvc("repro", "-q")
    (workspace / "own").mkdir()
    settings = read_settings()
    settings["datasets"]["mine"] = {"source": "own"}
    write_settings(settings)
    return workspace


def dvc(*arguments: str) -> str:
    program = Path(sys.executable).parent / "dvc"
    return subprocess.run([program, *arguments], check=True, capture_output=True, text=True).stdout


def row(name: str) -> BackboneParams:
    settings = dict(family="stable-diffusion", source=name, revision=None, lora=None, dtype="float32", digest="d")
    return BackboneParams.model_validate(settings)


def test_a_clone_has_the_commit_the_params_and_the_data(project: Path) -> None:
    before = git("status", "--porcelain")
    target = clone(Path(".watch/key"), "new", row("/checkpoints/new"))
    settings = read_settings(target)
    assert settings["backbone"] == "new" and settings["backbones"]["new"]["digest"] == "d"
    own = read_settings()
    assert {**settings, "backbones": own["backbones"], "backbone": own["backbone"]} == own
    assert (target / "data/step/done").exists() and (target / "own").resolve() == project / "own"
    assert subprocess.run(["git", "rev-parse", "HEAD"], cwd=target, capture_output=True, text=True).stdout == git(
        "rev-parse", "HEAD"
    )
    assert git("status", "--porcelain") == before


def test_a_complete_clone_is_reused_on_the_current_commit(project: Path) -> None:
    target = clone(Path(".watch/key"), "new", row("/checkpoints/new"))
    (target / "data" / "partial").touch()
    clone(Path(".watch/key"), "new", row("/checkpoints/new"))
    (project / "mended.py").touch()
    git("add", "mended.py")
    git("commit", "-qm", "mended")
    clone(Path(".watch/key"), "new", row("/checkpoints/new"))
    assert (target / "mended.py").exists() and (target / "data" / "partial").exists()
    assert read_settings(target)["backbone"] == "new"
    change(runtime={**read_settings()["runtime"], "batch_size": 1})  # such as after an attempt that ran out of memory
    clone(Path(".watch/key"), "new", row("/checkpoints/new"))
    assert read_settings(target)["runtime"]["batch_size"] == 1 and read_settings(target)["backbone"] == "new"
    (target / ".git" / "ready").unlink()  # killed while it was made
    clone(Path(".watch/key"), "new", row("/checkpoints/new"))
    assert not (target / "data" / "partial").exists() and (target / "data/step/done").exists()


def test_without_git_there_is_one_line(workspace: Path) -> None:
    with pytest.raises(DsdError, match=r"git rev-parse: fatal: not a git repository") as caught:
        clone(Path(".watch/key"), "new", row("new"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stderr", "line"),
    [
        ("", ""),
        ("warning\nscore: a: no such folder\n\n", "score: a: no such folder"),
        ("1 %\r100 %\rscore: out", "score: out"),
        ("x" * 900, "x" * 500),
    ],
)
def test_the_reason_is_the_last_line(stderr: str, line: str) -> None:
    assert last_line(stderr) == line


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"cron": "hourly"}, "params.yaml: watch.cron: must be five fields"),
        ({"attempts": 0}, "params.yaml: watch.attempts: Input should be greater than 0"),
        (
            {"sources": {"a": {"kind": "folders", "path": "a"}}},
            "params.yaml: watch.sources.a.kind: unknown kind 'folders'",
        ),
        ({"sources": {"a": {"kind": "hub", "source": "a/b"}}}, "params.yaml: watch.sources.a.revision: Field required"),
        ({"interval": 5}, "params.yaml: unknown key 'watch.interval'"),
    ],
)
def test_invalid_params_are_one_line(watched: Path, changes: dict[str, Any], line: str) -> None:
    watch_settings(**changes)
    with pytest.raises(DsdError) as caught:
        tick()
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


def test_the_command_ticks_once(watched: Path, dag: Dag) -> None:
    run = CliRunner().invoke(app, ["watch", "--once"])
    assert (run.exit_code, run.stdout) == (0, "nothing new\n")
    checkpoint(watched, "a")
    dag.failing = {"a": "score: out of memory"}
    run = CliRunner().invoke(app, ["watch", "--once"])
    assert (run.exit_code, run.stdout) == (1, "a: failed: score: out of memory\n")


def test_a_pool_without_a_server_is_one_line(watched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    run = CliRunner().invoke(app, ["watch", "--pool", "dsd"])
    assert run.exit_code == 1 and run.output.startswith("dsd: PREFECT_API_URL: not set; --pool needs a server")
