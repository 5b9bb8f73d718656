"""The whole DAG beside the workspace: in a clone of its commit, with its params, and with DVC's cache shared."""

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

from dsd.config import BackboneParams
from dsd.errors import DsdError
from dsd.store import write_atomic
from flows.process import die_with_parent
from flows.stores import uri

READY = ".git/ready"  # written last: a clone that has it is whole
PARAMS = Path("params.yaml")
LOG, ERRORS = "run.log", "run.err"


def clone(target: Path, name: str, row: BackboneParams) -> Path:
    """A clone of this workspace's commit at `target`, whose params are those of now with a row of `backbones` put in.

    DVC's settings, lock and cache are the workspace's, and what the lock names is checked out: persistent outputs come
    from nowhere else. A clone that a run has left behind is gone on with; where the workspace has another commit now,
    on that one.

    Raises:
        DsdError: this is no git repository or no DVC project; one line.
    """
    head = command(Path(), "git", "rev-parse", "HEAD")
    whole = (target / READY).exists()
    if whole and command(target, "git", "rev-parse", "HEAD") == head:
        return target
    if not whole:
        shutil.rmtree(target, ignore_errors=True)
        command(Path(), "git", "clone", "--quiet", "--shared", "--no-checkout", str(Path().resolve()), str(target))
    command(target, "git", "checkout", "--quiet", "--force", "--detach", head)
    for file in (".dvc/config", ".dvc/config.local", "dvc.lock"):
        if Path(file).exists():
            shutil.copy(file, target / file)
    settings = yaml.safe_load(PARAMS.read_text())
    link(target, settings)
    settings["backbones"][name] = row.model_dump(mode="json")
    write_atomic(target / PARAMS, yaml.safe_dump({**settings, "backbone": name}, sort_keys=False).encode())
    if not whole:
        command(target, "dvc", "cache", "dir", "--local", command(Path(), "dvc", "cache", "dir"))
        command(target, "dvc", "checkout", "--quiet", "--allow-missing")
        (target / READY).touch()
    return target


def link(target: Path, settings: Any) -> None:
    """Whatever the params name that is in this workspace, but not in git, such as the user's own pictures."""
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


def reproduce(target: Path, lock: int) -> None:
    """The whole DAG in a clone, by a process that ends with this one and has its `lock` as long as it lives.

    Raises:
        DsdError: it failed; with the last line that it said. run.log and run.err in the clone have the others.
    """
    own = {"MLFLOW_TRACKING_URI": uri(), "PREFECT_HOME": str(target.resolve() / ".prefect")}
    own |= {"TQDM_DISABLE": "1", "PREFECT_LOGGING_TO_API_ENABLED": "false"}  # or the last line may be theirs
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
        said = last_line((target / ERRORS).read_text(errors="replace"))
        raise DsdError(said or f"python -m flows.reproduce: ended with status {status}")


def command(folder: Path, *words: str) -> str:
    """What a command says in a folder.

    Raises:
        DsdError: it fails; with the last line that it said.
    """
    beside = Path(sys.executable).parent / words[0]
    done = subprocess.run(
        [str(beside) if beside.exists() else words[0], *words[1:]], cwd=folder, capture_output=True, text=True
    )
    if done.returncode:
        raise DsdError(f"{folder.resolve()}: {' '.join(words[:2])}: {last_line(done.stderr)}")
    return done.stdout.strip()


def last_line(text: str) -> str:
    return next((line.strip()[:500] for line in reversed(text.splitlines()) if line.strip()), "")
