"""What `dsd watch` does at a tick: every checkpoint that was not yet evaluated with these params is, by the whole DAG.

All state is in the tracking store: what was evaluated is a version of the registry by its key, and what failed is a
run of the kind `attempt`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dsd.config import load
from dsd.errors import CheckpointError, DsdError
from flows.registry.registry import CHAMPION, KEPT_OUT, NOT_COMPARED, PROMOTED, Registry, evaluation_key
from flows.stores import artifacts
from flows.tracking import Runs
from flows.watch.clone import ERRORS, clone, reproduce
from flows.watch.sources import HOME, Checkpoint, checkpoints

if TYPE_CHECKING:
    from mlflow.entities import Run

ATTEMPT = "attempt"
KILLED = "killed in mid-run"


@dataclass
class Told:
    """What came of a tick, in lines, and how many checkpoints and sources failed."""

    lines: list[str] = field(default_factory=list)
    failed: int = 0

    def fail(self, line: str) -> None:
        self.lines.append(line)
        self.failed += 1


def tick() -> Told:
    """Evaluates what is new, enters it and lets it challenge the champion; nothing while another tick is at work.

    Raises:
        DsdError: params.yaml is not what it should be, or no clone of the workspace can be made.
    """
    with alone(artifacts() / ".watch") as lock:
        return Told(["another tick is at work"]) if lock is None else _Tick(lock).run()


@contextmanager
def alone(file: Path) -> Iterator[int | None]:
    """The lock of a file, or None while another process has it; a child that inherits the descriptor has it too.

    So a run that outlives its killed tick by some seconds keeps the next tick out of its clone.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield descriptor if free else None
    finally:
        os.close(descriptor)


class Attempts:
    """The attempts at checkpoints, which are runs of the tracking store.

    One that failed counts, one that was stopped does not. One of this workspace that still runs when no tick does was
    killed, and counts: it may be its checkpoint that takes the machine down each time.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._where = f"{socket.gethostname()}:{Path().resolve()}"
        self._every = runs.every(ATTEMPT)

    def settle(self) -> None:
        """Ends the attempts of killed ticks; only while no other tick is at work."""
        left = [
            run for run in self._every if run.info.status == "RUNNING" and run.data.tags["dsd.where"] == self._where
        ]
        for run in left:
            self.fail(run.info.run_id, KILLED)
        if left:
            self._every = self._runs.every(ATTEMPT)

    def failed(self) -> dict[str, list[Run]]:
        """By key the attempts that failed, the newest first."""
        found: dict[str, list[Run]] = {}
        for run in self._every:
            if run.info.status == "FAILED":
                found.setdefault(run.data.tags["dsd.key"], []).append(run)
        return found

    def start(self, checkpoint: Checkpoint) -> str:
        number = len(self.failed().get(checkpoint.key, ())) + 1
        row = checkpoint.row
        tags = {"source": row.source, "revision": row.revision or "", "digest": row.digest or "", "where": self._where}
        named = {f"dsd.{name}": value for name, value in tags.items()}
        return self._runs.start(f"{checkpoint.name}: attempt {number}", ATTEMPT, checkpoint.key, named)

    def fail(self, run: str, reason: str) -> None:
        self._runs.client.set_tag(run, "dsd.reason", reason)
        self._runs.client.set_terminated(run, "FAILED")


class _Tick:
    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._params, self._registry, self._told = load(), Registry(), Told()
        self._attempts = Attempts(self._registry.runs)

    def run(self) -> Told:
        self._attempts.settle()
        new = self._new()
        self._clear(new)
        changed = self._judge()
        for checkpoint in new:
            self._evaluate(checkpoint)
            self._judge()
            self._draw()
        if changed and not new:
            self._draw()
        self._told.lines = self._told.lines or ["nothing new"]
        return self._told

    def _new(self) -> list[Checkpoint]:
        """What is neither evaluated nor given up."""
        versions, failed = self._registry.versions(), self._attempts.failed()
        known = {version.key for version in versions}
        known |= {key for key, runs in failed.items() if len(runs) >= self._params.watch.attempts}
        unseen: dict[str, str] = {}
        found = checkpoints(self._params, versions, unseen)
        for name, reason in unseen.items():
            self._told.fail(f"watch.sources.{name}: not looked at: {reason}")
        first = self._champion()
        return sorted((c for c in found if c.key not in known), key=lambda c: c.row.digest != first)

    def _champion(self) -> str | None:
        """Its digest: it always comes first, since the others are compared with it."""
        champion = self._registry.alias(CHAMPION)
        return None if champion is None else champion.digest

    def _clear(self, new: list[Checkpoint]) -> None:
        """Removes the clones that nothing goes on with."""
        keep = {checkpoint.key for checkpoint in new}
        for path in HOME.glob("*/"):
            if path.name not in keep:
                shutil.rmtree(path)

    def _evaluate(self, checkpoint: Checkpoint) -> None:
        """One attempt; what fails is recorded with its reason, and its clone is kept for the next.

        Raises:
            DsdError: no clone of the workspace can be made.
        """
        target = HOME / checkpoint.key
        if not checkpoint.problem:
            clone(target, f"{checkpoint.name}-{checkpoint.key[:8]}", checkpoint.row)
        client, attempt = self._registry.client, self._attempts.start(checkpoint)
        try:
            if checkpoint.problem:
                raise CheckpointError(checkpoint.problem)
            reproduce(target, self._lock)
            version = self._registry.register(load(target / "params.yaml"), target)
        except DsdError as error:
            self._told.fail(f"{checkpoint.name}: failed: {error}")
            self._attempts.fail(attempt, str(error))
            if (target / ERRORS).exists():
                client.log_artifact(attempt, str(target / ERRORS))
        except BaseException:
            client.set_terminated(attempt, "KILLED")
            raise
        else:
            client.set_terminated(attempt)
            shutil.rmtree(target)
            self._told.lines.append(f"{checkpoint.name}: evaluated, version {version.number}")

    def _judge(self) -> bool:
        """Lets each version that has no verdict yet challenge the champion; says whether the registry has changed."""
        changed, first = False, self._champion()
        for version in sorted(self._registry.versions(), key=lambda v: (v.digest != first, v.number)):
            if version.verdict not in ("", NOT_COMPARED) or version.key != evaluation_key(self._params, version.digest):
                continue
            try:
                verdict = self._registry.challenge(self._params, version)
                word, reason = PROMOTED if verdict.promoted else KEPT_OUT, verdict.reason
            except DsdError as error:
                word, reason = NOT_COMPARED, str(error)
            if (word, reason) != (version.verdict, version.reason):
                self._told.lines.append(f"{version.name}: version {version.number} {word}: {reason}")
                changed = True
        return changed

    def _draw(self) -> None:
        from flows.registry.leaderboard import draw  # it loads what draws

        draw(self._params, self._registry)
