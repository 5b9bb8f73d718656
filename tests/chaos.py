"""What the fault campaign is made of: a small reproduction, where it stands, what ends it, and what must hold after."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

from flows.process import die_with_parent
from tests.conftest import read_settings, write_settings
from tests.test_pipeline import environment, fill

STAGES = ("download", "prepare", "cache", "train", "score", "evaluate", "report")
PHASES = ("start", *STAGES, "publish")  # in this order; "between" two stages is DVC's own work
VICTIMS = ("group", "stage", "parent", "server")
VOLATILE = ("timings", "report", "reproduction.json")  # what says how long something took
ENTRIES = """
    select kind.value, key.value, runs.status, count(metrics.value), count(distinct metrics.key || metrics.step)
    from runs join tags kind on kind.run_uuid = runs.run_uuid and kind.key = 'dsd.kind'
    join tags key on key.run_uuid = runs.run_uuid and key.key = 'dsd.key'
    left join metrics on metrics.run_uuid = runs.run_uuid
    where runs.lifecycle_stage = 'active' group by runs.run_uuid order by 1, 2, 3
"""


def workspace(folder: Path) -> Path:
    """A clone in which every stage works for some seconds, so that a kill can fall into its work."""
    fill(folder)
    settings = read_settings(folder)
    settings["datasets"]["scenes-com"] |= {"size": 240, "test": 60}
    for row in settings["training"].values():
        row |= {"least_steps": 16, "checkpoint_every": 4}
    settings["evaluate"]["resamples"] = 500
    write_settings(settings, folder)
    return folder


def outside(folder: Path) -> dict[str, str]:
    """Variables: DVC's memory of files, else in /var/tmp for ever, and one thread, which is best for tiny models."""
    return {"DVC_SITE_CACHE_DIR": str(folder.with_name(f"{folder.name}.dvc")), "OMP_NUM_THREADS": "1"}


class Reproduction:
    """`python -m flows.reproduce`, started in a folder; its output goes to a file beside the folder."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = (), **variables: str) -> None:
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log")
        command = [*prefix, sys.executable, "-m", "flows.reproduce"]
        with self.log.open("wb") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=folder,
                env=environment() | outside(folder) | variables,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.process = psutil.Process(self.popen.pid)
        self.served = self.staged = False
        self.began = time.monotonic()

    def _children(self) -> dict[str, psutil.Process]:
        """The stage that is running, by its name, and the Prefect server, as "server"."""
        found = {}
        try:
            for child in self.process.children(recursive=True):
                words = child.cmdline()
                if "server" in words:
                    found["server"] = child
                elif len(words) > 2 and words[1] == "-m":
                    found[words[2].removeprefix("flows.stages.")] = child
        except psutil.NoSuchProcess:
            pass
        return found

    def phase(self) -> str | None:
        """Where the run stands; None if it has ended."""
        if self.popen.poll() is not None:
            return None
        children = self._children()
        self.served |= "server" in children
        running = next((stage for stage in STAGES if stage in children), None)
        self.staged |= running is not None
        if running:
            return running
        if self.served and "server" not in children:
            return "publish"
        return "between" if self.staged else "start"

    def reach(self, aimed: str, share: float, seconds: Mapping[str, float]) -> bool:
        """Waits until so great a share of a phase, which takes so many seconds, is over, or the run is beyond it.

        Returns whether the run still goes on.
        """
        while (phase := self.phase()) is not None and not self._beyond(phase, aimed):
            time.sleep(0.02)
        until = time.monotonic() + share * seconds[aimed] * (phase == aimed)
        while self.phase() == phase and time.monotonic() < until:
            time.sleep(0.02)
        return self.phase() is not None

    def _beyond(self, phase: str, aimed: str) -> bool:
        if "between" in (phase, aimed):
            return phase == aimed
        return PHASES.index(phase) >= PHASES.index(aimed)

    def kill(self, victim: str) -> str:
        """kill -9 of the whole process group, or of the stage, the parent or the server alone; returns whom it hit.

        A victim that is not there is answered by the parent.
        """
        children = self._children()
        stage = next((children[stage] for stage in STAGES if stage in children), None)
        server = children.get("server")
        if victim == "group":
            os.killpg(self.popen.pid, signal.SIGKILL)
        elif victim == "stage" and stage is not None:
            stage.kill()
        elif victim == "server" and server is not None:
            server.kill()
        else:
            self.process.kill()
            return "parent"
        return victim

    def wait(self) -> int:
        return self.popen.wait(timeout=600)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")


def run(folder: Path, prefix: tuple[str, ...] = (), **variables: str) -> Reproduction:
    """A reproduction that has ended."""
    started = Reproduction(folder, prefix, **variables)
    started.wait()
    return started


@dataclass(frozen=True)
class State:
    """What two finished workspaces must have in common."""

    files: dict[str, str]  # SHA-256 of each file under data/ and models/
    entries: list[tuple]  # kind, key, status and counts of metrics of every entry of MLflow

    @classmethod
    def of(cls, folder: Path) -> State:
        places = [*(folder / "data").rglob("*"), *(folder / "models").rglob("*")]
        names = {path: path.relative_to(folder) for path in places if path.is_file()}
        files = {
            name.as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path, name in names.items()
            if name.parts[1] not in VOLATILE
        }
        with sqlite3.connect(folder / "mlflow.db") as database:
            return cls(dict(sorted(files.items())), database.execute(ENTRIES).fetchall())


@dataclass(frozen=True)
class Reference:
    """An undisturbed reproduction: what it left, a copy of it, and how long it was in each phase."""

    folder: Path
    copy: Path
    state: State
    seconds: dict[str, float]

    @classmethod
    def make(cls, parent: Path) -> Reference:
        folder, copy = parent / "workspace", parent / "copy"
        started = Reproduction(workspace(folder))
        seconds, last = dict.fromkeys((*PHASES, "between"), 0.0), time.monotonic()
        while (phase := started.phase()) is not None:
            time.sleep(0.05)
            seconds[phase] += time.monotonic() - last
            last = time.monotonic()
        assert started.wait() == 0, started.output
        seconds["between"] /= len(STAGES)
        shutil.copytree(folder, copy)
        return cls(folder, copy, State.of(folder), seconds)

    def restore(self) -> Path:
        """The finished workspace, where it was made: MLflow knows its entries' files by their absolute paths."""
        shutil.rmtree(self.folder)
        return Path(shutil.copytree(self.copy, self.folder))


