"""Attempts to evaluate checkpoints, recorded as runs of the kind `attempt` in the tracking store."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

from dsd.config import BackboneParams
from flows.tracking import Runs

if TYPE_CHECKING:
    from mlflow.entities import Run

ATTEMPT = "attempt"
KILLED = "killed in mid-run"


class Attempts:
    """The attempts of all workspaces.

    A failed attempt counts, a stopped one does not. An attempt of this workspace that is still marked as running while
    no tick runs was killed. It counts as failed: its checkpoint may be what brings the machine down.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._workspace = f"{socket.gethostname()}:{Path().resolve()}"
        self._all = runs.find(ATTEMPT)

    def settle(self) -> None:
        """Mark the attempts of killed ticks as failed; call this only while no other tick runs."""
        running = [run for run in self._all if run.info.status == "RUNNING"]
        killed = [run for run in running if run.data.tags["dsd.where"] == self._workspace]
        for run in killed:
            self.fail(run.info.run_id, KILLED)
        if killed:
            self._all = self._runs.find(ATTEMPT)

    def failed(self) -> dict[str, list[Run]]:
        """The failed attempts by evaluation key, the newest first."""
        by_key: dict[str, list[Run]] = {}
        for run in self._all:
            if run.info.status == "FAILED":
                by_key.setdefault(run.data.tags["dsd.key"], []).append(run)
        return by_key

    def start(self, name: str, key: str, row: BackboneParams) -> str:
        """Record the start of an attempt; return the id of its run."""
        number = len(self.failed().get(key, ())) + 1
        tags = {
            "dsd.source": row.source,
            "dsd.revision": row.revision or "",
            "dsd.digest": row.digest or "",
            "dsd.where": self._workspace,
        }
        return self._runs.start(f"{name}: attempt {number}", ATTEMPT, key, tags)

    def end(self, run: str, status: str) -> None:
        self._runs.client.set_terminated(run, status)

    def fail(self, run: str, reason: str, log: Path | None = None) -> None:
        """Record a failure with its reason, and the log if the file exists."""
        self._runs.client.set_tag(run, "dsd.reason", reason)
        self.end(run, "FAILED")
        if log is not None and log.exists():
            self._runs.client.log_artifact(run, str(log))
