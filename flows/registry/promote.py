"""`dsd promote`: a workspace's results into the registry, before the gate, and onto the leaderboard."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dsd.config import Params
from flows.registry.leaderboard import PAGE, draw
from flows.registry.registry import Registry, Version

if TYPE_CHECKING:
    from dsd.evaluation.gate import Verdict


class Promotion(NamedTuple):
    """What was entered, what the gate said of it, and the leaderboard with both."""

    version: Version
    verdict: Verdict
    page: Path


def promote(params: Params, page: Path = PAGE) -> Promotion:
    """Enters the results of this workspace as the challenger, and lets it challenge the champion.

    Raises:
        DsdError: nothing was measured here, or it cannot be compared; see `Registry.register`, `gate.judge`.
    """
    registry = Registry()
    version = registry.register(params, Path())
    try:
        verdict = registry.challenge(params, version)
    finally:  # who cannot be compared is shown with the reason
        draw(params, registry, page)
    return Promotion(version, verdict, page)
