"""The whole reproduction: `dvc repro` under one Prefect server, then MLflow, then where the report is."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
from dvc import dvcfile
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError
from dvc.utils.serialize import dumps_yaml, parse_yaml_for_update

from dsd.config import load
from dsd.errors import DsdError
from dsd.store import write_atomic
from flows import DATA
from flows.process import die_with_parent
from flows.stores import DATABASE, PREFECT, reach, shown

LOG = logging.getLogger("dvc")
LOG.setLevel(logging.ERROR)  # that a stage is frozen is no news
for _name in ("dvc", "dvc_data", "dvc_objects"):
    logging.getLogger(_name).propagate = False  # prefect would print it a second time
RWLOCK = Path(".dvc") / "tmp" / "rwlock"  # which paths DVC's processes are at work on
STARTUP_SECONDS = 600  # some 5 s on an idle machine; a server that has died is noticed at once


def main() -> None:
    """Runs the reproduction as a command; a stage that fails has said why itself."""
    # dvc.yaml says `python`, which is to be the one that runs here.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        print(reproduce())
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = failure(error)
        if line is None:
            raise
        sys.exit(f"reproduce: {line}" if line else 1)


def failure(error: Exception) -> str | None:
    """The line that a failed run ends with: "" where a stage has said it, None where it is a defect of ours."""
    from flows.stages.common import mistake  # it imports prefect, which takes a while

    cause = error.__cause__
    # One that ended by itself; of one that was killed DVC knows the signal.
    if isinstance(cause, StageCmdFailedError) and str(cause).endswith("exited with 1"):
        return ""
    if (line := mistake(error)) is None and isinstance(error, DvcException):
        line = f"{error}{f': {cause}' if cause else ''}"
    return line if line is None else " ".join(line.split())


def reproduce() -> str:
    """Brings the workspace up to date; returns what to tell the user.

    Raises:
        DsdError: params.yaml is not what it should be, or the Prefect server does not start.
        DvcException: a stage failed, or DVC cannot work here.
    """
    started = datetime.now(UTC).replace(microsecond=0)
    clock = time.monotonic()
    params = load()
    mend()
    with Repo() as repo:
        every = {stage.name for stage in repo.index.stages if not stage.frozen}
        empty = not any(out.exists for out in repo.index.outs if out.persist)  # nothing that a stage could go on with
        stale = bool(repo.status())
        if stale:
            with at_work(Path(repo.cache.local.path).parent.parent):
                run(repo)
    from flows.tracking import publish

    publish(params, DATA)
    report = f"report: {DATA / 'report' / 'index.html'}"
    if not stale:
        return f"everything is up to date\n{report}"
    total, stages = time.monotonic() - clock, finished(since=started)
    orchestration = total - sum(record["seconds"] for record in stages)
    if empty and {record["stage"] for record in stages} == every:  # a whole one, which `make bench` reports
        whole = {"seconds": total, "orchestration": orchestration}
        write_atomic(DATA / "reproduction.json", json.dumps(whole, indent=2).encode())
    return f"orchestration: {orchestration:.0f} s of {total:.0f} s\n{report}"


def waiting() -> list[str]:
    """The stages that a reproduction would run, in their order.

    Raises:
        DsdError: DVC cannot work here.
    """
    with _dvc() as repo:
        return list(repo.status())


def cache() -> Path:
    """The folder of DVC's cache, which need not be there yet.

    Raises:
        DsdError: DVC cannot work here.
    """
    with _dvc() as repo:
        return Path(repo.cache.local.path)


def remote() -> str | None:
    """The address of DVC's default remote, None where there is none; an empty one is as good as another.

    Raises:
        DsdError: it cannot be reached, or DVC cannot work here.
    """
    with _dvc() as repo:
        name = repo.config["core"].get("remote")
        if name is None:
            return None
        address = shown(str(repo.config["remote"].get(name, {}).get("url", "")))
        try:
            there = repo.cloud.get_remote()
            known = there.fs.exists(there.path) or there.fs.exists(there.fs.parent(there.path))
        except Exception as error:  # each kind of remote has its own family of errors
            raise DsdError(f"{name} {address}: {' '.join(str(error).split())[:200]}") from None
        if not known:
            raise DsdError(f"{name} {address}: no such folder, nor one to make it in")
        return f"{name} {address}"


@contextlib.contextmanager
def _dvc() -> Iterator[Repo]:
    """The repository here; what keeps DVC from working is one line."""
    try:
        with Repo() as repo:
            yield repo
    except DvcException as error:
        raise DsdError(" ".join(str(error).split())) from None


def run(repo: Repo) -> None:
    """`dvc repro` as one Prefect flow, whose server the stages share."""
    LOG.setLevel(logging.INFO)  # which stage runs
    with server():
        from prefect import flow

        @flow(name="reproduce", persist_result=False)
        def dag() -> None:
            repo.reproduce()

        dag()


@contextlib.contextmanager
def modify_yaml(path: str, fs: Any = None) -> Iterator[Any]:
    """DVC's own function writes dvc.lock in place and takes its time: a kill would cut it short. This one does not."""
    file = Path(path)
    data = parse_yaml_for_update(file.read_text(), path) if file.exists() else {}
    yield data
    write_atomic(file, dumps_yaml(data).encode())


