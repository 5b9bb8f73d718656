"""Racing: drop a candidate once it is predicted to finish too far behind the leader.

The forecast is fitted on few-shot races, its threshold is calibrated on validation races.

Shapes: C candidates, K draws; J columns: the proposer's scores, if there are any, and draws; D differences between a
winner and a rival; F features of a forecast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import beta

from dsd.config import RacesParams, RacingSchedule, ScheduleParams
from dsd.errors import DataError
from dsd.schedules.base import Comparison, Course, Proposer, ScheduleKind, Setting
from dsd.schedules.race import Floats, Mask, RoundState, Schedule, mean


@dataclass(frozen=True)
class Forecast:
    """A linear forecast of a candidate's mean over all draws, from each number of columns.

    Field names are keys of data/races/*.json.

    order: [K] the draws, the most informative first.
    weights: [J] of the first J columns, for each J.
    spread: for each J, the standard deviation of the error in the difference between the winner and a rival.
    proposed: whether the first column is a proposer's; then J is the number of draws plus 1.
    """

    order: tuple[int, ...]
    weights: tuple[tuple[float, ...], ...]
    spread: tuple[float, ...]
    proposed: bool


def racing(forecast: Forecast, threshold: float) -> Schedule:
    """Drop a candidate once it is predicted to finish more than `threshold` spreads behind the leader.

    Draws must come in the order of the forecast. A race that has lost a draw keeps all candidates from then on: there
    is no forecast for the draws that are left.
    """

    def estimate(state: RoundState) -> Floats:
        if state.lost:
            return mean(state)
        weights_J = np.array(forecast.weights[state.values_CJ.shape[1] - 1])
        return np.where(state.kept_C, state.values_CJ @ weights_J, -np.inf)

    def keep(state: RoundState) -> Mask:
        if state.lost:
            return state.kept_C
        scores_C = estimate(state)
        return scores_C >= scores_C.max() - threshold * forecast.spread[state.values_CJ.shape[1] - 1]

    return Schedule(tuple(range(0 if forecast.proposed else 1, len(forecast.order) + 1)), keep, estimate)


def racing_name(delta: float, proposer: Proposer, budget: float | None) -> str:
    """The name in results of racing that is calibrated for an error rate."""
    first = f", {proposer} first" if proposer else ""
    return f"racing, δ = {delta:g}{first}" + (f", budget {budget:g}" if budget else "")


def fit_forecast(
    races: Sequence[Floats], level_K: Sequence[float], rivals: int, proposals: Sequence[Floats] | None
) -> Forecast:
    """Choose the order of the draws and fit the forecast for each number of them.

    Args:
        races: evidence [C, K] of example races at all draws.
        level_K: the noise level of each draw; draws of one level differ by chance alone.
        rivals: how many runners-up per race the forecast is fitted on.
        proposals: [C] each, the proposer's scores in each race; None without a proposer.

    The forecast is linear in the mean of each level so far, by least squares on the differences between winner and
    rivals. The next draw is of the level that leaves the least of them unexplained.
    """
    final_D, draws_DK, proposed_D1 = _differences(races, rivals, proposals)
    draws_of = {level: [k for k, other in enumerate(level_K) if other == level] for level in dict.fromkeys(level_K)}
    count = dict.fromkeys(draws_of, 0)  # draws of each level in the order
    order: list[int] = []
    fits: list[tuple[float, tuple[float, ...]]] = []  # spread and weights, for each number of columns

    def fit(chosen: Sequence[int]) -> tuple[float, tuple[float, ...]]:
        groups = [[k for k in chosen if level_K[k] == level] for level in dict.fromkeys(level_K[k] for k in chosen)]
        design_DF = np.hstack([proposed_D1, *(draws_DK[:, group].mean(1, keepdims=True) for group in groups)])
        weights_F = np.linalg.lstsq(design_DF, final_D, rcond=None)[0]
        own, of_groups = weights_F[: proposed_D1.shape[1]], weights_F[proposed_D1.shape[1] :]
        of_draw = {k: w / len(group) for w, group in zip(of_groups, groups, strict=True) for k in group}
        return float((final_D - design_DF @ weights_F).std()), tuple(map(float, [*own, *(of_draw[k] for k in chosen)]))

    if proposals is not None:
        fits.append(fit([]))
    while len(order) < len(level_K):
        options = {level: [*order, of[count[level]]] for level, of in draws_of.items() if count[level] < len(of)}
        fitted = {level: fit(chosen) for level, chosen in options.items()}
        level = min(fitted, key=lambda level: fitted[level][0])
        order, count[level] = options[level], count[level] + 1
        fits.append(fitted[level])
    spread, weights = zip(*fits, strict=True)
    return Forecast(tuple(order), weights, spread, proposals is not None)


def _differences(
    races: Sequence[Floats], rivals: int, proposals: Sequence[Floats] | None
) -> tuple[Floats, Floats, Floats]:
    """How far rivals are behind winners: over all draws [D], at each draw [D, K], and for the proposer [D, 1]."""
    final, at_draws, proposed = [], [], []
    for number, values_CK in enumerate(races):
        means_C = values_CK.mean(1)
        winner, *others = np.argsort(-means_C, kind="stable")[: rivals + 1]
        final.append(means_C[winner] - means_C[others])
        at_draws.append(values_CK[winner] - values_CK[others])
        if proposals is not None:
            proposed.append(proposals[number][winner] - proposals[number][others])
    final_D = np.concatenate(final)
    proposed_D1 = np.concatenate(proposed)[:, None] if proposed else np.empty((len(final_D), 0))
    return final_D, np.concatenate(at_draws), proposed_D1


class UnsupportedRate(DataError):
    """An error rate that the calibration races do not support; `smallest` is the least that they do."""

    def __init__(self, message: str, smallest: float) -> None:
        super().__init__(message)
        self.smallest = smallest


def smallest_rate(errors: int, races: int, confidence: float) -> float:
    """The least error rate that races with so many errors support (Clopper and Pearson 1934, one-sided).

    Without an error it is 1 − (1 − confidence)^(1/races).
    """
    return float(beta.ppf(confidence, errors + 1, races - errors)) if errors < races else 1.0


def calibrate(
    errors_at: Callable[[float], Sequence[bool]],
    thresholds: Sequence[float],
    delta: float,
    confidence: float,
    remedy: str,
) -> float:
    """The lowest threshold at which the rate of races that miss the winner of all draws is at most delta.

    Args:
        errors_at: whether each calibration race misses that winner at a threshold, with the budget that will be in
            force. The races must be independent, and the forecast must not have been fitted on them.
        thresholds: to try, the highest first.
        delta, confidence: in (0, 1). The rate of future races is at most delta with this confidence, if calibration
            and future races are exchangeable and independent.
        remedy: what to change where the races do not support delta.

    Learn then test (Angelopoulos et al. 2021), in a fixed sequence: try the next threshold as long as a binomial test
    rejects that the rate is above delta.

    Raises:
        ValueError: no thresholds.
        UnsupportedRate: even the highest threshold does not keep this rate for sure.
    """
    valid = None
    for threshold in thresholds:
        errors = errors_at(threshold)
        smallest = smallest_rate(sum(errors), len(errors), confidence)
        if smallest > delta:
            if valid is None:
                raise UnsupportedRate(
                    f"δ = {delta:g} is refused, the smallest that can be guaranteed is {_rounded_up(smallest)}: "
                    f"{sum(errors)} of {len(errors)} races miss the winner of all draws at threshold {threshold:g}; "
                    f"{remedy}",
                    smallest,
                )
            return valid
        valid = threshold
    if valid is None:
        raise ValueError("no thresholds to try")
    return valid


def _rounded_up(rate: float) -> str:
    """A rate with four decimals that is not below it."""
    return f"{math.ceil(1e4 * rate) / 1e4:g}"


class Racing(ScheduleKind):
    kind = "racing"
    needs_comparison = True

    def course(self, setting: Setting, races: RacesParams, comparison: Comparison) -> Course:
        proposer = setting["proposer"]
        forecast = Forecast(**comparison["learned"][str(proposer)])
        return Course(list(forecast.order), racing(forecast, setting["threshold"]), proposer, setting["budget"])

    def course_of(self, row: ScheduleParams, races: RacesParams, comparison: Comparison) -> Course:
        """The course that is calibrated for the error rate, proposer and budget of a row of `schedules`."""
        assert isinstance(row, RacingSchedule)
        return self.course(_promise(row, comparison), races, comparison)

    def settings(self, races: RacesParams) -> Iterable[Setting]:
        for proposer, budget, threshold in product(races.racing.proposer, races.racing.budget, races.racing.threshold):
            yield {"proposer": proposer, "threshold": threshold, "budget": budget}


def _promise(row: RacingSchedule, comparison: Comparison) -> Setting:
    wanted = {"proposer": row.proposer, "delta": row.delta, "budget": row.budget}
    name = racing_name(row.delta, row.proposer, row.budget)
    for promise in comparison.get("promised", []):
        if wanted.items() <= promise.items():
            if promise["threshold"] is None:
                least = _rounded_up(promise["smallest"])
                raise DataError(f"{name}: refused; the smallest δ that the calibration races support is {least}")
            return promise
    raise DataError(f"{name}: not calibrated; add its δ, proposer and budget to races.racing and run `make races`")


SCHEDULE = Racing()
