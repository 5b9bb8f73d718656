"""The whole reproduction: `dvc repro` with one Prefect server, then publication to MLflow."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import httpx
from dvc.exceptions import DvcException
from dvc.fs import LocalFileSystem
from dvc.repo import Repo
from dvc.stage.exceptions import StageCmdFailedError
from dvc_data.hashfile.db import HashFileDB

from dsd.config import load, read
from dsd.data.proxies import check_proxies
from dsd.errors import DsdError, brief
from dsd.store import write_atomic, write_json
from flows import DATA
from flows.failures import disk_full, error_line, exit_with, full_disks
from flows.process import die_with_parent
from flows.stores import DATABASE, PREFECT, check, redacted

LOG = logging.getLogger("dvc")
LOG.setLevel(logging.ERROR)  # it warns about frozen stages
for _name in ("dvc", "dvc_data", "dvc_objects"):
    logging.getLogger(_name).propagate = False  # prefect would print each message a second time
RWLOCK = Path(".dvc") / "tmp" / "rwlock"  # the paths that DVC's processes use
RUNNING = DATA / "reproduce.lock"  # holds the number of the process that reproduces here
INTERRUPTED = ("exited with 130", "exited with -2")  # the end of DVC's message about a stage that Ctrl-C has stopped
RESUMED = ("cache", "train", "score")  # data folders whose content a stage resumes from
STARTUP_SECONDS = 600  # the limit; a server starts in 5 s on an idle machine


def main(first: Callable[[], None] = lambda: None, *, recompute: bool = False) -> None:
    """Run the reproduction as a command; a failed stage prints its own error.

    first: applies a preset, once no other reproduction can run here.
    """
    # The commands in dvc.yaml call `python`, which must be this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        read()  # else the lock would be left in a folder that is no project
        with alone():
            first()
            print(reproduce(recompute=recompute))
    except KeyboardInterrupt:
        _interrupted()
    except Exception as error:
        if str(error.__cause__).endswith(INTERRUPTED):  # a stage; DVC itself ignores Ctrl-C while a stage runs
            _interrupted()
        line = failure(error)
        if line is None:
            raise
        if line:
            exit_with(f"reproduce: {line}", error)
        sys.exit(1)


def _interrupted() -> NoReturn:
    print("reproduce: interrupted; run it again to resume", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Exclude other reproductions of this workspace; raise DsdError, with the other's process, if there is one."""
    RUNNING.parent.mkdir(parents=True, exist_ok=True)
    with RUNNING.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            line = f"process {lock.read().strip()} reproduces in this workspace; wait for it, or stop it"
            raise DsdError(line) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def failure(error: Exception) -> str | None:
    """The last line of a failed run: "" if a stage has printed it, None for a defect."""
    cause = error.__cause__
    # A stage that was killed has another status, which DVC's message names.
    if isinstance(cause, StageCmdFailedError) and str(cause).endswith("exited with 1"):
        return ""
    if (line := error_line(error)) is None and isinstance(error, DvcException):
        line = f"{error}{f': {cause}' if cause else ''}"
    return line if line is None else brief(line, None)


def reproduce(*, recompute: bool = False) -> str:
    """Run the stages that are not up to date, and publish the results; return the message for the user.

    With `recompute`, run every stage that is not frozen, without encodings, trainings and evidence of earlier runs.

    Raises:
        DsdError: params.yaml is invalid, or the Prefect server does not start; see `server`.
        DvcException: a stage failed, or this is not a DVC project.
    """
    started, clock = datetime.now(UTC).replace(microsecond=0), time.monotonic()
    params = load()
    repair_rwlock()
    with Repo(fs=AtomicFiles()) as repo:
        names = [stage.name for stage in repo.index.stages if not stage.frozen]
        empty = not any(out.exists for out in repo.index.outs if out.persist)  # no stage can resume
        if stale := recompute or bool(repo.status()):
            from dsd.estimate import check as check_settings  # it imports torch

            check_settings(params)
            for name in RESUMED if recompute else ():
                shutil.rmtree(DATA / name, ignore_errors=True)
            verify_objects(repo)
            with cache_in_use(Path(repo.cache.local.path).parent.parent):
                run(repo, params.backbone, names if recompute else ())
    from flows.tracking import publish

    publish(params, DATA)
    report = f"report: {DATA / 'report' / 'index.html'}"
    if not stale:
        return f"everything is up to date\n{report}"
    total, records = time.monotonic() - clock, finished(since=started)
    orchestration = total - sum(record["seconds"] for record in records)
    if empty and {record["stage"] for record in records} == {*names}:  # `make bench` reports whole reproductions only
        write_json(DATA / "reproduction.json", {"seconds": total, "orchestration": orchestration})
    return f"orchestration: {orchestration:.0f} s of {total:.0f} s\n{report}"


def stale_stages() -> list[str]:
    """The stages that a reproduction would run, in order."""
    with open_repo() as repo:
        return list(repo.status())


def cache_folder() -> Path:
    """The folder of DVC's cache, which may not exist yet."""
    with open_repo() as repo:
        return Path(repo.cache.local.path)


