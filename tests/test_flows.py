"""The stages as flows: the arguments they pass to the method, their outputs, and their errors."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import httpx
import pytest
import yaml
from dvc.repo import Repo
from dvc_objects.fs.utils import tmp_fname

from dsd import errors, report
from dsd.config import Params
from dsd.datasets import DATASETS
from dsd.engine import cache as cache_stage
from dsd.engine import score as scoring
from dsd.engine.session import Session
from dsd.errors import DataError, DsdError
from dsd.evaluation import evaluate as evaluation
from dsd.pretraining import recipe as pretraining
from dsd.training import loop as training
from flows import failures, reproduce
from flows.stages.common import declared, each, main, prune, stage, stage_params
from flows.stages.download import is_transient
from tests.browser import page_of
from tests.conftest import ROOT, read_settings, write_settings


@pytest.fixture
def one_dataset(workspace: Path) -> Path:
    """The workspace with a single dataset, and two stages of its own beside those of the project."""
    settings = read_settings()
    settings["datasets"] = {"scenes-com": settings["datasets"]["scenes-com"]}
    settings["studies"], settings["races"]["datasets"], settings["gate"]["datasets"] = {}, {}, {}
    write_settings(settings)
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text())
    pipeline["stages"] |= {"work": {"params": ["seed", "datasets"]}, "fail": {"params": ["seed"]}}
    Path("dvc.yaml").write_text(yaml.safe_dump(pipeline))
    return workspace


def test_a_stage_reads_the_params_that_dvc_lists(one_dataset: Path) -> None:
    granted = stage_params("work")
    assert (granted.seed, list(granted.datasets)) == (0, ["scenes-com"])
    assert granted.runtime.workers  # changes no result, so no stage depends on it
    with pytest.raises(AttributeError, match="training"):
        _ = granted.training


def test_every_section_is_declared_somewhere(workspace: Path) -> None:
    names = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    assert set().union(*map(declared, names)) | {"runtime", "gate", "serving", "watch"} == set(Params.model_fields)


@stage
def work(params: Params) -> dict[str, dict[str, Any]]:
    return each(lambda name: {"seed": params.seed}, params.datasets)


def test_a_stage_leaves_its_timing(one_dataset: Path, prefect_server: None) -> None:
    work()
    record = json.loads(Path("data/timings/work.json").read_text())
    assert record["stage"] == "work"
    assert record["details"]["scenes-com"]["seed"] == 0
    assert record["seconds"] == record["details"]["scenes-com"]["seconds"] >= 0
    assert record["finished"].endswith("+00:00")
    assert "cores" in record["device"]


def failing(error: Exception) -> Callable[[], None]:
    def body(name: str) -> dict[str, Any]:
        raise error

    def fail(params: Params) -> dict[str, dict[str, Any]]:
        return each(body, ["one"])

    return lambda: main(stage(fail))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (DataError("annotations.jsonl: no such file"), "fail: annotations.jsonl: no such file"),
        (OSError(errno.ENOSPC, "No space left on device", "shard"), "fail: shard: disk full, "),
    ],
)
def test_a_user_error_in_a_unit_is_one_line(
    one_dataset: Path, prefect_server: None, capfd: pytest.CaptureFixture[str], error: Exception, line: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        failing(error)()
    assert str(exit.value.code).startswith(line)
    assert "\n" not in str(exit.value.code)
    assert "Traceback" not in capfd.readouterr().err
    assert not Path("data/timings/fail.json").exists()


def test_a_defect_keeps_its_traceback(one_dataset: Path, prefect_server: None) -> None:
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())()


def test_a_user_error_is_found_among_the_causes() -> None:
    wrapped = RuntimeError("the task failed")
    wrapped.__cause__ = DataError("examples.parquet: no such file")
    assert failures.error_line(wrapped) == "examples.parquet: no such file"
    assert failures.error_line(RuntimeError()) is None


def refused(url: str) -> httpx.HTTPError:
    return httpx.ConnectError("refused", request=httpx.Request("GET", url))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.EROFS, "", "data/score"), "data/score: Read-only file system; must be writable"),
        (PermissionError(errno.EACCES, "", "data"), "data: Permission denied; must be writable"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk full, /full has 7 bytes free"),
        (OSError(errno.ENOSPC, "No space left on device", "shard"), "shard: disk full, /full has 7 bytes free"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "disk full, /full has 7 bytes free"),
        (sqlite3.OperationalError("database or disk is full"), "disk full, /full has 7 bytes free"),
        (
            sqlite3.OperationalError("database is locked"),
            "MLflow's database, mlflow.db unless .*: database is locked",
        ),
        (
            refused("http://127.0.0.1:42/api/flows"),
            "the Prefect server at http://127.0.0.1:42/api does not answer: disk full, /full has 7 bytes free",
        ),
        (refused("https://elsewhere"), None),
        (sqlite3.IntegrityError("a defect"), None),
        (FileNotFoundError(errno.ENOENT, ""), None),
    ],
)
def test_an_error_of_the_machine_is_one_line(
    error: Exception, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:42/api")
    monkeypatch.setattr(errors, "full_disks", lambda places: ["/full has 7 bytes free"])
    wrapped = RuntimeError("a flow failed")
    wrapped.__cause__ = error
    found = failures.error_line(wrapped)
    assert found is None if line is None else re.fullmatch(line, str(found))


def test_a_full_disk_is_the_reason_why_a_server_does_not_answer(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:42/api")
    error = refused("http://127.0.0.1:42/api/flows")
    assert str(failures.error_line(error)).endswith("does not answer: refused")
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
        with pytest.raises(DsdError, match="the Prefect server does not answer; see server"):
            reproduce.wait_until_ready(ended, "http://127.0.0.1:42", Path("server.log"))
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=7))
        full = f"disk full, {workspace} has 7 bytes free"
        assert str(failures.error_line(error)).split("does not answer: ")[1].startswith(full)
        with pytest.raises(DsdError, match=f"the Prefect server does not answer; {full}"):
            reproduce.wait_until_ready(ended, "http://127.0.0.1:42", Path("server.log"))


def test_exit_handlers_do_not_wait_for_a_dead_server(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []

    def end(status: int) -> None:
        statuses.append(status)
        raise SystemExit

    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(SystemExit, match="a line"):
        failures.exit_with("a line", DataError("a line"))
    dead = DataError("a line")
    dead.__cause__ = refused("http://127.0.0.1:42/api/flows")
    with pytest.raises(SystemExit):
        failures.exit_with("a line", dead)
    assert (statuses, capfd.readouterr().err) == ([1], "a line\n")


DYING = """
import sys
import psutil
from flows.reproduce import server
with server():
    from flows.stages.common import each, main, stage
    (running,) = (child for child in psutil.Process().children() if "server" in child.cmdline())
    @stage
    def fail(params):
        def unit(name):
            if name == "second":
                running.kill()
                running.wait()
                print("killed", flush=True)
            return {}
        return each(unit, ["first", "second", "third", "fourth"])
    main(fail)
