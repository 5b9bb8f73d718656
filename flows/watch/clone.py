"""Reproductions in a clone of the workspace: same commit, same params but for the backbone, shared DVC cache."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dsd.config import BackboneParams, by_file, read
from dsd.errors import DsdError
from dsd.store import write_atomic
from flows.command import command, last_line
from flows.process import die_with_parent
from flows.stores import PARENT, uri

READY = ".git/ready"  # written last: a clone with this file is complete
LOG, ERRORS = "run.log", "run.err"


def clone(target: Path, name: str, row: BackboneParams) -> Path:
    """Make a clone of this workspace's commit at `target`, with its current params plus a row of `backbones`.

    DVC's settings, lock and cache are the workspace's, and all outputs in the lock are checked out, because persistent
    outputs cannot be fetched later. A clone left by an earlier run is reused, and moved to the workspace's commit.

    Raises:
        DsdError: this is no git repository or no DVC project; one line.
    """
    head = command(Path(), "git", "rev-parse", "HEAD")
    whole = (target / READY).exists()
    if not whole:
        shutil.rmtree(target, ignore_errors=True)
        command(Path(), "git", "clone", "--quiet", "--shared", "--no-checkout", str(Path().resolve()), str(target))
    if not whole or command(target, "git", "rev-parse", "HEAD") != head:
        command(target, "git", "checkout", "--quiet", "--force", "--detach", head)
        for file in (".dvc/config", ".dvc/config.local", "dvc.lock"):
            if Path(file).exists():
                shutil.copy(file, target / file)
    settings = read()
    link(target, settings)
    settings["backbones"][name] = row.model_dump(mode="json")
    for path, content in by_file({**settings, "backbone": name}).items():
        write_atomic(target / path, yaml.safe_dump(content, sort_keys=False).encode())
    if not whole:
        command(target, "dvc", "cache", "dir", "--local", command(Path(), "dvc", "cache", "dir"))
        command(target, "dvc", "checkout", "--quiet", "--allow-missing")
        (target / READY).touch()
    return target


def link(target: Path, settings: Any) -> None:
    """Link all paths that the params name, that are in this workspace and not in git, such as the user's own images."""
    for path in map(os.path.normpath, _texts(settings)):
        inside = not path.startswith(("..", "/"))
        if inside and os.path.exists(path) and not os.path.lexists(target / path):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).symlink_to(Path(path).resolve())


def _texts(settings: Any) -> Iterator[str]:
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, Mapping | list):
        for value in settings.values() if isinstance(settings, Mapping) else settings:
            yield from _texts(value)


def reproduce(target: Path, lock: int, attempt: str) -> None:
    """Run the whole DAG in a clone, in a process that ends with this one and holds `lock` while it lives.

    `attempt` is the MLflow run that its trainings belong to.

    Raises:
        DsdError: it failed; with its last line of output. run.log and run.err in the clone have the rest.
    """
    own = {"MLFLOW_TRACKING_URI": uri(), PARENT: attempt, "PREFECT_HOME": str(target.resolve() / ".prefect")}
    own |= {"TQDM_DISABLE": "1", "PREFECT_LOGGING_TO_API_ENABLED": "false"}  # else the last line may be theirs
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT__")}
    with (target / LOG).open("wb") as out, (target / ERRORS).open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.reproduce"],
            cwd=target,
            env=inherited | own,
            stdout=out,
            stderr=errors,
            pass_fds=[lock],
            preexec_fn=die_with_parent,
        )
        try:
            status = process.wait()
        except BaseException:
            process.send_signal(signal.SIGTERM)
            process.wait()
            raise
    if status:
        problem = last_line((target / ERRORS).read_text(errors="replace"))
        raise DsdError(problem or f"python -m flows.reproduce: ended with status {status}")
