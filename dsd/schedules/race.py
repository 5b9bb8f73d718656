"""Schedules: which (candidate, draw) is worth asking for next. Pure NumPy; no model is run here.

A race is one example: its candidates are seen at the same draws, in rounds, and after each round the schedule says
which are kept. Evidence is higher for a better candidate.

Shapes: C candidates, K draws in all, k draws seen; J columns: that of a proposer, if there is one, and the draws seen;
D differences between a winner and a rival.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


def exhaustive(pairs: int, draws: int) -> NDArray[np.int64]:
    """Every pair at every draw: rows (pair index, draw index) [pairs × draws, 2], a pair's draws together."""
    return np.stack(np.meshgrid(np.arange(pairs), np.arange(draws), indexing="ij"), -1).reshape(-1, 2)


@dataclass(frozen=True)
class Seen:
    """What a race has seen when a round is over.

    values_CJ: the evidence, NaN where a candidate was not asked; the first column is the proposer's, if there is one.
    kept_C: who was in the race during the round.
    draws: how many draws were asked for; more than there are columns where one was lost.
    proposed: whether there is a proposer's column.
    """

    values_CJ: Floats
    kept_C: Mask
    draws: int
    proposed: bool

    @property
    def drawn_Ck(self) -> Floats:
        return self.values_CJ[:, int(self.proposed) :]

    @property
    def lost(self) -> bool:
        return self.drawn_Ck.shape[1] < self.draws


def mean(seen: Seen) -> Floats:
    """[C] the mean over the draws of those who are kept, and the proposer's word before the first; −∞ of the others."""
    columns_Ck = seen.drawn_Ck if seen.drawn_Ck.shape[1] else seen.values_CJ
    return np.where(seen.kept_C, columns_Ck.mean(1), -np.inf)


@dataclass(frozen=True)
class Schedule:
    """Rounds of draws, and who is kept after each.

    ends: how many draws a kept candidate has been seen at after each round, rising; from 0 on with a proposer, whose
        word is then the first round.
    keep: what was seen to who is kept from now on [C].
    standing: what was seen to how the candidates stand [C], which is what the answer is read from at any time.
    """

    ends: tuple[int, ...]
    keep: Callable[[Seen], Mask]
    standing: Callable[[Seen], Floats] = mean

    def __post_init__(self) -> None:
        if not self.ends or self.ends[0] < 0 or any(b <= a for a, b in pairwise(self.ends)):
            raise ValueError(f"the draws after each round must rise, not {self.ends}")


def all_draws(draws: int) -> Schedule:
    """Every candidate at every draw."""
    return Schedule((draws,), lambda seen: seen.kept_C)


def staged(to_keep: Sequence[int], n_samples: Sequence[int]) -> Schedule:
    """After n_samples[i] draws the best to_keep[i] are kept (Li et al. 2023, “Your Diffusion Model is Secretly a
    Zero-Shot Classifier”, its published commands).

    Raises:
        ValueError: lists of two lengths, draws that do not rise, or more kept than before.
    """
    if len(to_keep) != len(n_samples) or any(b > a for a, b in pairwise(to_keep)):
        raise ValueError(f"to_keep {list(to_keep)} must fall and be as long as n_samples {list(n_samples)}")

    def keep(seen: Seen) -> Mask:
        return best(mean(seen), seen.kept_C, to_keep[bisect_left(n_samples, seen.draws)])

    return Schedule(tuple(n_samples), keep)


def hierarchical(timesteps: int, samples: int, beam_factor: float, patience: int, *, shrinking: bool) -> Schedule:
    """Algorithm 1 of the second paper: `samples` draws at each timestep, after which the best C / beam_factor of all C
    classes are kept; it ends when one class has led for `patience` further draws.

    The direction is that of the draws: from clean, from noisy or from the middle. `shrinking` is the other reading, of
    the paper's Figure 2: after each timestep the best 1 / beam_factor of those that are left.
    """
    if beam_factor < 1 or patience < 1:
        raise ValueError(f"beam_factor {beam_factor} and patience {patience} must be at least 1")

    def keep(seen: Seen) -> Mask:
        beam = (seen.kept_C.sum() if shrinking else len(seen.kept_C)) / beam_factor
        kept_C = best(mean(seen), seen.kept_C, math.ceil(beam))
        leaders_k = np.where(kept_C[:, None], seen.drawn_Ck, -np.inf).cumsum(1).argmax(0)
        changes = np.flatnonzero(np.diff(leaders_k))
        led = len(leaders_k) - 1 - (int(changes[-1]) + 1 if len(changes) else 0)
        return np.arange(len(kept_C)) == leaders_k[-1] if led >= patience else kept_C

    return Schedule(tuple(samples * (number + 1) for number in range(timesteps)), keep)


