"""A race: the candidates of one example under a schedule. Pure NumPy; no model runs here.

All candidates are compared at the same draws, in rounds. After each round the schedule decides which candidates are
kept. Higher evidence is better.

Shapes: C candidates, k draws so far; J columns: the proposer's scores, if there are any, and the draws so far; R rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def all_rows(candidates: int, draws: int) -> NDArray[np.int64]:
    """Every candidate at every draw: rows (candidate, draw) [candidates × draws, 2], by candidate."""
    return np.indices((candidates, draws)).reshape(2, -1).T


@dataclass(frozen=True)
class RoundState:
    """Evidence at the end of a round.

    values_CJ: the evidence, NaN where it was not computed; the first column is the proposer's, if there is one.
    kept_C: the candidates that were in the race during the round.
    draws: how many draws were requested so far.
    proposed: whether there is a proposer's column.
    """

    values_CJ: Floats
    kept_C: Mask
    draws: int
    proposed: bool

    @property
    def draws_Ck(self) -> Floats:
        return self.values_CJ[:, int(self.proposed) :]

    @property
    def lost(self) -> int:
        """How many draws were lost to values that are not finite."""
        return self.draws - self.draws_Ck.shape[1]


def mean(state: RoundState) -> Floats:
    """[C] mean evidence of the kept candidates, the proposer's scores before the first draw; −∞ for all others."""
    columns_Ck = state.draws_Ck if state.draws_Ck.shape[1] else state.values_CJ
    return np.where(state.kept_C, columns_Ck.mean(1), -np.inf)


def best(scores_C: Floats, kept_C: Mask, number: int) -> Mask:
    """The kept candidates among the `number` highest scores, ties go to the first."""
    chosen_C = np.zeros_like(kept_C)
    chosen_C[np.argsort(-scores_C, kind="stable")[: max(1, number)]] = True
    return chosen_C & kept_C


@dataclass(frozen=True)
class Schedule:
    """Rounds of draws, and which candidates are kept after each.

    ends: how many draws each kept candidate has after each round, rising; first 0 if the proposer's scores are a round.
    keep: the candidates [C] to keep after a round.
    estimate: the scores [C] that candidates are ranked by, at any time.
    """

    ends: tuple[int, ...]
    keep: Callable[[RoundState], Mask]
    estimate: Callable[[RoundState], Floats] = mean

    def __post_init__(self) -> None:
        if not self.ends or self.ends[0] < 0 or any(b <= a for a, b in pairwise(self.ends)):
            raise ValueError(f"the draws after each round must rise, not {self.ends}")


@dataclass
class Race:
    """One example under a schedule: which rows to compute next, and the ranking at any time.

    A draw where the evidence of a kept candidate is not finite is left out for all candidates, and counted in
    `lost_draws`.
    """

    candidates: int
    schedule: Schedule
    proposal: ArrayLike | None = None  # [C] the proposer's score of each candidate
    budget: int | None = None  # in (candidate, draw) rows; None is no limit
    evaluations: int = 0
    lost_draws: int = 0
    _values: Floats = field(init=False)  # [C, J], see RoundState.values_CJ
    _round: int = 0
    _requested: int = 0  # draws
    _kept: Mask = field(init=False)
    _last_round: NDArray[np.int64] = field(init=False)  # [C] the round after which a candidate was dropped
    _scores: Floats = field(init=False)  # [C] of a dropped candidate, its last

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError("a race needs a candidate")
        if self.budget is not None and self.budget < self.candidates:
            raise ValueError(
                f"a budget of {self.budget} is less than one draw for each of {self.candidates} candidates"
            )
        self._kept = np.ones(self.candidates, dtype=bool)
        self._last_round = np.full(self.candidates, len(self.schedule.ends))
        self._scores = np.zeros(self.candidates)
        self._values = np.empty((self.candidates, 0))
        if self.proposal is not None:
            self._values = np.array(self.proposal, dtype=np.float64)[:, None]
        if self.schedule.ends[0] == 0:
            if self.proposal is None:
                raise ValueError("the schedule starts with a proposal, and there is none")
            self._update_ranking()

    @property
    def scores(self) -> Floats:
        """[C] the score of each candidate, of a dropped one its last."""
        return self._scores

    @property
    def kept(self) -> Mask:
        """[C] the candidates that are in the race."""
        return self._kept

    def next_rows(self) -> NDArray[np.int64]:
        """Rows (candidate, draw) [R, 2] of the next round; none when the race is over."""
        kept = np.flatnonzero(self._kept)
        over = self._round == len(self.schedule.ends) or (len(kept) == 1 and self._round > 0)
        count = 0 if over else self.schedule.ends[self._round] - self._requested
        if self.budget is not None:
            count = min(count, (self.budget - self.evaluations) // len(kept))
        rows = all_rows(len(kept), count)
        return np.stack([kept[rows[:, 0]], rows[:, 1] + self._requested], 1)

    def record(self, values: ArrayLike) -> None:
        """Record the evidence [R] of `next_rows`, and end the round where its draws are complete."""
        kept = np.flatnonzero(self._kept)
        columns = np.asarray(values, dtype=np.float64).reshape(len(kept), -1)
        finite = np.isfinite(columns).all(0)
        self.lost_draws += int((~finite).sum())
        draws_Ck = np.full((self.candidates, int(finite.sum())), np.nan)
        draws_Ck[kept] = columns[:, finite]
        self._values = np.concatenate([self._values, draws_Ck], 1)
        self.evaluations += columns.size
        self._requested += columns.shape[1]
        self._update_ranking()

    def _update_ranking(self) -> None:
        over = self._requested == self.schedule.ends[self._round]
        if self._values.size:
            state = RoundState(self._values, self._kept, self._requested, self.proposal is not None)
            self._scores = np.where(self._kept, self.schedule.estimate(state), self._scores)
            if over:
                kept = self.schedule.keep(state)
                self._last_round[self._kept & ~kept] = self._round
                self._kept = kept
        self._round += over

    def ranking(self) -> NDArray[np.int64]:
        """[C] candidates, best first: by the last round that each was in, then by score."""
        return np.lexsort((-self._scores, -self._last_round))