"""


@pytest.mark.slow
def test_a_server_that_dies_costs_seconds_and_one_line(one_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    command = [sys.executable, "-c", DYING]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        while process.stdout.readline().strip() != "killed":
            assert process.poll() is None
        killed = time.monotonic()
        lines = process.stderr.read().splitlines()
        assert process.wait() == 1
        assert time.monotonic() - killed < 30
    assert len(lines) == 1 and re.match("fail: the Prefect server at .* does not answer: .*refused", lines[0])


def test_only_transient_errors_are_retried(one_dataset: Path, prefect_server: None) -> None:
    tries: dict[str, int] = {}

    def flaky(name: str) -> dict[str, Any]:
        tries[name] = tries.get(name, 0) + 1
        if name == "mistake":
            raise DataError("no such dataset")
        if tries[name] < 2:
            raise ConnectionError("reset by peer")
        return {}

    @stage
    def work(params: Params) -> dict[str, dict[str, Any]]:
        return each(flaky, ["reset", "mistake"], retries=2, retry_delay_seconds=0, retry_condition_fn=is_transient)

    with pytest.raises(DataError):
        work()
    assert tries == {"reset": 2, "mistake": 1}


def test_the_folder_of_a_removed_dataset_is_removed(tmp_path: Path) -> None:
    for name in ("kept", "removed"):
        (tmp_path / name).mkdir()
    (tmp_path / "removed.txt").touch()
    prune(tmp_path, ["kept", "new"])
    prune(tmp_path / "absent", ["kept"])
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_the_stages_call_the_method(one_dataset: Path, prefect_server: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its params and its folders, in the order of dvc.yaml."""
    from flows import tracking
    from flows.stages import cache, download, evaluate, prepare, pretrain, score, train
    from flows.stages import report as reporting

    calls: list[tuple[Any, ...]] = []

    def note(result: Any) -> Callable[..., Any]:
        def stub(*arguments: Any, **options: Any) -> Any:
            given = []
            for argument in [*arguments, *options.values()]:
                if isinstance(argument, Session):
                    given += [argument.name, *argument.folders]
                else:
                    given.append(argument.folder if isinstance(argument, training.Training) else argument)
            calls.append(tuple(str(a) for a in given if isinstance(a, str | Path)))
            return result

        return stub

    monkeypatch.setitem(DATASETS, "scenes-com", replace(DATASETS["scenes-com"], download=note(None)))
    monkeypatch.setattr("dsd.datasets.preparation.prepare", note({"test": 1}))
    monkeypatch.setattr(cache_stage, "encode", note({"images": 1}))
    monkeypatch.setattr(training, "training_key", lambda *_: "key")
    monkeypatch.setattr(training, "train", note([{"step": 1, "loss": 0.5, "accuracy": 1.0}]))
    monkeypatch.setattr(scoring, "score", note({"computed": 1}))
    monkeypatch.setattr(scoring, "score_raced", note({}))
    split = SimpleNamespace(kind="scenes-com", examples=[], few_shot=[])
    monkeypatch.setattr(evaluation.ScoredSplit, "of", note(split))
    monkeypatch.setattr(evaluation, "evaluate", note(evaluation.Evaluated({"dsd": {}}, {})))
    # What is made of the same evidence has tests of its own.
    for function, answer in {
        "dsd.evaluation.ablations.ablate": {},
        "dsd.evaluation.ablations.with_intervals": {},
        "dsd.evaluation.ablations.write": None,
        "dsd.evaluation.blind.measure": None,
        "dsd.evaluation.calibration.measure": {},
        "dsd.evaluation.blind.write": None,
        "dsd.evaluation.claims.judge": ({}, {}),
        "dsd.evaluation.claims.write": None,
        "dsd.scorers.evidence.read_identities": {},
    }.items():
        monkeypatch.setattr(function, lambda *_, answer=answer: answer)
    monkeypatch.setattr(evaluation, "write_metrics", note(None))
    monkeypatch.setattr(report, "build", note(Path("data/report/index.html")))
    monkeypatch.setattr(tracking, "publish", note(0))
    monkeypatch.setattr(tracking, "Runs", lambda: None)
    curve: list[dict[str, float]] = []
    monkeypatch.setattr(tracking, "TrainingRun", lambda *_: nullcontext(SimpleNamespace(log=curve.append)))
    monkeypatch.setattr(pretraining, "pretrain", note(iter([{"step": 1}, {"step": 2, "loss": 0.1}])))

    modules = (pretrain, download, prepare, cache, train, score, evaluate, reporting)
    flows = [getattr(module, module.__name__.rpartition(".")[2]) for module in modules]
    for flow in flows:
        flow()

    name, learning = "scenes-com", ("dsd", "clip-finetune", "clip-prompt", "dsd/without-0", "dsd/without-1")
    folders = {s: f"data/{s}/{name}" for s in ("download", "prepare", "cache", "train", "score")}
    session = (name, *(folders[s] for s in ("prepare", "cache", "train")))
    assert calls == [
        ("data/pretrain", "models"),
        (folders["download"],),
        (name, folders["download"], folders["prepare"]),
        session,
        *((*session, m) for m in learning),
        (*session, folders["score"], "test"),
        (*session, "data/races", folders["score"], "test"),
        (name, folders["prepare"], folders["score"]),
        (name, "data/evaluate"),
        ("data/evaluate",),
        ("data", "data/report"),
        ("data",),
    ]
    timings = {path.stem: json.loads(path.read_text()) for path in Path("data/timings").iterdir()}
    assert set(timings) == {flow.name for flow in flows}
    assert curve == [{"step": 1, "loss": 0.5, "accuracy": 1.0}] * len(learning)
    assert timings["train"]["details"][name]["dsd"]["loss"] == 0.5
    assert timings["pretrain"]["details"]["models"]["loss"] == 0.1


