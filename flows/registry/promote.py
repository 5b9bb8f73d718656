"""`dsd promote`: register a workspace's results, run the gate, and update the leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dsd.config import Params
from dsd.report.leaderboard import write
from flows.registry.leaderboard import PAGE, board
from flows.registry.registry import Registry, Version

if TYPE_CHECKING:
    from dsd.evaluation.gate import Verdict


def register_and_judge(params: Params, page: Path = PAGE) -> tuple[Version, Verdict]:
    """Register the results of this workspace as the challenger, and compare it with the champion.

    Raises:
        DsdError: there are no results, or they cannot be compared; see `Registry.register` and `gate.judge`.
    """
    registry = Registry()
    version = registry.register(params, Path())
    try:
        verdict = registry.challenge(params, version)
    finally:  # the page also shows why a version cannot be compared
        write(board(params, registry), page)
    return version, verdict
