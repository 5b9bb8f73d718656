"""Configured stores: one line per error, and the whole DAG on the stores of a team."""

from __future__ import annotations

import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import psycopg2
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE
from sqlalchemy.exc import OperationalError

from dsd.errors import DsdError
from flows import reproduce, stores, tracking
from flows.stores import DATABASE, MLFLOW, PREFECT, artifacts, check, exclusive, uri
from tests.conftest import ROOT
from tests.postgres import Postgres
from tests.test_pipeline import environment, fill

NOBODY = "127.0.0.1:1"  # where nothing listens


def prefects(url: str) -> str:
    return url.replace("postgresql:", "postgresql+asyncpg:")


def refused(setting: str, address: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv(setting, address)
    with pytest.raises(DsdError) as error:
        check(setting, uri() if setting == MLFLOW else address, seconds=1)
    line = str(error.value)
    assert line.startswith(f"{setting}: ") and "\n" not in line and "s3cret" not in line
    return line


@pytest.mark.parametrize(
    ("setting", "address", "reason"),
    [
        (MLFLOW, f"postgresql://dsd:s3cret@{NOBODY}/x", "Connection refused"),
        (MLFLOW, "postgresql://dsd:s3cret@h:port/x", "not the address of a database (dialect+driver://"),
        (MLFLOW, "postgresql+pg8000://dsd:s3cret@h/x", "its driver pg8000 is not installed; install it"),
        (MLFLOW, "sqlite:////nosuch/folder/x.db", "/nosuch/folder: not a writable folder"),
        (MLFLOW, f"http://dsd:s3cret@{NOBODY}", "no server answers ([Errno 111] Connection refused); start it"),
        (MLFLOW, "nonsense://dsd:s3cret@h", "neither a server (http://…) nor a database (postgresql://…)"),
        (PREFECT, f"http://{NOBODY}/api", "no server answers"),
        (DATABASE, f"postgresql+asyncpg://dsd:s3cret@{NOBODY}/x", "Connect call failed"),
        (DATABASE, f"postgresql://dsd:s3cret@{NOBODY}/x", "Prefect needs postgresql+asyncpg://"),
    ],
)
def test_a_store_that_cannot_be_reached(
    setting: str, address: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reason in refused(setting, address, monkeypatch)


def test_a_driver_that_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg2", None)
    assert "psycopg2 is not installed; install the extra `postgres`" in refused(MLFLOW, "postgresql://h/x", monkeypatch)


def test_what_a_server_refuses(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    for setting, change in ((MLFLOW, str), (DATABASE, prefects)):
        absent, wrong = postgres.url("absent"), postgres.url("postgres", password="wrong")
        assert 'database "absent" does not exist' in refused(setting, change(absent), monkeypatch)
        assert "password authentication failed for user" in refused(setting, change(wrong), monkeypatch)
    monkeypatch.setenv(MLFLOW, postgres())
    check(MLFLOW, uri())
    check(DATABASE, prefects(postgres()))


def test_a_file_that_is_locked_or_no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.db").write_bytes(b"x" * 2000)
    assert "file is not a database" in refused(MLFLOW, f"sqlite:///{tmp_path}/broken.db", monkeypatch)
    with sqlite3.connect(tmp_path / "locked.db") as other:
        other.execute("create table one (n)")
        other.execute("begin immediate")
        line = refused(MLFLOW, f"sqlite:///{tmp_path}/locked.db", monkeypatch)
    assert line.endswith("database is locked: another program writes to it; stop that program, and run again")


def test_an_error_during_a_run_is_one_line_too(workspace: Path) -> None:
    locked = OperationalError("insert", {}, sqlite3.OperationalError("database is locked"))
    with pytest.raises(DsdError, match="database is locked: another program"), tracking.mlflow_errors():
        raise MlflowException("SQL and its parameters", TEMPORARILY_UNAVAILABLE) from locked
    with pytest.raises(DsdError, match="database is locked: another program"), tracking.mlflow_errors():
        raise locked
    with pytest.raises(MlflowException), tracking.mlflow_errors():
        raise MlflowException.invalid_parameter_value("a defect of ours")


def test_a_missing_folder(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MLFLOW, "sqlite:////nosuch/folder/x.db")
    with pytest.raises(DsdError, match="sqlite:////nosuch/folder/x"):
        tracking.Runs()


def test_a_check_creates_no_file(workspace: Path) -> None:
    check(MLFLOW, uri())
    assert not (workspace / "mlflow.db").exists()


def test_an_error_of_a_default_names_it_as_such(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workspace / "mlflow.db").write_bytes(b"x" * 2000)
    with pytest.raises(DsdError, match=re.escape("MLFLOW_TRACKING_URI (not set): sqlite:///")):
        check(MLFLOW, uri())


def test_artifacts_are_ours_unless_a_server_keeps_them(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert artifacts() == workspace / "mlartifacts"
    monkeypatch.setenv(MLFLOW, "postgresql://h/x")
    assert artifacts() == workspace / "mlartifacts" and not stores.is_server(uri())
    monkeypatch.setenv(MLFLOW, "sqlite:////elsewhere/mlflow.db")
    assert artifacts() == Path("/elsewhere/mlartifacts") and not stores.is_server(uri())
    monkeypatch.setenv(MLFLOW, "https://h")
    assert stores.is_server(uri())


def test_only_one_process_at_a_time_holds_the_lock(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MLFLOW, postgres())
    order = []

    def other() -> None:
        with exclusive(MLFLOW, uri()):
            order.append("other")

    with exclusive(MLFLOW, uri()):
        thread = Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "other"]


def test_an_error_in_the_block_is_not_changed(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MLFLOW, postgres())
    with pytest.raises(FileNotFoundError), exclusive(MLFLOW, uri()):
        Path("/nosuch/file").read_bytes()


def test_several_workspaces_open_a_fresh_database_at_once(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MLFLOW, postgres())

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    opened = [sys.executable, "-c", "from flows import tracking; tracking.Runs()"]
    processes = []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        processes.append(subprocess.Popen(opened, cwd=tmp_path / str(number)))
    assert [process.wait() for process in processes] == [0, 0, 0]


def test_a_reproduction_checks_the_stores_before_it_starts_a_server(
    workspace: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(PREFECT, raising=False)
    for setting, address in ((DATABASE, prefects(postgres.url("absent"))), (PREFECT, f"http://{NOBODY}/api")):
        monkeypatch.setenv(setting, address)
        with pytest.raises(DsdError, match=f"^{setting}: "), reproduce.server():
            pass


def entered(url: str) -> list[tuple[str, ...]]:
    """Kind, dataset and method of every run in MLflow's database, as PostgreSQL has them."""
    query = "select key, value, run_uuid from tags where key in ('dsd.kind', 'dsd.dataset', 'dsd.method')"
    tags: dict[str, dict[str, str]] = {}
    for key, value, run in rows(url, query):
        tags.setdefault(run, {})[key] = value
    return sorted(
        tuple(found.get(f"dsd.{key}", "") for key in ("kind", "dataset", "method")) for found in tags.values()
    )


def rows(url: str, query: str) -> list[tuple[str, ...]]:
    connection = psycopg2.connect(url)
    with connection.cursor() as cursor:
        cursor.execute(query)
        found = cursor.fetchall()
    connection.close()
    return found


@pytest.mark.slow
def test_the_whole_dag_on_the_stores_of_a_team(postgres: Postgres, tmp_path: Path) -> None:
    mlflow, prefect = postgres(), postgres()
    settings = environment() | {MLFLOW: mlflow, DATABASE: prefects(prefect), "DVC_NO_ANALYTICS": "1"}

    def run(folder: Path, *command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def git(folder: Path, *command: str) -> str:
        return run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@t", *command)

    first, second, store = fill(tmp_path / "first"), tmp_path / "second", tmp_path / "store"
    reproduce = (sys.executable, "-m", "flows.reproduce")
    assert "report: data/report/index.html" in run(first, *reproduce)
    found = entered(mlflow)
    assert {kind for kind, _, _ in found} == {"result", "training", "report"}
    assert len(found) == len(set(found))
    assert {"reproduce", "train", "report"} <= {name for (name,) in rows(prefect, "select name from flow")}
    locations = {Path(urlsplit(address).path) for (address,) in rows(mlflow, "select artifact_uri from runs")}
    assert all(location.is_relative_to(first / "mlartifacts") for location in locations)
    assert "up to date" in run(first, *reproduce)
    assert entered(mlflow) == found
    assert not (first / "mlflow.db").exists()

    run(first, "dvc", "remote", "add", "-d", "store", str(store))
    run(first, "dvc", "push")
    git(first, "add", "-A")
    git(first, "commit", "-qm", "results")
    git(tmp_path, "clone", "-q", str(first), str(second))
    for results in ("studies", "races"):
        (second / "data" / results).mkdir()  # empty here, and Git keeps no empty folder
    run(second, "dvc", "pull")
    assert run(second, *reproduce).splitlines() == ["everything is up to date", "report: data/report/index.html"]
    for name in ("data/report/index.html", "data/evaluate/metrics.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    assert entered(mlflow) == found  # another clone has nothing to add