@pytest.fixture
def small_dag(one_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A DVC project of one stage that writes the report; no server is started. Returns what was published."""
    command = "mkdir data/report && printf page > data/report/index.html"
    dag = {"stages": {"report": {"cmd": command, "params": ["seed"], "outs": ["data/report"]}}}
    Path("dvc.yaml").write_text(yaml.safe_dump(dag))
    Path("data").mkdir()
    Repo.init(no_scm=True).close()
    published: list[tuple[Any, ...]] = []
    monkeypatch.setattr(reproduce, "server", nullcontext)
    monkeypatch.setattr("dsd.estimate.check", lambda _: None)
    monkeypatch.setattr("flows.tracking.publish", lambda *arguments: published.append(arguments))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return published


@pytest.mark.slow
def test_reproducing_twice_runs_the_stages_once(
    small_dag: list[Any], prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reproduce.reproduce().splitlines()
    assert first[0].startswith("orchestration: ")
    assert first[1] == "report: data/report/index.html"
    assert Path("data/report/index.html").read_text() == "page"
    monkeypatch.setattr(reproduce, "run", pytest.fail)
    assert reproduce.reproduce().splitlines() == ["everything is up to date", first[1]]
    assert len(small_dag) == 2  # results from the cache of DVC are published as well


@pytest.mark.slow
def test_only_a_reproduction_from_scratch_is_recorded_as_whole(small_dag: list[Any], prefect_server: None) -> None:
    timing = '{"stage": "report", "seconds": 0, "finished": "2999-01-01T00:00:00+00:00"}'
    command = f"mkdir -p data/kept data/timings && echo '{timing}' > data/timings/report.json"
    stage = {"cmd": command, "params": ["seed"], "outs": [{"data/kept": {"persist": True}}]}
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": {"report": stage}}))
    reproduce.reproduce()
    record = Path("data/reproduction.json")
    assert set(json.loads(record.read_text())) == {"seconds", "orchestration"}
    record.unlink()
    settings = read_settings()
    write_settings({**settings, "seed": 1})
    assert reproduce.reproduce().startswith("orchestration: ")  # it went on with what it had kept
    assert not record.exists()


@pytest.mark.slow
def test_recompute_runs_every_stage_again_but_those_that_are_frozen(small_dag: list[Any], prefect_server: None) -> None:
    count = "mkdir -p data/{0} && echo run >> data/{0}/runs && echo run >> {0}.log"
    dag = {
        name: {"cmd": count.format(name), "params": ["seed"], "outs": [{f"data/{name}": {"persist": True}}]}
        for name in ("pretrain", "download", "score")
    }
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": dag}))
    reproduce.reproduce()
    dag["pretrain"]["frozen"] = True
    Path("dvc.yaml").write_text(yaml.safe_dump({"stages": dag}))
    assert reproduce.reproduce().startswith("everything is up to date")
    reproduce.reproduce(recompute=True)
    runs = {name: len(Path(f"{name}.log").read_text().split()) for name in dag}
    assert runs == {"pretrain": 1, "download": 2, "score": 2}
    assert Path("data/score/runs").read_text().split() == ["run"]  # it starts from nothing
    assert Path("data/download/runs").read_text().split() == ["run", "run"]  # downloads are kept


@pytest.mark.slow
def test_the_line_of_a_failed_stage_is_the_last(
    small_dag: list[Any], prefect_server: None, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("dvc.yaml").write_text(
        Path("dvc.yaml").read_text().replace("cmd: ", "cmd: echo 'what to correct' >&2; exit 1; ")
    )
    with pytest.raises(SystemExit) as exit:
        reproduce.main()
    assert exit.value.code == 1
    assert capfd.readouterr().err.splitlines()[-1] == "what to correct"
    assert not small_dag


@pytest.mark.slow
def test_a_killed_stage_is_reported(
    small_dag: list[Any], prefect_server: None, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text().replace("cmd: ", "cmd: kill -9 $$; "))
    with pytest.raises(SystemExit, match=r"reproduce: failed to reproduce 'report': failed to run: .* with -9"):
        reproduce.main()


KILLED = "import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)"


@pytest.mark.parametrize("stopped", [f"exec {sys.executable} -c '{KILLED}'", "exit 130"], ids=["killed", "ended"])
def test_an_interrupted_stage_leaves_the_report(
    stopped: str, small_dag: list[Any], prefect_server: None, capfd: pytest.CaptureFixture[str]
) -> None:
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text())
    pipeline["stages"]["report"] |= {
        "cmd": f"test ! -e data/report || {{ {stopped}; }}; mkdir data/report; echo page > data/report/index.html",
        "outs": [{"data/report": {"persist": True}}],
    }
    Path("dvc.yaml").write_text(yaml.safe_dump(pipeline))
    reproduce.main()
    write_settings({**read_settings(), "seed": 1})
    with pytest.raises(SystemExit) as exit:
        reproduce.main()
    assert exit.value.code == 130
    assert capfd.readouterr().err.splitlines()[-1] == "reproduce: interrupted; run it again to resume"
    assert Path("data/report/index.html").read_text() == "page\n"
    listed = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["report"]["outs"]
    assert {"data/report": {"persist": True}} in listed


def test_a_folder_that_is_no_project_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(SystemExit) as exit:
        reproduce.main()
    assert str(exit.value.code).startswith("reproduce: params.yaml: no such file") and not list(tmp_path.iterdir())


def test_two_reproductions_at_once_are_one_line(small_dag: list[Any]) -> None:
    code = "import sys; from flows.reproduce import alone\nwith alone(): print('in', flush=True); sys.stdin.read()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as other:
        assert other.stdout is not None and other.stdout.readline() == b"in\n"
        before = Path("params.yaml").read_bytes()
        with pytest.raises(SystemExit) as exit:
            reproduce.main(lambda: Path("params.yaml").unlink())
        assert str(exit.value.code) == (
            f"reproduce: process {other.pid} reproduces in this workspace; wait for it, or stop it"
        )
        assert Path("params.yaml").read_bytes() == before
        other.communicate()
    with reproduce.alone():
        assert reproduce.RUNNING.read_text() == str(os.getpid())


def test_dvc_writes_its_lock_through_our_file_system(small_dag: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A new version of DVC that writes dvc.lock in another way fails here: find a way to write it atomically there."""
    with Repo(fs=reproduce.AtomicFiles()) as repo:
        repo.reproduce()
    lock, replace = Path("dvc.lock"), os.replace
    before, names = lock.read_bytes(), []

    def killed(source: Any, target: Any) -> None:
        names.append(Path(target).name)
        if names[-1] == "dvc.lock":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt), Repo(fs=reproduce.AtomicFiles()) as repo:
            repo.reproduce(force=True)
    assert "dvc.lock" in names and lock.read_bytes() == before


