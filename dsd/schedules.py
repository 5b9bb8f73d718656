"""Schedules: which (candidate, draw) is worth asking for next. Pure NumPy; no model is run here.

A race is one example: its candidates are seen at the same draws, in rounds, and after each round the schedule says
which are kept. Evidence is higher for a better candidate.

Shapes: C candidates, K draws in all, k draws seen; n races.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Keep = Callable[[Floats, Mask], Mask]


def exhaustive(pairs: int, draws: int) -> NDArray[np.int64]:
    """Every pair at every draw: rows (pair index, draw index) [pairs × draws, 2], a pair's draws together."""
    return np.stack(np.meshgrid(np.arange(pairs), np.arange(draws), indexing="ij"), -1).reshape(-1, 2)


@dataclass(frozen=True)
class Schedule:
    """Rounds of draws, and who is kept after each.

    ends: how many draws a kept candidate has been seen at after each round, rising.
    keep: (evidence [C, k], kept so far [C]) to kept from now on [C]; what was dropped before is NaN in its later draws.
    """

    ends: tuple[int, ...]
    keep: Keep

    def __post_init__(self) -> None:
        if not self.ends or any(b <= a for a, b in pairwise((0, *self.ends))):
            raise ValueError(f"the draws after each round must rise from 1 on, not {self.ends}")


def all_draws(draws: int) -> Schedule:
    """Every candidate at every draw."""
    return Schedule((draws,), lambda values_Ck, kept_C: kept_C)


def staged(to_keep: Sequence[int], n_samples: Sequence[int]) -> Schedule:
    """After n_samples[i] draws the best to_keep[i] are kept (Li et al. 2023, “Your Diffusion Model is Secretly a
    Zero-Shot Classifier”, its published commands).

    Raises:
        ValueError: lists of two lengths, draws that do not rise, or more kept than before.
    """
    if len(to_keep) != len(n_samples) or any(b > a for a, b in pairwise(to_keep)):
        raise ValueError(f"to_keep {list(to_keep)} must fall and be as long as n_samples {list(n_samples)}")

    def keep(values_Ck: Floats, kept_C: Mask) -> Mask:
        stage = bisect_left(n_samples, values_Ck.shape[1])  # a draw less than asked for, where one was left out
        return best(values_Ck, kept_C, to_keep[stage])

    return Schedule(tuple(n_samples), keep)


def hierarchical(timesteps: int, samples: int, beam_factor: float, patience: int) -> Schedule:
    """Algorithm 1 of the second paper: `samples` draws at each timestep, after which the best 1 / beam_factor of the
    classes are kept; it ends when one class has led for `patience` further draws.

    The direction is that of the draws: from clean, from noisy or from the middle.
    """
    if beam_factor < 1 or patience < 1:
        raise ValueError(f"beam_factor {beam_factor} and patience {patience} must be at least 1")

    def keep(values_Ck: Floats, kept_C: Mask) -> Mask:
        kept_C = best(values_Ck, kept_C, math.ceil(kept_C.sum() / beam_factor))
        running_Ck = np.where(kept_C[:, None], values_Ck, -np.inf).cumsum(1)
        leaders_k = running_Ck.argmax(0)
        changes = np.flatnonzero(np.diff(leaders_k))
        led = len(leaders_k) - 1 - (int(changes[-1]) + 1 if len(changes) else 0)
        return np.arange(len(kept_C)) == leaders_k[-1] if led >= patience else kept_C

    return Schedule(tuple(samples * (number + 1) for number in range(timesteps)), keep)


def racing(draws: int, threshold: float, first: int = 1) -> Schedule:
    """Drops a candidate once it lies further behind the leader than chance at the draws to come can make good.

    With k of K draws seen, the mean that all K will give lies about the mean so far with a deviation in proportion to
    √(1/k − 1/K): it is zero at the end, where the leader is the winner. The unit is the race's own: the deviation
    between its candidates at the first round. `calibrate` finds the threshold that keeps an error rate.
    """
    ends = tuple(range(first, draws + 1))

    def keep(values_Ck: Floats, kept_C: Mask) -> Mask:
        behind_C = standardised(values_Ck, kept_C, draws, first)
        return kept_C & (behind_C <= threshold)

    return Schedule(ends, keep)


def standardised(values_Ck: Floats, kept_C: Mask, draws: int, first: int) -> Floats:
    """[C] how far each candidate's mean lies behind the leader's, in units of what the remaining draws may change.

    Where nothing remains, those behind are infinitely far.
    """
    means_C = np.where(kept_C, values_Ck.mean(1), -np.inf)
    behind_C = means_C.max() - means_C
    seen = values_Ck.shape[1]
    unit = float(values_Ck[:, :first].mean(1).std()) * math.sqrt(max(0.0, 1 / seen - 1 / draws))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(behind_C == 0, 0.0, behind_C / unit)


