"""A tick of `dsd watch`: run the whole DAG for every checkpoint that was not yet evaluated with these params.

All state is in the tracking store. An evaluated checkpoint is a version of the registry with its key; a failed one is a
run of the kind `attempt`.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dsd.config import load
from dsd.data.proxies import check_proxies
from dsd.errors import CheckpointError, DsdError
from flows.registry.attempts import Attempts
from flows.registry.registry import CHAMPION, KEPT_OUT, NOT_COMPARED, PROMOTED, Registry, evaluation_key
from flows.stores import artifacts
from flows.watch.clone import ERRORS, clone, reproduce
from flows.watch.sources import HOME, Checkpoint, checkpoints


@dataclass
class TickReport:
    """The result of a tick in lines, and the number of checkpoints and sources that failed."""

    lines: list[str] = field(default_factory=list)
    failed: int = 0

    def fail(self, line: str) -> None:
        self.lines.append(line)
        self.failed += 1


def tick() -> TickReport:
    """Evaluate and register new checkpoints, and compare them with the champion; do nothing while another tick runs.

    Raises:
        DsdError: params.yaml or a proxy is invalid, or the workspace cannot be cloned.
    """
    check_proxies()  # else it would count as a failed attempt of each checkpoint
    with tick_lock(artifacts() / ".watch") as lock:
        return TickReport(["another tick is running"]) if lock is None else _Tick(lock).run()


@contextmanager
def tick_lock(file: Path) -> Iterator[int | None]:
    """The descriptor of a file with a lock on it, or None while another process holds the lock.

    A child process that inherits the descriptor holds the lock too: a run that outlives its killed tick by some seconds
    keeps the next tick out of its clone.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lock:
        free = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        yield lock.fileno() if free else None


class _Tick:
    def __init__(self, lock: int) -> None:
        self._lock = lock
        self._params, self._registry, self._report = load(), Registry(), TickReport()
        self._attempts = Attempts(self._registry.runs)

    def run(self) -> TickReport:
        self._attempts.settle()
        new = self._new()
        if not self._report.failed:  # a source that cannot be read may have a clone to resume
            self._remove_other_clones(new)
        if self._judge():
            self._write_page()
        for checkpoint in new:
            self._evaluate(checkpoint)
            self._judge()
            self._write_page()
        self._report.lines = self._report.lines or ["nothing new"]
        return self._report

    def _new(self) -> list[Checkpoint]:
        """Checkpoints not evaluated and not given up."""
        versions, failed = self._registry.versions(), self._attempts.failed()
        known = {version.key for version in versions}
        known |= {key for key, runs in failed.items() if len(runs) >= self._params.watch.attempts}
        unreadable: dict[str, str] = {}
        listed = checkpoints(self._params, versions, unreadable)
        for name, reason in unreadable.items():
            self._report.fail(f"watch.sources.{name}: not read: {reason}")
        first = self._champion()
        return sorted((c for c in listed if c.key not in known), key=lambda c: c.row.digest != first)

    def _champion(self) -> str | None:
        """The champion's digest: it is evaluated first, since the others are compared with it."""
        champion = self._registry.alias(CHAMPION)
        return None if champion is None else champion.digest

    def _remove_other_clones(self, new: list[Checkpoint]) -> None:
        """Remove the clones that no attempt will resume."""
        keep = {checkpoint.key for checkpoint in new}
        for path in HOME.glob("*/"):
            if path.name not in keep:
                shutil.rmtree(path)

    def _evaluate(self, checkpoint: Checkpoint) -> None:
        """Run one attempt; a failure is recorded with its reason, and its clone is kept for the next attempt.

        Raises:
            DsdError: the workspace cannot be cloned.
        """
        target = HOME / checkpoint.key
        if not checkpoint.problem:
            clone(target, f"{checkpoint.name}-{checkpoint.key[:8]}", checkpoint.row)
        attempt = self._attempts.start(checkpoint.name, checkpoint.key, checkpoint.row)
        try:
            if checkpoint.problem:
                raise CheckpointError(checkpoint.problem)
            reproduce(target, self._lock)
            version = self._registry.register(load(target / "params.yaml"), target)
        except DsdError as error:
            self._report.fail(f"{checkpoint.name}: failed: {error}")
            self._attempts.fail(attempt, str(error), target / ERRORS)
        except BaseException:
            self._attempts.end(attempt, "KILLED")
            raise
        else:
            self._attempts.end(attempt, "FINISHED")
            shutil.rmtree(target)
            self._report.lines.append(f"{checkpoint.name}: evaluated, version {version.number}")

    def _judge(self) -> bool:
        """Run the gate for each version without a verdict; return whether the registry has changed."""
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
                self._report.lines.append(f"{version.name}: version {version.number} {word}: {reason}")
                changed = True
        return changed

    def _write_page(self) -> None:
        from dsd.report.leaderboard import write  # it imports matplotlib
        from flows.registry.leaderboard import PAGE, board

        write(board(self._params, self._registry), PAGE)