def test_dvc_writes_the_same_lock_through_our_file_system(small_dag: list[Any]) -> None:
    locks = []
    for files in (None, reproduce.AtomicFiles()):
        with Repo(fs=files) as repo:
            repo.reproduce(force=True)
        locks.append(Path("dvc.lock").read_bytes())
        Path("dvc.lock").unlink()
    assert locks[0] == locks[1]


@pytest.mark.parametrize("content", ["", '{"read": {"/a'])
def test_a_truncated_rwlock_is_removed(workspace: Path, content: str) -> None:
    reproduce.repair_rwlock()
    reproduce.RWLOCK.parent.mkdir(parents=True)
    reproduce.RWLOCK.write_text("{}")
    reproduce.repair_rwlock()
    assert reproduce.RWLOCK.exists()
    reproduce.RWLOCK.write_text(content)
    reproduce.repair_rwlock()
    assert not reproduce.RWLOCK.exists()


@pytest.mark.parametrize("left", ["empty", "half"])
def test_a_truncated_entry_of_the_run_cache_is_removed(small_dag: list[Any], left: str) -> None:
    """DVC itself fails on it with a TypeError, in this run or the next."""
    cache = Path(".dvc", "cache")
    for run in range(3):
        with Repo() as repo:
            repo.reproduce(force=run == 0)
        [(kept,)] = (list(folder.iterdir()) for folder in cache.glob("runs/*/*"))
        if left == "half":
            kept.with_name(tmp_fname()).write_text("cmd: mk")
        kept.unlink()
        Path("dvc.lock").unlink()
        (cache / "files" / "md5" / tmp_fname()).touch()
        with reproduce.cache_in_use(cache):
            assert not [*cache.glob("runs/*/*"), *cache.rglob("*.tmp")]


