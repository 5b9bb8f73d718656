"""The content of the leaderboard, read from the tracking store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from mlflow.entities import Run

from dsd.config import Params
from dsd.datasets import benchmark
from dsd.report.leaderboard import Board, Entry, Failure
from dsd.statistics import Difference, Interval
from flows import DATA
from flows.registry.attempts import Attempts
from flows.registry.registry import CHAMPION, Registry, Version, evaluation_key

PAGE = DATA / "leaderboard" / "index.html"


def board(params: Params, registry: Registry | None) -> Board:
    """All measured checkpoints by the gate's method, and those that failed and were not measured since.

    registry: None where there is no tracking store.
    """
    metrics = {name: benchmark(row.kind).headline for name, row in params.datasets.items()}
    if registry is None:
        return Board(params.gate.method, metrics, params.evaluate.confidence, [], [])
    versions, champion = registry.versions(), registry.alias(CHAMPION)
    entries = [
        _entry(
            version,
            params.gate.method,
            metrics,
            champion=champion is not None and version.number == champion.number,
            now=version.key == evaluation_key(params, version.digest),
        )
        for version in versions
    ]
    failures = _failures(Attempts(registry.runs).failed().values(), versions, params.watch.attempts)
    return Board(params.gate.method, metrics, params.evaluate.confidence, entries, failures)


def _entry(version: Version, method: str, metrics: Mapping[str, str], *, champion: bool, now: bool) -> Entry:
    results = {name: methods.get(method, {}) for name, methods in version.metrics.items()}
    return Entry(
        number=version.number,
        name=version.name,
        source=version.source,
        digest=version.digest,
        commit=version.commit,
        when=version.created,
        champion=champion,
        now=now,
        scores={name: Interval(**results[name][m]) for name, m in metrics.items() if m in results.get(name, {})},
        differences={
            name: Difference(**{**row["difference"], "p": row["p"]}) for name, row in version.compared.items()
        },
        against=version.against,
        verdict=version.verdict,
        reason=version.reason,
    )


def _failures(failed: Iterable[list[Run]], versions: list[Version], allowed: int) -> list[Failure]:
    """A failure per checkpoint, given up after the allowed number of attempts."""
    measured = {version.digest: version.created for version in reversed(versions)}
    failures = []
    for attempts in failed:
        last = attempts[0]
        tags = last.data.tags
        when = datetime.fromtimestamp(last.info.start_time / 1000, UTC)
        if measured.get(tags["dsd.digest"], when) <= when:
            source, number = tags["dsd.source"], len(attempts)
            failures.append(Failure(Path(source).name, source, tags["dsd.reason"], number, number >= allowed, when))
    return failures
