"""What the stages share: the params each may read, its units of work, their timings, and how it fails."""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import platform
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import yaml
from prefect import Flow, Task, flow, task
from prefect.cache_policies import NO_CACHE

from dsd.config import Params, load
from dsd.errors import DsdError
from dsd.store import write_atomic
from flows import DATA
from flows.process import die_with_parent

FULL = 2**20  # bytes: with fewer of them free no database gets on
Details = dict[str, Any]
Stage: TypeAlias = Flow[[], None]

# What went wrong is in Prefect's record of the run; the terminal gets it once, from `main`.
for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).propagate = False
logging.raiseExceptions = False  # that such a record did not reach a server which is going away is no news


def declared(name: str) -> set[str]:
    """The params sections that dvc.yaml lists for a stage, whichever file holds them."""
    entries = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][name].get("params", ())
    apart = [entry for entry in entries if isinstance(entry, dict)]  # {studies.yaml: [studies]}
    sections = {section for entry in apart for listed in entry.values() for section in listed}
    return sections | {entry for entry in entries if isinstance(entry, str)}


def params(name: str) -> Params:
    """The params of a stage: the sections that dvc.yaml lists for it, and `runtime`, which changes no result.

    Reading any other section is an AttributeError, so a section missing in dvc.yaml cannot leave an output stale.

    Raises:
        ParamsError: the params are invalid; one line.
    """
    granted = declared(name) | {"runtime"}
    return Params.model_construct(**{section: value for section, value in load() if section in granted})


def unit(function: Callable[[str], Mapping[str, Any]], **options: Any) -> Task[[str], Details]:
    """A function of a dataset's name as a Prefect task; its result also says how many seconds it worked.

    DVC decides what is computed again, so no result is cached or kept. `options` are those of `prefect.task`.
    """

    @functools.wraps(function)
    def timed(name: str) -> Details:
        start = time.perf_counter()
        result = function(name)
        return {**result, "seconds": round(time.perf_counter() - start, 3)}

    return task(timed, task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False, **options)


def each(work: Callable[[str], Details], names: Iterable[str]) -> dict[str, Details]:
    """The results of the work on every name, one after the other: each by itself fills the machine."""
    return {name: work(name) for name in names}


def stage(body: Callable[[Params], Mapping[str, Details]]) -> Stage:
    """The flow of the stage that the function is named after.

    The function gets the stage's params and returns the details of its units; they go into
    data/timings/<stage>.json, which no stage but the report depends on.
    """
    name = body.__name__

    @flow(name=name, persist_result=False)
    def run() -> None:
        details = body(params(name))
        record: Details = {
            "stage": name,
            "seconds": round(sum(detail["seconds"] for detail in details.values()), 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device(),
            "details": details,
        }
        write_atomic(DATA / "timings" / f"{name}.json", json.dumps(record, indent=2).encode())

    return run


def main(run: Stage) -> None:
    """Runs a stage as a command: a user's mistake ends it with one line and exit status 1."""
    if "DVC_STAGE" in os.environ:  # a stage that outlived a killed DVC would get in the way of the next
        die_with_parent()
    try:
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        line = mistake(error)
        if line is None:
            raise
        sys.exit(f"{run.name}: {line}")


def mistake(error: BaseException | None) -> str | None:
    """What a user has to mend, from an exception or its cause; None where it is a defect of ours."""
    while error is not None:
        if isinstance(error, DsdError):
            return str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            # What fails to write, rather than to open, knows no name; the disk need not be that of this folder.
            free = f"{Path.cwd()} has {shutil.disk_usage('.').free} bytes free"
            return (
                f"{error.filename}: disk full, {free}" if error.filename else f"disk full: {free}, other disks may not"
            )
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{error.filename or Path.cwd()}: {os.strerror(error.errno)}; it has to be writable"
        if isinstance(error, sqlite3.OperationalError):  # locked, read-only, on a full disk
            return f"the database of MLflow, mlflow.db unless MLFLOW_TRACKING_URI names another: {error}"
        if isinstance(error, httpx.HTTPError):
            server = os.environ.get("PREFECT_API_URL", "")
            if server and str(error.request.url).startswith(server):
                left = shutil.disk_usage(".").free
                why = f"disk full, {Path.cwd()} has {left} bytes free" if left < FULL else str(error)
                return f"the Prefect server at {server} does not answer as it should: {why}"
        error = error.__cause__
    return None


def prune(folder: Path, names: Iterable[str]) -> None:
    """Removes what is not of these names, those that params.yaml has: DVC keeps all of a persistent output."""
    keep = set(names)
    for path in folder.glob("*"):
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def device() -> str:
    """What this process has computed on: the GPU if it used one, else the processor."""
    torch = sys.modules.get("torch")  # a stage that has not imported it has used no GPU
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    return f"{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """The processor's model name where Linux tells it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