def test_a_cache_in_use_is_not_repaired(tmp_path: Path) -> None:
    begun = tmp_path / "files" / "md5" / tmp_fname()
    begun.parent.mkdir(parents=True)
    with reproduce.cache_in_use(tmp_path):
        begun.touch()
        with reproduce.cache_in_use(tmp_path):
            assert begun.exists()
    with reproduce.cache_in_use(tmp_path):
        assert not begun.exists()


@pytest.mark.slow
def test_invalid_params_are_one_line(small_dag: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("resamples:", "resample:"))
    with pytest.raises(SystemExit) as exit:
        reproduce.main()
    assert str(exit.value.code).startswith("reproduce: params.yaml: ")


def test_only_stages_that_finished_since_then_count(workspace: Path) -> None:
    Path("data/timings").mkdir(parents=True)
    for name, finished in (("train", "2030-01-01T00:00:00+00:00"), ("prepare", "2020-01-01T00:00:00+00:00")):
        record = {"stage": name, "seconds": 5.0, "finished": finished}
        Path(f"data/timings/{name}.json").write_text(json.dumps(record))
    assert [record["stage"] for record in reproduce.finished(datetime(2029, 1, 1, tzinfo=UTC))] == ["train"]


@pytest.mark.browser
def test_the_page_of_the_server_shows_the_run(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The page finds the API at the port of its own server."""
    script = "from prefect import flow; flow(lambda: None, name='reproduce', flow_run_name='this-run')()"
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with reproduce.server():
        subprocess.run([sys.executable, "-c", script], check=True)
        [address] = re.findall("Prefect UI: (.*)", capfd.readouterr().out)
        page = page_of(address, workspace / "browser", "window-size=1280,900", "virtual-time-budget=60000")
    assert "this-run" in page


@pytest.mark.slow
def test_the_server_starts_and_stops(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with reproduce.server():
        url = f"{os.environ['PREFECT_API_URL']}/health"
        with urlopen(url) as answer:
            assert answer.status == 200
    assert "PREFECT_API_URL" not in os.environ
    with pytest.raises(OSError):
        urlopen(url, timeout=1)


@pytest.mark.parametrize("lost", ["workspace", "lock"])
def test_a_damaged_object_of_the_cache_is_made_again(small_dag: list[Any], lost: str) -> None:
    """DVC trusts read-only files: it would put half a page in place, by dvc.lock or as the result of an earlier run."""
    with Repo() as repo:
        repo.reproduce()
    shutil.rmtree("data/report")
    if lost == "lock":
        Path("dvc.lock").unlink()
    name = hashlib.md5(b"page").hexdigest()
    kept = Path(".dvc/cache/files/md5", name[:2], name[2:])
    assert kept.stat().st_mode & 0o222 == 0
    kept.unlink()
    kept.write_bytes(b"pa")
    kept.chmod(0o444)
    with Repo() as repo:
        reproduce.verify_objects(repo)
        repo.reproduce()
    assert Path("data/report/index.html").read_bytes() == kept.read_bytes() == b"page"