def shortlisted(schedule: Schedule, number: int) -> Schedule:
    """The schedule over the candidates that the proposer puts first, so many of them."""

    def keep(seen: Seen) -> Mask:
        return schedule.keep(seen) if seen.draws else best(mean(seen), seen.kept_C, number)

    return Schedule((0, *schedule.ends), keep, schedule.standing)


@dataclass(frozen=True)
class Learned:
    """What racing knows of a kind of race before it starts: see `learn`.

    order: [K] the draws, the most telling first.
    weights: of J columns, [J], those that foretell a candidate's mean over all draws; from the first J on.
    spread: for each of these, by how much it misses: the deviation of the difference between the winner and a rival.
    proposed: whether the first column is a proposer's; then J is the number of draws and 1.
    """

    order: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    spread: tuple[float, ...]
    proposed: bool


def racing(learned: Learned, threshold: float) -> Schedule:
    """Drops a candidate once it is foretold to end more than `threshold` spreads behind the leader.

    Draws are to be asked for in the order that was learned. A race that has lost one keeps all that it has: for what is
    left of the draws nothing was learned.
    """

    def standing(seen: Seen) -> Floats:
        if seen.lost:
            return mean(seen)
        weights_J = np.array(learned.weights[seen.values_CJ.shape[1] - 1])
        return np.where(seen.kept_C, np.nan_to_num(seen.values_CJ) @ weights_J, -np.inf)

    def keep(seen: Seen) -> Mask:
        if seen.lost:
            return seen.kept_C
        standing_C = standing(seen)
        return standing_C >= standing_C.max() - threshold * learned.spread[seen.values_CJ.shape[1] - 1]

    return Schedule(tuple(range(0 if learned.proposed else 1, len(learned.order) + 1)), keep, standing)


def learn(
    races: Sequence[Floats], level_K: Sequence[float], rivals: int, proposals: Sequence[Floats] | None
) -> Learned:
    """In which order draws tell most, and how the first of them foretell the mean of all.

    Args:
        races: evidence [C, K] of example races at all draws.
        level_K: the noise level of each draw; draws of one level differ by chance alone.
        rivals: how many of those that come nearest to the winner count; to tell these apart is what a race is about.
        proposals: [C] of each race what the proposer says, which is known before any draw; None without a proposer.

    The forecast is linear in the mean of each level seen so far, by least squares on the differences between winner
    and rivals. The next draw is of the level that leaves the least of them unexplained.
    """
    behind_D, seen_DK, proposed_D1 = _differences(races, rivals, proposals)
    draws_of = {level: [k for k, other in enumerate(level_K) if other == level] for level in dict.fromkeys(level_K)}
    count = dict.fromkeys(draws_of, 0)  # of each level, how many draws are in the order
    order: list[int] = []
    found: list[tuple[float, tuple[float, ...]]] = []  # spread and weights of the columns so far

    def fit(chosen: Sequence[int]) -> tuple[float, tuple[float, ...]]:
        groups = [[k for k in chosen if level_K[k] == level] for level in dict.fromkeys(level_K[k] for k in chosen)]
        design_DF = np.hstack([proposed_D1, *(seen_DK[:, group].mean(1, keepdims=True) for group in groups)])
        weights_F = np.linalg.lstsq(design_DF, behind_D, rcond=None)[0]
        own, of_groups = weights_F[: proposed_D1.shape[1]], weights_F[proposed_D1.shape[1] :]
        of_draw = {k: w / len(group) for w, group in zip(of_groups, groups, strict=True) for k in group}
        return float((behind_D - design_DF @ weights_F).std()), tuple(map(float, [*own, *(of_draw[k] for k in chosen)]))

    if proposals is not None:
        found.append(fit([]))
    while len(order) < len(level_K):
        options = {level: [*order, of[count[level]]] for level, of in draws_of.items() if count[level] < len(of)}
        fitted = {level: fit(chosen) for level, chosen in options.items()}
        level = min(fitted, key=lambda level: fitted[level][0])
        order, count[level] = options[level], count[level] + 1
        found.append(fitted[level])
    spread, weights = zip(*found, strict=True)
    return Learned(tuple(order), weights, spread, proposals is not None)


