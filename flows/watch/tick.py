"""A tick of `dsd watch`: run the whole DAG for every checkpoint that was not yet evaluated with these params.

All state is in the tracking store. An evaluated checkpoint is a version of the registry with its key; a failed one is a
run of the kind `attempt`.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from dsd.config import load
from dsd.data.proxies import check_proxies
from dsd.errors import CheckpointError, DsdError
from flows.registry.attempts import Attempts
from flows.registry.registry import CHAMPION, KEPT_OUT, NOT_COMPARED, PROMOTED, Registry, evaluation_key
from flows.stores import artifacts
from flows.watch.clone import ERRORS, clone, reproduce
from flows.watch.sources import HOME, Checkpoint, checkpoints, own_backbone


@dataclass
class TickReport:
    """The result of a tick in lines, and the number of checkpoints and sources that failed."""

    lines: list[str] = field(default_factory=list)
    failed: int = 0

    def fail(self, line: str) -> None:
        self.lines.append(line)
        self.failed += 1


Work = Callable[[], str]  # the evaluation of a checkpoint; returns why it has failed, or ""


def here(name: str, work: Work) -> None:
    """Run the evaluation of the checkpoint of this name in this process."""
    work()


def tick(run: Callable[[str, Work], None] = here) -> TickReport:
    """Evaluate and register new checkpoints, and compare them with the champion; do nothing while another tick runs.

    `run` gets the name and the evaluation of each checkpoint.

    Raises:
        DsdError: params.yaml or a proxy is invalid, or the workspace cannot be cloned.
    """
    check_proxies()  # else it would count as a failed attempt of each checkpoint
    with tick_lock(artifacts() / ".watch") as lock:
        return TickReport(["another tick is running"]) if lock is None else _Tick(lock).run(run)


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

    def run(self, run: Callable[[str, Work], None]) -> TickReport:
        self._attempts.settle()
        new = self._new()
        if not self._report.failed:  # a source that cannot be read may have a clone to resume
            self._remove_other_clones(new)
        if self._judge():
            self._write_page()
        for checkpoint in new:
            run(checkpoint.name, partial(self._evaluate, checkpoint))
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
        if self._registry.alias(CHAMPION) is None and (own := self._own) is not None:
            listed = [own, *(checkpoint for checkpoint in listed if checkpoint.key != own.key)]
        for name, reason in unreadable.items():
            self._report.fail(f"watch.sources.{name}: not read: {reason}")
        first = self._first()
        return sorted((c for c in listed if c.key not in known), key=lambda c: c.row.digest != first)

    @cached_property
    def _own(self) -> Checkpoint | None:
        """The backbone of the workspace; None, with a line in the report, if it is not available."""
        try:
            return own_backbone(self._params)
        except CheckpointError as error:
            self._report.fail(f"{self._params.backbone}: not evaluated: {error}")
            return None

    def _first(self) -> str:
        """The digest of the checkpoint that is evaluated first, since the others are compared with it.

        That is the champion, and before there is one the workspace's own backbone.
        """
        champion = self._registry.alias(CHAMPION)
        if champion is not None:
            return champion.digest
        return (self._own.row.digest or "") if self._own else ""

    def _remove_other_clones(self, new: list[Checkpoint]) -> None:
        """Remove the clones that no attempt will resume."""
        keep = {checkpoint.key for checkpoint in new}
        for path in HOME.glob("*/"):
            if path.name not in keep:
                shutil.rmtree(path)

    def _evaluate(self, checkpoint: Checkpoint) -> str:
        """Run one attempt; a failure is recorded with its reason, and its clone is kept for the next attempt.

        Returns the reason, or "".

        Raises:
            DsdError: the workspace cannot be cloned.
        """
        target = HOME / checkpoint.key
        if not checkpoint.problem:
            self._clone(target, checkpoint)
        attempt = self._attempts.start(checkpoint.name, checkpoint.key, checkpoint.row)
        try:
            if checkpoint.problem:
                raise CheckpointError(checkpoint.problem)
            reproduce(target, self._lock, attempt)
            version = self._registry.register(load(target / "params.yaml"), target)
        except DsdError as error:
            self._report.fail(f"{checkpoint.name}: failed: {error}")
            self._attempts.fail(attempt, str(error), target / ERRORS)
            return str(error)
        except BaseException:
            self._attempts.end(attempt, "KILLED")
            raise
        else:
            self._attempts.end(attempt, "FINISHED")
            shutil.rmtree(target)
            self._report.lines.append(f"{checkpoint.name}: evaluated, version {version.number}")
            return ""

    def _clone(self, target: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.own:  # with the row of the workspace, all that is up to date there is restored
            clone(target, self._params.backbone, self._params.backbones[self._params.backbone])
        else:
            clone(target, f"{checkpoint.name}-{checkpoint.key[:8]}", checkpoint.row)

    def _judge(self) -> bool:
        """Run the gate for each version without a verdict; return whether the registry has changed."""
        changed, first = False, self._first()
        for version in sorted(self._registry.versions(), key=lambda v: (v.digest != first, v.number)):
            if version.verdict not in ("", NOT_COMPARED) or version.key != evaluation_key(self._params, version.digest):
                continue
            try:
                verdict = self._registry.challenge(self._params, version, first)
                word, reason = PROMOTED if verdict.promoted else KEPT_OUT, verdict.reason
            except DsdError as error:
                word, reason = NOT_COMPARED, str(error)
            if (word, reason) != (version.verdict, version.reason):
                self._report.lines.append(f"{version.name}: version {version.number} {word}: {reason}")
                changed = True
        return changed

    def _write_page(self) -> None:
        from dsd.report.leaderboard import write  # it imports altair
        from flows.registry.leaderboard import PAGE, board

        write(board(self._params, self._registry), PAGE)