def calibrate(races: Sequence[ArrayLike], delta: float, first: int = 1) -> float:
    """The threshold under which `racing` picks another winner than all draws would in at most a share delta of races.

    Args:
        races: evidence [C, K] of example races at all draws, exchangeable with those to come.
        delta: the error rate, in (0, 1).

    Split conformal prediction (Vovk et al. 2005): the winner of a race is kept throughout where the threshold is at
    least the largest standardised distance that it ever lies behind. The ⌈(n + 1)(1 − δ)⌉-th smallest of these over n
    races is exceeded by a further race with probability δ at most, whatever the evidence is distributed like. Distances
    are taken from the leader of all candidates, which is never behind that of those still kept.

    Raises:
        ValueError: delta outside (0, 1), or too few races to promise it: at least 1/δ − 1 are needed.
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta}")
    worst = sorted(_worst(np.asarray(race, dtype=np.float64), first) for race in races)
    place = math.ceil((len(worst) + 1) * (1 - delta))
    if place > len(worst):
        raise ValueError(f"{len(worst)} races cannot promise an error rate of {delta}; {math.ceil(1 / delta) - 1} can")
    return worst[place - 1]


def _worst(values_CK: Floats, first: int) -> float:
    C, K = values_CK.shape
    winner = int(values_CK.mean(1).argmax())
    everyone = np.ones(C, dtype=bool)
    return max(
        (float(standardised(values_CK[:, :k], everyone, K, first)[winner]) for k in range(first, K)), default=0.0
    )


def best(values_Ck: Floats, kept_C: Mask, number: int) -> Mask:
    """The kept candidates with the highest means, at most so many; of equal ones the first."""
    means_C = np.where(kept_C, values_Ck.mean(1), -np.inf)
    chosen_C = np.zeros_like(kept_C)
    chosen_C[np.argsort(-means_C, kind="stable")[: max(1, number)]] = True
    return chosen_C & kept_C


@dataclass
class Race:
    """One example under a schedule: what it asks for, and its answer at any time.

    A draw at which any kept candidate's evidence is not finite is left out for all of them, and counted in `dropped`.
    """

    candidates: int
    schedule: Schedule
    budget: int | None = None  # of (candidate, draw) rows; None is no limit
    evaluations: int = 0
    dropped: int = 0
    _values: list[Floats] = field(default_factory=list)  # [C] a draw, NaN for who was not asked
    _round: int = 0
    _asked: int = 0  # draws that were asked for
    _kept: Mask = field(init=False)
    _until: NDArray[np.int64] = field(init=False)  # [C] the round after which each was dropped

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError("a race needs a candidate")
        if self.budget is not None and self.budget < self.candidates:
            raise ValueError(
                f"a budget of {self.budget} is less than one draw for each of {self.candidates} candidates"
            )
        self._kept = np.ones(self.candidates, dtype=bool)
        self._until = np.full(self.candidates, len(self.schedule.ends))

    @property
    def done(self) -> bool:
        return len(self.asks()) == 0

    def asks(self) -> NDArray[np.int64]:
        """Rows (candidate, draw) [R, 2] of the next round, none when the race is over."""
        kept = np.flatnonzero(self._kept)
        over = self._round == len(self.schedule.ends) or (len(kept) == 1 and self._round > 0)
        count = 0 if over else self.schedule.ends[self._round] - self._asked
        if self.budget is not None:
            count = min(count, (self.budget - self.evaluations) // len(kept))
        rows = exhaustive(len(kept), count)
        return np.stack([kept[rows[:, 0]], rows[:, 1] + self._asked], 1)

    def tell(self, values: ArrayLike) -> None:
        """The evidence [R] of the rows last asked for."""
        kept = np.flatnonzero(self._kept)
        told = np.asarray(values, dtype=np.float64).reshape(len(kept), -1)
        for column in told.T:
            if np.isfinite(column).all():
                draw_C = np.full(self.candidates, np.nan)
                draw_C[kept] = column
                self._values.append(draw_C)
            else:
                self.dropped += 1
        self.evaluations += told.size
        self._asked += told.shape[1]
        whole = self._asked == self.schedule.ends[self._round]
        if whole and self._values:
            after = self.schedule.keep(np.stack(self._values, 1), self._kept.copy())
            self._until[self._kept & ~after] = self._round
            self._kept = after
        self._round += whole

    def ranking(self) -> NDArray[np.int64]:
        """[C] candidates, best first: who was kept longer, then who has the higher mean over the draws both saw."""
        if not self._values:
            return np.arange(self.candidates)
        means_C = np.nanmean(np.stack(self._values, 1), 1)
        return np.lexsort((-means_C, -self._until))
