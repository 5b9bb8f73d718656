"""What the leaderboard shows, from the tracking store."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from dsd.config import Params
from dsd.datasets import benchmark
from dsd.metrics import HEADLINES
from dsd.report.leaderboard import Board, Entry, Failure, write
from dsd.statistics import Difference, Interval
from flows import DATA
from flows.registry.registry import CHAMPION, Registry, Version, evaluation_key
from flows.watch.tick import Attempts

PAGE = DATA / "leaderboard" / "index.html"


def draw(params: Params, registry: Registry, target: Path = PAGE) -> Path:
    """Writes the page and returns its path."""
    return write(board(params, registry), target)


def board(params: Params, registry: Registry) -> Board:
    """All measured checkpoints by the gate's method, and those that failed and were not measured since."""
    metrics = {name: HEADLINES[benchmark(row.kind).metrics] for name, row in params.datasets.items()}
    versions, champion = registry.versions(), registry.alias(CHAMPION)
    first = champion and champion.number
    entries = [_entry(params, version, metrics, champion=version.number == first) for version in versions]
    return Board(
        params.gate.method, metrics, params.evaluate.confidence, entries, _failures(params, registry, versions)
    )


def _entry(params: Params, version: Version, metrics: dict[str, str], *, champion: bool) -> Entry:
    found = {name: methods.get(params.gate.method, {}) for name, methods in version.metrics.items()}
    return Entry(
        number=version.number,
        name=version.name,
        source=version.source,
        digest=version.digest,
        commit=version.commit,
        when=version.created,
        champion=champion,
        now=version.key == evaluation_key(params, version.digest),
        scores={name: Interval(**found[name][m]) for name, m in metrics.items() if m in found.get(name, {})},
        differences={
            name: Difference(**{**row["difference"], "p": row["p"]}) for name, row in version.compared.items()
        },
        against=version.against,
        verdict=version.verdict,
        reason=version.reason,
    )


def _failures(params: Params, registry: Registry, versions: list[Version]) -> list[Failure]:
    measured = {version.digest: version.created for version in reversed(versions)}
    found = []
    for runs in Attempts(registry.runs).failed().values():
        last, attempts = runs[0], len(runs)
        tags = last.data.tags
        when = datetime.fromtimestamp(last.info.start_time / 1000, UTC)
        if measured.get(tags["dsd.digest"], when) <= when:
            source, reason = tags["dsd.source"], tags["dsd.reason"]
            given_up = attempts >= params.watch.attempts
            found.append(Failure(Path(source).name, source, reason, attempts, given_up, when))
    return found