dvcfile.modify_yaml = modify_yaml


def mend() -> None:
    """Removes DVC's list of the paths in use where a kill has cut it short: with it DVC fails ever after."""
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads(RWLOCK.read_text())
        except ValueError:
            RWLOCK.unlink()


@contextlib.contextmanager
def at_work(cache: Path) -> Iterator[None]:
    """In the block DVC's cache, which other workspaces may share, is in use; who finds it idle mends it first."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("a") as lock:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mend_cache(cache)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def mend_cache(cache: Path) -> None:
    """Removes what a kill or a full disk leaves half written, and what DVC fails on: empty folders in its memory."""
    for place in ("files/md5", "files/md5/*", "runs/*/*"):
        for file in cache.glob(f"{place}/.*.tmp"):
            file.unlink()
    for folder in cache.glob("runs/*/*"):  # a folder for each stage with its dependencies
        with contextlib.suppress(OSError):
            folder.rmdir()


def finished(since: datetime) -> list[dict[str, Any]]:
    """The timings of the stages that finished since then."""
    records = (json.loads(path.read_text()) for path in sorted((DATA / "timings").glob("*.json")))
    return [record for record in records if datetime.fromisoformat(record["finished"]) >= since]


@contextlib.contextmanager
def server() -> Iterator[None]:
    """A Prefect server on a free port of this machine, unless the user has named one in PREFECT_API_URL.

    Raises:
        DsdError: it does not answer, its database cannot be reached, or it has ended before the work was done.
    """
    if PREFECT in os.environ:
        reach(PREFECT, os.environ[PREFECT])
        yield
        return
    if DATABASE in os.environ:
        reach(DATABASE, os.environ[DATABASE])
    log = Path(os.environ["PREFECT_HOME"]) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    address = f"http://127.0.0.1:{port}"
    # In a session of its own it is spared the Ctrl-C that is meant for the stage, and records how that ends.
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, preexec_fn=die_with_parent
        )
    try:
        os.environ[PREFECT] = f"{address}/api"
        import flows.stages.common  # noqa: F401  (it imports prefect, which takes a while, as the server does)

        wait(process, f"{address}/api/health", log)
        print(f"Prefect shows the run at {address}", flush=True)
        yield
    except Exception as error:
        from flows.stages.common import mistake

        if process.poll() is not None and not isinstance(error, DsdError):
            raise DsdError(
                f"the Prefect server has ended in mid-run; {log} says why, and the next run goes on"
            ) from error
        if isinstance(error, httpx.HTTPError) and (line := mistake(error)):  # while it is known where the server is
            raise DsdError(line) from error
        raise
    finally:
        os.environ.pop(PREFECT, None)
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Returns when the server answers.

    Raises:
        DsdError: it has ended, or does not answer in time.
    """
    deadline = time.monotonic() + STARTUP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise DsdError(f"the Prefect server does not answer; {log} says why")


if __name__ == "__main__":
    main()
