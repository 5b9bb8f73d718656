"""Concurrent races: batches are filled from all of them, and stay full while candidates are dropped.

No model is run here: `compute` turns requests into values.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dsd.data.draws import Draw
from dsd.data.examples import Pair
from dsd.schedules.race import Race
from dsd.scorers.evidence import Request, without_text


@dataclass(eq=False)
class Entry:
    """A race over the pairs of one example, with the draws in the order of the schedule.

    compares: whether the value of the unconditional pass is subtracted from each pair's.
    """

    id: str
    race: Race
    pairs: Sequence[Pair]
    draws: Sequence[Draw]
    compares: bool

    def requests(self) -> list[Request]:
        """Return the requests of the next round, none when the race is over."""
        rows = self._rows()
        return rows + (list(dict.fromkeys(map(without_text, rows))) if self.compares else [])

    def record(self, values: Mapping[Request, float]) -> None:
        """Record the values of the requests in the race."""
        rows = self._rows()
        self.race.record([values[row] - (values[without_text(row)] if self.compares else 0.0) for row in rows])

    def _rows(self) -> list[Request]:
        return [(self.pairs[candidate], self.draws[draw]) for candidate, draw in self.race.next_rows()]


@dataclass
class Filled:
    """The utilisation of batches until the last race has begun."""

    rows: int = 0  # computed
    places: int = 0  # in the batches before the last race began
    taken: int = 0  # of these places

    @property
    def share(self) -> float:
        return self.taken / self.places if self.places else 1.0


def run_concurrently(
    entries: Iterable[Entry],
    compute: Callable[[list[Request]], ArrayLike],
    size: int,
    filled: Filled,
    stored: dict[Request, float],
) -> Iterator[Entry]:
    """Run all races in batches of `size` requests; yield each entry when its race is over.

    Values in `stored` are not computed, and a request of several open races is computed once. The order of the entries
    and `size` determine which requests share a batch, but not the values and results of a race.
    """
    queue: dict[Request, None] = {}  # requests to compute, oldest first
    computed: dict[Request, float] = {}
    known = ChainMap(computed, stored)
    users: dict[Request, int] = {}  # number of open rounds that need a request
    open_rounds: dict[Entry, list[Request]] = {}
    coming, more = iter(entries), True

    def begin(entry: Entry) -> bool:
        """Queue the next round of an entry; return False if its race is over."""
        requests = entry.requests()
        for request in requests:
            users[request] = users.get(request, 0) + 1
            if request not in known:
                queue[request] = None
        if requests:
            open_rounds[entry] = requests
        return bool(requests)

    while more or open_rounds:
        while more and len(queue) < size:
            entry = next(coming, None)
            more = entry is not None
            if entry is not None and not begin(entry):
                yield entry
        batch = list(queue)[:size]
        if batch:
            computed |= zip(batch, np.asarray(compute(batch), dtype=np.float64).tolist(), strict=True)
            for request in batch:
                del queue[request]
            filled.rows += len(batch)
            if more:
                filled.places, filled.taken = filled.places + size, filled.taken + len(batch)
        for entry, requests in list(open_rounds.items()):
            if all(request in known for request in requests):
                entry.record(known)
                del open_rounds[entry]
                unfinished = begin(entry)
                for request in requests:
                    users[request] -= 1
                    if not users[request]:
                        del users[request]
                        computed.pop(request, None)
                if not unfinished:
                    yield entry