def _differences(
    races: Sequence[Floats], rivals: int, proposals: Sequence[Floats] | None
) -> tuple[Floats, Floats, Floats]:
    """How far rivals lie behind winners: in the end, [D], at each draw, [D, K], and for the proposer, [D, 1]."""
    behind, seen, proposed = [], [], []
    for number, values_CK in enumerate(races):
        means_C = values_CK.mean(1)
        winner, *others = np.argsort(-means_C, kind="stable")[: rivals + 1]
        behind.append(means_C[winner] - means_C[others])
        seen.append(values_CK[winner] - values_CK[others])
        if proposals is not None:
            proposed.append(proposals[number][winner] - proposals[number][others])
    behind_D = np.concatenate(behind)
    return (
        behind_D,
        np.concatenate(seen),
        np.concatenate(proposed)[:, None] if proposed else np.empty((len(behind_D), 0)),
    )


def calibrate(
    wrong: Callable[[float], Sequence[bool]], thresholds: Sequence[float], delta: float, confidence: float
) -> float:
    """The boldest threshold whose races pick another winner than all draws would at a rate of at most delta.

    Args:
        wrong: of a threshold, whether each of the example races ended with another winner; races that nothing was
            learned from, exchangeable with those to come.
        thresholds: to be tried, the most careful first.
        delta, confidence: in (0, 1): with this confidence in the example races the rate holds for those to come,
            whatever their evidence is distributed like.

    Learn then test (Angelopoulos et al. 2021), in a fixed sequence: as long as the binomial test rejects that the rate
    is above delta, a bolder threshold is tried.

    Raises:
        ValueError: delta or confidence outside (0, 1), or too few races for what is to be promised.
    """
    for name, value in (("delta", delta), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ValueError(f"{name} must lie between 0 and 1, not {value}")
    kept = None
    for threshold in thresholds:
        errors = wrong(threshold)
        if binom.cdf(sum(errors), len(errors), delta) > 1 - confidence:
            if kept is None:
                least = math.ceil(math.log(1 - confidence) / math.log(1 - delta))
                raise ValueError(
                    f"{sum(errors)} of {len(errors)} races went wrong even at threshold {threshold:g}: a rate of "
                    f"{delta} cannot be promised; it takes {least} races without an error"
                )
            return kept
        kept = threshold
    if kept is None:
        raise ValueError("no thresholds to try")
    return kept


def best(standing_C: Floats, kept_C: Mask, number: int) -> Mask:
    """The kept candidates that stand highest, at most so many; of equal ones the first."""
    chosen_C = np.zeros_like(kept_C)
    chosen_C[np.argsort(-standing_C, kind="stable")[: max(1, number)]] = True
    return chosen_C & kept_C


@dataclass
class Race:
    """One example under a schedule: what it asks for, and its answer at any time.

    A draw at which any kept candidate's evidence is not finite is left out for all of them, and counted in `dropped`.
    """

    candidates: int
    schedule: Schedule
    proposal: ArrayLike | None = None  # [C] what the proposer says of each candidate
    budget: int | None = None  # of (candidate, draw) rows; None is no limit
    evaluations: int = 0
    dropped: int = 0
    _columns: list[Floats] = field(default_factory=list)  # [C] the proposer's and those of draws, NaN if not asked
    _round: int = 0
    _asked: int = 0  # draws that were asked for
    _kept: Mask = field(init=False)
    _until: NDArray[np.int64] = field(init=False)  # [C] the round after which each was dropped
    _standing: Floats = field(init=False)  # [C] how each stood when it was last asked

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError("a race needs a candidate")
        if self.budget is not None and self.budget < self.candidates:
            raise ValueError(
                f"a budget of {self.budget} is less than one draw for each of {self.candidates} candidates"
            )
        self._kept = np.ones(self.candidates, dtype=bool)
        self._until = np.full(self.candidates, len(self.schedule.ends))
        self._standing = np.zeros(self.candidates)
        if self.proposal is not None:
            self._columns.append(np.asarray(self.proposal, dtype=np.float64))
        if self.schedule.ends[0] == 0:
            if self.proposal is None:
                raise ValueError("the schedule starts with a proposal, and there is none")
            self._judge()

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
                self._columns.append(draw_C)
            else:
                self.dropped += 1
        self.evaluations += told.size
        self._asked += told.shape[1]
        self._judge()

    def _judge(self) -> None:
        over = self._asked == self.schedule.ends[self._round]
        if self._columns:
            seen = Seen(np.stack(self._columns, 1), self._kept, self._asked, self.proposal is not None)
            self._standing = np.where(self._kept, self.schedule.standing(seen), self._standing)
            if over:
                after = self.schedule.keep(seen)
                self._until[self._kept & ~after] = self._round
                self._kept = after
        self._round += over

    def ranking(self) -> NDArray[np.int64]:
        """[C] candidates, best first: who was kept longer, then who stood higher."""
        return np.lexsort((-self._standing, -self._until))