def remote_address() -> str | None:
    """The name and address of DVC's default remote, if any; raise DsdError if it cannot be reached or created."""
    with open_repo() as repo:
        name = repo.config["core"].get("remote")
        if name is None:
            return None
        address = redacted(str(repo.config["remote"].get(name, {}).get("url", "")))
        try:
            remote = repo.cloud.get_remote()
            exists = remote.fs.exists(remote.path) or remote.fs.exists(remote.fs.parent(remote.path))
        except Exception as error:  # each kind of remote raises errors of its own
            raise DsdError(f"{name} {address}: {brief(error, 200)}") from None
        if not exists:
            raise DsdError(f"{name} {address}: no such folder, and no parent to create it in")
        return f"{name} {address}"


@contextlib.contextmanager
def open_repo() -> Iterator[Repo]:
    """Open the DVC repository of this folder; turn the errors of DVC into one line."""
    try:
        with Repo() as repo:
            yield repo
    except DvcException as error:
        raise DsdError(brief(error, None)) from None


def run(repo: Repo, name: str, recomputed: Sequence[str] = ()) -> None:
    """Run `dvc repro` as a Prefect flow run of this name, with a server for all stages; first recompute some stages."""
    LOG.setLevel(logging.INFO)  # it logs the running stage
    with server():
        from prefect import flow

        @flow(name="reproduce", flow_run_name=name, persist_result=False)
        def dag() -> None:
            for stage in recomputed:
                repo.reproduce(stage, single_item=True, force=True)
            repo.reproduce()

        dag()


class AtomicFiles(LocalFileSystem):
    """A file system that writes dvc.lock atomically; DVC's own writes it in place, where a kill would truncate it."""

    def open(self, path: str, mode: str = "r", **options: Any) -> Any:
        return write_whole(Path(path)) if mode == "w+" else super().open(path, mode, **options)


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[io.StringIO]:
    """A text buffer that is written to a file when the block ends without an error."""
    buffer = io.StringIO()
    yield buffer
    write_atomic(path, buffer.getvalue().encode())


def repair_rwlock() -> None:
    """Remove DVC's list of the paths in use if a kill has truncated it; DVC fails on a truncated one."""
    with contextlib.suppress(FileNotFoundError):
        try:
            json.loads(RWLOCK.read_text())
        except ValueError:
            RWLOCK.unlink()


@contextlib.contextmanager
def cache_in_use(cache: Path) -> Iterator[None]:
    """Mark DVC's cache, which workspaces may share, as in use; repair it first if no other process uses it."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / ".lock").open("a") as lock:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            repair_cache(cache)
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield


def verify_objects(repo: Repo) -> None:
    """Make DVC hash an object of its cache before it uses it, and drop a damaged one; it trusts read-only files.

    Hashes of files that have not changed since are in its state database.
    """
    objects = repo.cache.local
    objects.check = partial(HashFileDB.check, objects)


def repair_cache(cache: Path) -> None:
    """Remove partial files, left by a kill or a full disk, and empty folders of the run cache, on which DVC fails."""
    for place in ("files/md5", "files/md5/*", "runs/*/*"):
        for file in cache.glob(f"{place}/.*.tmp"):
            file.unlink()
    for folder in cache.glob("runs/*/*"):  # a folder per stage and dependencies
        with contextlib.suppress(OSError):
            folder.rmdir()


def finished(since: datetime) -> list[dict[str, Any]]:
    """The timings of the stages that have finished since then."""
    records = (json.loads(path.read_text()) for path in sorted((DATA / "timings").glob("*.json")))
    return [record for record in records if datetime.fromisoformat(record["finished"]) >= since]


@contextlib.contextmanager
def server() -> Iterator[None]:
    """Run a Prefect server on a free port of this machine, unless PREFECT_API_URL names one.

    Raises:
        DsdError: the server does not answer or ends too early, its database cannot be reached, or a proxy is invalid.
    """
    check_proxies()
    if PREFECT in os.environ:
        check(PREFECT, os.environ[PREFECT])
        yield
        return
    if DATABASE in os.environ:
        check(DATABASE, os.environ[DATABASE])
    log = Path(os.environ["PREFECT_HOME"]) / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    port = str(free_port())
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
    # In a session of its own it does not receive a Ctrl-C for the stage, and can record how the stage ends.
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PREFECT_UI_API_URL": f"{address}/api"},  # the page would look for it at port 4200
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
    try:
        os.environ[PREFECT] = f"{address}/api"
        import flows.stages.common  # noqa: F401  (it imports prefect, which takes seconds, while the server starts)

        wait_until_ready(process, f"{address}/api/health", log)
        print(f"Prefect UI: {address}/runs", flush=True)
        yield
    except Exception as error:
        if process.poll() is not None and not isinstance(error, DsdError):
            reason = disk_full() if full_disks() else f"see {log}, then run again"
            raise DsdError(f"the Prefect server has ended during the run; {reason}") from error
        if isinstance(error, httpx.HTTPError) and (line := error_line(error)):  # it reads the address, removed below
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


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Wait until the server answers; raise DsdError if it ends or does not answer in time."""
    deadline = time.monotonic() + STARTUP_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise DsdError(f"the Prefect server does not answer; {disk_full() if full_disks() else f'see {log}'}")


if __name__ == "__main__":
    main()