def check_cache(folder: Path) -> None:
    """Every file of DVC's cache has the name of its content, and nothing else is there."""
    cache = folder / ".dvc" / "cache" / "files" / "md5"
    for path in cache.rglob("*"):
        if path.is_file():
            named = (path.parent.name + path.name).removesuffix(".dir")
            assert hashlib.md5(path.read_bytes()).hexdigest() == named, path


def alive(folder: Path) -> list[str]:
    """The command lines of the processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


def check_alone(folder: Path, seconds: float = 30) -> None:
    """No process is left that works in the folder; a server may take a moment to go."""
    deadline = time.monotonic() + seconds
    while (left := alive(folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left


def check_one_line(ended: Reproduction) -> str:
    """The run has failed, and says why in one line: the last; returns it."""
    assert ended.popen.returncode not in (0, None), ended.output
    assert "Traceback" not in ended.output, ended.output
    last = ended.output.strip().splitlines()[-1]
    assert last.split(":")[0] in ("reproduce", *STAGES), ended.output
    return last


def forget(folder: Path, first: str) -> None:
    """Makes a stage and all after it stale: without outputs, lock entries and what DVC's run cache has of them.

    Empty folders are left there, as by a kill within DVC.
    """
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    for stage in STAGES[STAGES.index(first) :]:
        lock["stages"].pop(stage, None)
        shutil.rmtree(folder / "data" / stage, ignore_errors=True)
    (folder / "dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
    for path in (folder / ".dvc" / "cache" / "runs").rglob("*"):
        if path.is_file() and yaml.safe_load(path.read_text())["cmd"].rpartition(".")[2] not in lock["stages"]:
            path.unlink()


class Mounts:
    """A namespace of this test's own in which file systems are mounted; they vanish with it."""

    def __init__(self) -> None:
        command = ["unshare", "--user", "--map-root-user", "--mount", "--propagation", "private", "sleep", "infinity"]
        self._holder = subprocess.Popen(command)
        time.sleep(0.5)
        self.prefix = ("nsenter", "--target", str(self._holder.pid), "--user", "--mount", "--preserve-credentials")
        self.root = Path("/proc") / str(self._holder.pid) / "root"

    def inside(self, *command: str) -> None:
        subprocess.run([*self.prefix, *command], check=True)

    def run(self, folder: Path) -> Reproduction:
        """A reproduction that sees the mounts; its folder is entered anew, since a folder that is open is not."""
        return run(folder, (*self.prefix, "env", "--chdir", str(folder)))

    def end(self) -> None:
        self._holder.kill()
        self._holder.wait()


@contextmanager
def mounts() -> Iterator[Mounts]:
    """Skips the test where there is no right to mount, even in a namespace of one's own."""
    able = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    if shutil.which("unshare") is None or subprocess.run(able, capture_output=True).returncode:
        pytest.skip("needs unshare and user namespaces (or root) to mount a small or read-only file system")
    made = Mounts()
    try:
        yield made
    finally:
        made.end()


@contextmanager
def held(database: Path) -> Iterator[Callable[[], None]]:
    """Another connection has the exclusive lock on an SQLite file; gives the function that lets go of it."""
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("begin exclusive")
    try:
        yield connection.close
    finally:
        connection.close()
