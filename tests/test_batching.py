"""Continuous batching on synthetic evidence: full batches, each request once, the same rankings in any order."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.data.draws import Draw
from dsd.data.examples import Pair
from dsd.engine.batching import Entry, Filled, run_concurrently
from dsd.schedules.exhaustive import all_draws
from dsd.schedules.hierarchical import hierarchical
from dsd.schedules.race import Race, Schedule
from dsd.schedules.racing import racing
from dsd.schedules.staged import staged
from dsd.scorers.evidence import Request
from tests.test_schedules import simple

DRAWS = [Draw(0.5, number) for number in range(8)]
SCHEDULES = [
    all_draws(8),
    staged((5, 2, 1), (1, 4, 8)),
    hierarchical(4, 2, 2, 3, reading="text", shrinking=False),
    racing(simple(8), 1.5),
]


def value(request: Request) -> float:
    """A function of the request alone."""
    pair, draw = request
    seed = sum(map(ord, pair.image + pair.text)) * 1000 + draw.seed
    return float(np.random.default_rng(seed).normal() + len(pair.text) / 3)


def values(batch: list[Request]) -> list[float]:
    return [value(request) for request in batch]


def entries(count: int, candidates: int, schedule: Schedule, compares: bool = False) -> list[Entry]:
    made = []
    for number in range(count):
        pairs = [Pair(f"i{number}", "t" * (c + 1) + str(number % 3)) for c in range(candidates)]
        made.append(Entry(str(number), Race(candidates, schedule), pairs, DRAWS, compares))
    return made


def alone(entry: Entry) -> list[int]:
    while requests := entry.requests():
        entry.record({request: value(request) for request in requests})
    return [int(candidate) for candidate in entry.race.ranking()]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 30), st.integers(1, 9), st.integers(1, 64), st.sampled_from(range(4)), st.booleans(), st.randoms()
)
def test_rankings_depend_on_neither_batch_nor_order(
    count: int, candidates: int, size: int, which: int, compares: bool, random: object
) -> None:
    expected = {entry.id: alone(entry) for entry in entries(count, candidates, SCHEDULES[which], compares)}
    shuffled = entries(count, candidates, SCHEDULES[which], compares)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    requested: list[Request] = []

    def compute(batch: list[Request]) -> list[float]:
        assert 0 < len(batch) <= size
        requested.extend(batch)
        return [value(request) for request in batch]

    filled = Filled()
    rankings = {
        entry.id: entry.race.ranking().tolist() for entry in run_concurrently(shuffled, compute, size, filled, {})
    }
    assert rankings == expected
    assert len(requested) == len(set(requested)) == filled.rows


def test_batches_are_full_until_the_last_races() -> None:
    filled = Filled()
    done = list(run_concurrently(entries(300, 9, racing(simple(8), 1.0)), values, 96, filled, {}))
    assert len(done) == 300 and filled.share == 1.0
    assert filled.rows == sum(entry.race.evaluations for entry in done)


def test_requests_that_races_share_are_computed_once() -> None:
    twins = [Entry(str(n), Race(2, all_draws(4)), [Pair("i", "a"), Pair("i", "b")], DRAWS, False) for n in range(3)]
    filled = Filled()
    assert len(list(run_concurrently(twins, values, 5, filled, {}))) == 3
    assert filled.rows == 8


def test_nothing_to_run() -> None:
    assert list(run_concurrently([], values, 4, Filled(), {})) == []


def test_stored_values_are_not_computed() -> None:
    stored = {(Pair("i0", "t0"), draw): 1.0 for draw in DRAWS}
    filled = Filled()
    (entry,) = run_concurrently(entries(1, 2, all_draws(8)), values, 4, filled, stored)
    assert filled.rows == 8 and entry.race.evaluations == 16
    entry = next(iter(run_concurrently(entries(1, 1, all_draws(8)), values, 4, filled, stored)))
    assert filled.rows == 8 and not len(entry.race.next_rows())
