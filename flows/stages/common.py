"""Common parts of the stages: the params that each may read, its units of work and timings."""

from __future__ import annotations

import functools
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from prefect import Flow, flow, task
from prefect.cache_policies import NO_CACHE

from dsd.config import Params, load
from dsd.data.proxies import check_proxies
from dsd.store import libraries, write_json
from dsd.versions import VERSIONS
from flows import DATA
from flows.failures import error_line, exit_with
from flows.process import die_with_parent

Details = dict[str, Any]
Stage: TypeAlias = Flow[[], None]

# Prefect stores errors with the run; on the terminal `main` prints them once.
for _name in ("prefect.flow_runs", "prefect.task_runs"):
    logging.getLogger(_name).propagate = False
logging.getLogger("prefect.events.clients").setLevel(logging.CRITICAL)  # `main` reports a dead server
logging.raiseExceptions = False  # of log records that do not reach a server that is shutting down


def declared(name: str) -> set[str]:
    """The params sections that dvc.yaml lists for a stage, whichever file holds them."""
    entries = yaml.safe_load(Path("dvc.yaml").read_text())["stages"][name].get("params", ())
    other_files = [entry for entry in entries if isinstance(entry, dict)]  # {studies.yaml: [studies]}
    sections = {section for entry in other_files for listed in entry.values() for section in listed}
    return sections | {entry for entry in entries if isinstance(entry, str)}


def stage_params(name: str) -> Params:
    """Load the sections of the params that dvc.yaml lists for a stage, and `runtime`, which changes no result.

    Reading any other section raises AttributeError, so a section missing in dvc.yaml cannot leave an output stale.

    Raises:
        ParamsError: the params are invalid.
    """
    granted = declared(name) | {"runtime"}
    return Params.model_construct(**{section: value for section, value in load() if section in granted})


def each(function: Callable[[str], Mapping[str, Any]], names: Iterable[str], **options: Any) -> dict[str, Details]:
    """Return the result for each name and its duration in seconds, as Prefect tasks with these options.

    They run in sequence, since one already uses the whole machine. No result is cached or stored: DVC decides that.
    """

    @functools.wraps(function)
    def timed(name: str) -> Details:
        start = time.perf_counter()
        result = function(name)
        return {**result, "seconds": round(time.perf_counter() - start, 3)}

    unit = task(timed, task_run_name="{name}", cache_policy=NO_CACHE, persist_result=False, **options)
    return {name: unit(name) for name in names}


def stage(body: Callable[[Params], Mapping[str, Details]]) -> Stage:
    """Make the flow of a stage of a function with the stage's name.

    The function takes the stage's params and returns the details of its units. They are written to
    data/timings/<stage>.json, which the report shows and no stage depends on.
    """
    name = body.__name__

    @flow(name=name, persist_result=False)
    def run() -> None:
        details = body(stage_params(name))
        record: Details = {
            "stage": name,
            "seconds": round(sum(detail["seconds"] for detail in details.values()), 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": device(),
            "versions": VERSIONS,
            "libraries": libraries(),
            "details": details,
        }
        write_json(DATA / "timings" / f"{name}.json", record, indent=2)

    return run


def main(run: Stage) -> None:
    """Run a stage as a command; a user error ends it with one line and exit status 1."""
    if "DVC_STAGE" in os.environ:  # a stage that outlives a killed DVC would run at the same time as the next one
        die_with_parent()
    try:
        check_proxies()  # on which prefect fails with a traceback
        run()
    except KeyboardInterrupt:
        if "DVC_STAGE" not in os.environ:  # else the reproduction says so
            print(f"{run.name}: interrupted; run it again to resume", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (line := error_line(error)) is None:
            raise
        exit_with(f"{run.name}: {line}", error)


def prune(folder: Path, names: Iterable[str]) -> None:
    """Remove everything in a folder except these names; DVC keeps all files of a persistent output."""
    keep = set(names)
    for path in folder.glob("*"):
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def device() -> str:
    """Return the device that this process has used: the GPU, else the CPU."""
    torch = sys.modules.get("torch")  # without it the stage has used no GPU
    if torch is not None and torch.cuda.is_initialized():
        return str(torch.cuda.get_device_name())
    return f"{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """Return the CPU's model name on Linux, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())
