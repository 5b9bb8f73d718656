"""Races side by side: batches are filled with what all of them still want, and stay full while candidates drop out.

No model is run here: `compute` is whatever turns requests into values.
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
from dsd.scorers.evidence import UNCONDITIONAL, Request


@dataclass(eq=False)
class Entry:
    """A race over the pairs of one example at draws in the order in which the schedule counts them.

    `normalised`: a pair's value is set off against that of its image without a text.
    """

    id: str
    race: Race
    pairs: Sequence[Pair]
    draws: Sequence[Draw]
    normalised: bool

    def wants(self) -> list[Request]:
        """The requests of the next round, none when the race is over."""
        asked = self._rows()
        return asked + (list(dict.fromkeys(map(without_text, asked))) if self.normalised else [])

    def tell(self, known: Mapping[Request, float]) -> None:
        """The values of what it wants."""
        rows = self._rows()
        self.race.record([known[row] - (known[without_text(row)] if self.normalised else 0.0) for row in rows])

    def _rows(self) -> list[Request]:
        return [(self.pairs[candidate], self.draws[draw]) for candidate, draw in self.race.next_rows()]


def without_text(request: Request) -> Request:
    """The unconditional pass of the same picture at the same draw."""
    pair, draw = request
    return Pair(pair.image, UNCONDITIONAL), draw


@dataclass
class Filled:
    """How full the batches were, until nothing was left to begin."""

    rows: int = 0  # that were computed
    places: int = 0  # in the batches before the last race had begun
    taken: int = 0  # of these places

    @property
    def share(self) -> float:
        return self.taken / self.places if self.places else 1.0


def side_by_side(
    entries: Iterable[Entry],
    compute: Callable[[list[Request]], ArrayLike],
    size: int,
    filled: Filled,
    stored: dict[Request, float],
) -> Iterator[Entry]:
    """Runs all races to their ends, in batches of `size` requests; yields each entry when its race is over.

    What is `stored` is not computed, and a request that several open races have in common is computed once. Which
    requests share a batch depends on the order of the entries and on `size`; what a race is told does not, so neither
    does its answer.
    """
    queue: dict[Request, None] = {}  # to be computed, oldest first
    computed: dict[Request, float] = {}
    known = ChainMap(computed, stored)
    users: dict[Request, int] = {}  # how many rounds under way have asked for it
    under_way: dict[Entry, list[Request]] = {}
    coming, more = iter(entries), True

    def ask(entry: Entry) -> bool:
        wanted = entry.wants()
        for request in wanted:
            users[request] = users.get(request, 0) + 1
            if request not in known:
                queue[request] = None
        if wanted:
            under_way[entry] = wanted
        return bool(wanted)

    while more or under_way:
        while more and len(queue) < size:
            entry = next(coming, None)
            more = entry is not None
            if entry is not None and not ask(entry):
                yield entry
        batch = list(queue)[:size]
        if batch:
            computed |= zip(batch, np.asarray(compute(batch), dtype=np.float64).tolist(), strict=True)
            for request in batch:
                del queue[request]
            filled.rows += len(batch)
            if more:
                filled.places, filled.taken = filled.places + size, filled.taken + len(batch)
        for entry, wanted in list(under_way.items()):
            if all(request in known for request in wanted):
                entry.tell(known)
                del under_way[entry]
                again = ask(entry)
                for request in wanted:
                    users[request] -= 1
                    if not users[request]:
                        del users[request]
                        computed.pop(request, None)
                if not again:
                    yield entry
