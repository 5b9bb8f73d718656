"""Schedules on synthetic evidence: the rows they request, their rankings, and the error rate of calibrated racing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from dsd.config.base import Reading
from dsd.errors import DataError
from dsd.schedules.base import shortlisted
from dsd.schedules.exhaustive import all_draws
from dsd.schedules.hierarchical import READINGS, hierarchical
from dsd.schedules.race import Race, Schedule
from dsd.schedules.racing import Forecast, UnsupportedRate, calibrate, fit_forecast, racing, smallest_rate
from dsd.schedules.staged import staged


def run(
    values_CK: np.ndarray, schedule: Schedule, budget: int | None = None, proposal: np.ndarray | None = None
) -> Race:
    race = Race(len(values_CK), schedule, proposal, budget)
    while len(rows := race.next_rows()):
        race.record(values_CK[rows[:, 0], rows[:, 1]])
    return race


def evidence(rng: np.random.Generator, candidates: int, draws: int, tail: float = 3.0) -> np.ndarray:
    """Candidates of various worth under heavy-tailed noise, part of which is shared by all candidates of a draw."""
    worth, shared = rng.normal(size=(candidates, 1)), 2 * rng.standard_t(tail, size=(1, draws))
    return worth + shared + rng.standard_t(tail, size=(candidates, draws))


def simple(draws: int) -> Forecast:
    """Draws in their order, all alike: the mean over all draws is predicted to be the mean so far."""
    spread = [float(np.sqrt(1 / k - 1 / draws)) for k in range(1, draws + 1)]
    return Forecast(tuple(range(draws)), tuple((1 / k,) * k for k in range(1, draws + 1)), tuple(spread), False)


SCHEDULES = [
    all_draws(8),
    staged((5, 2, 1), (1, 4, 8)),
    hierarchical(4, 2, beam_factor=2, patience=3, reading="text", shrinking=False),
    hierarchical(4, 2, beam_factor=2, patience=3, reading="text", shrinking=True),
    hierarchical(4, 2, beam_factor=2, patience=3, reading="listing", shrinking=False),
    racing(simple(8), threshold=2.0),
]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from(range(len(SCHEDULES))))
def test_no_row_is_requested_twice_and_every_candidate_at_least_once(seed: int, candidates: int, which: int) -> None:
    values, race = evidence(np.random.default_rng(seed), candidates, 8), Race(candidates, SCHEDULES[which])
    requested: list[tuple[int, int]] = []
    while len(rows := race.next_rows()):
        assert (race.next_rows() == rows).all()
        requested += [(int(c), int(k)) for c, k in rows]
        race.record(values[rows[:, 0], rows[:, 1]])
    assert len(requested) == len(set(requested)) == race.evaluations <= candidates * 8
    assert {c for c, _ in requested} == set(range(candidates))
    assert sorted(race.ranking().tolist()) == list(range(candidates))


def test_all_draws_are_ranked_by_their_means() -> None:
    values = evidence(np.random.default_rng(0), 9, 6)
    race = run(values, all_draws(6))
    assert race.evaluations == 54 and race.ranking().tolist() == np.argsort(-values.mean(1)).tolist()


def test_staged_by_hand() -> None:
    values = np.array([[3.0, 0.0, 0.0], [2.0, 5.0, 0.0], [1.0, 9.0, 9.0], [2.5, 0.0, 9.0]])
    race = run(values, staged((3, 1, 1), (1, 2, 3)))
    # The third is dropped after one draw, whatever its later evidence; the second leads after two.
    assert race.ranking().tolist() == [1, 0, 3, 2] and race.evaluations == 4 + 3


def test_hierarchical_by_hand() -> None:
    values = np.array([[4.0, 0.0, 0.0, 0.0], [3.0, 9.0, 9.0, 9.0], [2.0, 1.0, 9.0, 9.0], [1.0, 9.0, 9.0, 9.0]])
    # The best two of four after the first timestep, and the same two from then on.
    race = run(values, hierarchical(4, 1, beam_factor=2, patience=9, reading="text", shrinking=False))
    assert race.evaluations == 4 + 3 * 2 and race.ranking()[:2].tolist() == [1, 0]
    # Half of those that are left: one after the second timestep.
    race = run(values, hierarchical(4, 1, beam_factor=2, patience=9, reading="text", shrinking=True))
    assert race.evaluations == 4 + 2 and race.ranking()[:2].tolist() == [1, 0]
    # With a beam of all candidates patience ends the race: the second leads from draw 2 on.
    patient = run(values, hierarchical(4, 1, beam_factor=1, patience=2, reading="text", shrinking=False))
    assert patient.evaluations == 16 and patient.ranking()[0] == 1
    hasty = run(values, hierarchical(4, 1, beam_factor=1, patience=1, reading="text", shrinking=False))
    assert hasty.evaluations == 12 and hasty.ranking()[0] == 1


def algorithm_1(values_CK: np.ndarray, samples: int, beam_factor: float, reading: str) -> tuple[int, int]:
    """The second paper's Algorithm 1, written from its lines: the winner, and the number of evaluations."""
    count, draws = values_CK.shape
    classes, scores, evaluations = list(range(count)), {c: list[float]() for c in range(count)}, 0
    beam_size = int(np.ceil(count / beam_factor))  # line 3

    def refined() -> list[int]:  # line 11
        return sorted(classes, key=lambda c: -np.mean(scores[c]))[:beam_size]

    for first in range(0, draws, samples):  # line 4: timesteps
        for k in range(first, first + samples):  # line 5: samples of a timestep
            for c in classes:
                scores[c].append(values_CK[c, k])
                evaluations += 1
            if reading == "listing":
                classes = refined()
        if reading == "text":
            classes = refined()
    return max(classes, key=lambda c: np.mean(scores[c])), evaluations  # line 14: every timestep has as many samples


@pytest.mark.parametrize(("reading", "cost"), [("text", 0.5625), ("listing", 0.508)])
def test_both_readings_of_algorithm_1(reading: Reading, cost: float) -> None:
    """At b = 2, with eight timesteps of eight samples, and without stopping early."""
    rng = np.random.default_rng(0)
    schedule = hierarchical(8, 8, beam_factor=2, patience=99, reading=reading, shrinking=False)
    for _ in range(40):
        values = evidence(rng, 16, 64)
        race = run(values, schedule)
        assert (race.ranking()[0], race.evaluations) == algorithm_1(values, 8, 2, reading)
        assert race.evaluations / values.size == pytest.approx(cost, abs=5e-4)


def test_the_two_readings_often_name_different_winners() -> None:
    """They agree in about two thirds of random races: a result must say which of them it is of."""
    rng = np.random.default_rng(1)
    races = [rng.normal(size=(20, 1)) + 6 * rng.normal(size=(20, 64)) for _ in range(100)]
    text, listing = (
        [run(v, hierarchical(8, 8, 2, 99, reading=reading, shrinking=False)).ranking()[0] for v in races]
        for reading in READINGS
    )
    assert 0.5 < np.mean(np.equal(text, listing)) < 0.8


def grid(draws: int, samples: int) -> list[int]:
    """The timesteps that the published code of Li et al. 2023 takes for a number of samples, of `draws` in all."""
    step = draws // samples
    return list(range(step // 2, draws, step))[:samples]


def published_staged(values_CK: np.ndarray, to_keep: Sequence[int], n_samples: Sequence[int]) -> tuple[int, int]:
    """The rule of that code: each stage takes the timesteps of its own grid that were not evaluated yet."""
    kept, taken, evaluations = list(range(len(values_CK))), list[int](), 0
    for keep, samples in zip(to_keep, n_samples, strict=True):
        fresh = [k for k in grid(n_samples[-1], samples) if k not in taken]
        taken += fresh
        evaluations += len(kept) * len(fresh)
        kept = sorted(kept, key=lambda c: -values_CK[c, taken].mean())[:keep]
    return kept[0], evaluations


@pytest.mark.parametrize(
    ("to_keep", "n_samples"), [((8, 1), (4, 64)), ((10, 3, 1), (3, 9, 27)), ((12, 5, 2, 1), (1, 3, 9, 27))]
)
def test_staged_is_the_published_code_where_its_grids_nest(to_keep: Sequence[int], n_samples: Sequence[int]) -> None:
    order = list(dict.fromkeys(k for samples in n_samples for k in grid(n_samples[-1], samples)))
    rng = np.random.default_rng(0)
    for _ in range(50):
        values = evidence(rng, 20, n_samples[-1])
        race = run(values[:, order], staged(to_keep, n_samples))
        assert (race.ranking()[0], race.evaluations) == published_staged(values, to_keep, n_samples)


@pytest.mark.parametrize(
    ("to_keep", "n_samples", "more"),
    [
        ((10, 3, 1), (4, 16, 64), 1.043),
        ((48, 10, 3, 1), (1, 4, 16, 64), 1.145),
        ((48, 24, 12, 6, 3, 1), (2, 4, 8, 16, 32, 64), 1.438),
    ],
)
def test_staged_is_cheaper_where_the_published_grids_do_not_nest(
    to_keep: Sequence[int], n_samples: Sequence[int], more: float
) -> None:
    """The published code then draws again, and takes more than `n_samples` says."""
    values = evidence(np.random.default_rng(0), 96, 64)
    _, published = published_staged(values, to_keep, n_samples)
    assert published / run(values, staged(to_keep, n_samples)).evaluations == pytest.approx(more, abs=1e-3)


def test_a_race_that_spends_its_budget_ranks_by_what_it_has() -> None:
    values = evidence(np.random.default_rng(1), 6, 8)
    for schedule in SCHEDULES:
        whole = run(values, schedule)
        for budget in (6, 13, 30, 48):
            race = run(values, schedule, budget)
            assert race.evaluations <= min(budget, whole.evaluations)
            assert sorted(race.ranking().tolist()) == list(range(6))
        assert run(values, schedule, 48).ranking().tolist() == whole.ranking().tolist()
    assert run(values, all_draws(8), 13).ranking().tolist() == np.argsort(-values[:, :2].mean(1)).tolist()


def test_a_draw_that_is_not_finite_is_left_out_for_all_candidates_and_counted() -> None:
    values = evidence(np.random.default_rng(2), 5, 8)
    broken = values.copy()
    broken[3, 2], broken[0, 5] = np.nan, np.inf
    race = run(broken, all_draws(8))
    assert race.lost_draws == 2 and race.evaluations == 40
    assert race.ranking().tolist() == np.argsort(-np.delete(values, [2, 5], 1).mean(1)).tolist()
    assert run(broken, staged((5, 2, 1), (1, 4, 8))).lost_draws == 1
    assert run(np.full((3, 8), np.nan), racing(simple(8), 1.0)).ranking().tolist() == [0, 1, 2]


def test_racing_drops_no_candidate_after_a_lost_draw() -> None:
    values = evidence(np.random.default_rng(3), 5, 8)
    values[4] += 100.0
    assert run(values, racing(simple(8), 1.0)).evaluations == 5
    values[2, 0] = np.nan
    race = run(values, racing(simple(8), 1.0))
    assert race.evaluations == 40 and race.lost_draws == 1 and race.ranking()[0] == 4


def races(rng: np.random.Generator, count: int, tail: float) -> list[np.ndarray]:
    return [evidence(rng, 10, 16, tail) for _ in range(count)]


def errors(
    some: Sequence[np.ndarray], schedule: Schedule, order: Sequence[int], budget: int | None = None
) -> tuple[list[bool], int]:
    """Whether each race misses the winner of all draws, and the evaluations of all races."""
    ended = [run(values[:, list(order)], schedule, budget) for values in some]
    missed = [race.ranking()[0] != values.mean(1).argmax() for race, values in zip(ended, some, strict=True)]
    return missed, sum(race.evaluations for race in ended)


THRESHOLDS = np.geomspace(8, 0.1, 40).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("tail", [2.1, 30.0])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1])
def test_racing_keeps_its_error_rate(delta: float, tail: float) -> None:
    """On 10,000 further races with heavy tails."""
    rng = np.random.default_rng(int(1000 * delta))
    forecast = fit_forecast(races(rng, 200, tail), [k // 4 for k in range(16)], 9, None)
    calibration = races(rng, 1000, tail)

    def errors_at(threshold: float) -> list[bool]:
        return errors(calibration, racing(forecast, threshold), forecast.order)[0]

    threshold = calibrate(errors_at, THRESHOLDS, delta, 0.95, "")
    missed, evaluations = errors(races(rng, 10_000, tail), racing(forecast, threshold), forecast.order)
    assert np.mean(missed) <= delta
    assert evaluations < (0.95 if tail < 3 else 0.7) * 10_000 * 10 * 16


def test_racing_keeps_its_error_rate_with_its_budget_in_force() -> None:
    """Calibrated without the budget that it then runs with, it would not: a third of the races ends too early."""
    rng, delta, budget = np.random.default_rng(1), 0.05, 4 * 10
    forecast = fit_forecast(races(rng, 60, 30.0), [k // 4 for k in range(16)], 9, None)
    calibration, future = races(rng, 300, 30.0), races(rng, 1500, 30.0)

    def rate(some: Sequence[np.ndarray], threshold: float, budget: int | None) -> float:
        return float(np.mean(errors(some, racing(forecast, threshold), forecast.order, budget)[0]))

    def errors_at(budget: int | None) -> Callable[[float], list[bool]]:
        return lambda threshold: errors(calibration, racing(forecast, threshold), forecast.order, budget)[0]

    thresholds = [8.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.5]
    alone = calibrate(errors_at(None), thresholds, delta, 0.95, "")
    assert rate(future, alone, None) <= delta < 3 * delta < rate(future, alone, budget)
    with pytest.raises(UnsupportedRate, match=r"δ = 0\.05 is refused, .* is 0\.\d+: .*; more races") as refused:
        calibrate(errors_at(budget), thresholds, delta, 0.95, "more races")
    smallest = refused.value.smallest
    supported = calibrate(errors_at(budget), thresholds, smallest, 0.95, "")
    assert rate(future, supported, budget) <= smallest


def test_the_rate_is_kept_with_the_stated_confidence_if_races_are_independent() -> None:
    """500 races, five of each image, which miss the winner together: only one of each image may be counted."""
    rng, rates = np.random.default_rng(2), {3.0: 0.02, 2.0: 0.06, 1.0: 0.11, 0.5: 0.3}
    broken = {1: 0, 5: 0}
    for _ in range(400):
        uniform = rng.random(100)
        for copies in broken:
            errors_of = {t: np.repeat(uniform < rate, copies).tolist() for t, rate in rates.items()}
            with suppress(UnsupportedRate):
                broken[copies] += rates[calibrate(errors_of.__getitem__, [*rates], 0.1, 0.95, "")] > 0.1
    assert broken[1] / 400 <= 0.05 < 0.1 < broken[5] / 400


def test_the_smallest_rate_that_races_support() -> None:
    for races_, smallest in ((50, 0.0582), (120, 0.0247), (299, 0.01)):
        assert smallest_rate(0, races_, 0.95) == pytest.approx(1 - 0.05 ** (1 / races_))
        assert smallest_rate(0, races_, 0.95) == pytest.approx(smallest, abs=1e-4)
    for missed in (0, 3, 20):
        rate = smallest_rate(missed, 120, 0.95)
        assert binom.cdf(missed, 120, rate) == pytest.approx(0.05)
    assert smallest_rate(9, 9, 0.95) == 1


def test_calibration_by_hand() -> None:
    """Of 100 races: the binomial test at 5 % allows 1 error for a rate of 5 %, for 2 its tail is 0.118."""
    tried: list[float] = []

    def errors_at(threshold: float) -> list[bool]:
        tried.append(threshold)
        return [n < 4 - threshold for n in range(100)]

    assert calibrate(errors_at, [4.0, 3.5, 3.0, 2.0, 1.0], 0.05, 0.95, "") == 3.0
    assert tried == [4.0, 3.5, 3.0, 2.0]


def test_the_most_informative_draw_comes_first() -> None:
    """Levels 0 and 2 are noise, level 1 is almost the truth: it comes first and has all the weight."""
    rng = np.random.default_rng(0)
    worth = [rng.normal(size=(6, 1)) for _ in range(50)]
    some = [
        np.hstack([rng.normal(size=(6, 2)) * 5, w + rng.normal(size=(6, 2)) / 50, rng.normal(size=(6, 2)) * 5])
        for w in worth
    ]
    forecast = fit_forecast(some, [0, 0, 1, 1, 2, 2], 5, None)
    assert set(forecast.order) == set(range(6)) and not forecast.proposed
    noise = fit_forecast([values[:, [0, 1, 4, 5]] for values in some], [0, 0, 2, 2], 5, None)
    assert np.allclose(forecast.weights[-1], 1 / 6, atol=1e-6) and forecast.spread[-1] < 1e-6
    assert list(forecast.spread) == sorted(forecast.spread, reverse=True)
    assert noise.spread[-1] < 1e-6


def test_the_forecast_from_all_draws_is_their_mean() -> None:
    some = [evidence(np.random.default_rng(seed), 5, 6) for seed in range(20)]
    forecast = fit_forecast(some, [0, 0, 0, 1, 1, 1], 4, [values[:, 0] * 0.5 for values in some])
    assert forecast.proposed and len(forecast.weights) == len(forecast.spread) == 7
    assert np.allclose(forecast.weights[-1], [0, *[1 / 6] * 6], atol=1e-6)


def test_a_good_proposal_saves_draws() -> None:
    rng = np.random.default_rng(4)
    some = [evidence(rng, 20, 8) for _ in range(60)]
    proposals = [values.mean(1) + rng.normal(size=20) / 20 for values in some]
    forecast = fit_forecast(some, [0] * 8, 5, proposals)
    ended = [
        run(values[:, list(forecast.order)], racing(forecast, 4.0), proposal=proposal)
        for values, proposal in zip(some, proposals, strict=True)
    ]
    assert np.mean([race.evaluations for race in ended]) < 20
    assert np.mean([r.ranking()[0] == v.mean(1).argmax() for r, v in zip(ended, some, strict=True)]) > 0.95
    assert all(sorted(race.ranking().tolist()) == list(range(20)) for race in ended)


def test_a_shortlist_has_the_proposers_highest_scores() -> None:
    values = evidence(np.random.default_rng(5), 6, 4)
    race = run(values, shortlisted(all_draws(4), 2), proposal=np.array([0.0, 3.0, 1.0, 9.0, 2.0, 1.0]))
    assert race.evaluations == 2 * 4 and set(race.ranking()[:2].tolist()) == {1, 3}
    assert race.ranking()[2:].tolist() == [4, 2, 5, 0]


def test_a_lower_threshold_takes_fewer_evaluations() -> None:
    values = evidence(np.random.default_rng(5), 6, 12)
    taken = [run(values, racing(simple(12), threshold)).evaluations for threshold in (0.1, 0.5, 1.0, 2.0, 4.0)]
    assert taken == sorted(taken)
    assert run(values, racing(simple(12), np.inf)).ranking()[0] == values.mean(1).argmax()


def test_many_candidates_cost_little_more_than_a_draw_each() -> None:
    """Evaluations per candidate fall towards one: after one draw few are close enough to the leader."""
    rng = np.random.default_rng(6)
    cost = []
    for candidates in (10, 100, 1000, 3129, 10_000):
        worth = rng.standard_t(4, size=(candidates, 1))
        race = run(worth + 0.5 * rng.standard_t(4, size=(candidates, 64)), racing(simple(64), 2.0))
        cost.append(race.evaluations / candidates)
    assert cost == sorted(cost, reverse=True) and cost[3] <= 1.3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: calibrate(lambda _: [False] * 50, [1.0], 0.01, 0.95, "more"),
            r"δ = 0\.01 is refused, the smallest that can be guaranteed is 0\.0582: 0 of 50 races miss .*; more",
        ),
        (
            lambda: calibrate(lambda _: [True] * 50, [1.0], 0.1, 0.95, "more"),
            "is refused, the smallest that can be guaranteed is 1: 50 of 50 races miss .*; more",
        ),
        (lambda: staged((5, 4), (2, 2)), "must rise"),
        (lambda: Race(4, all_draws(2), budget=3), "a budget of 3 is less than one draw for each of 4 candidates"),
        (lambda: Race(4, shortlisted(all_draws(2), 2)), "starts with a proposal, and there is none"),
    ],
)
def test_mistakes(call: object, message: str) -> None:
    with pytest.raises((ValueError, DataError), match=message):
        call()  # type: ignore[operator]


def test_fewer_candidates_than_are_to_be_kept() -> None:
    values = evidence(np.random.default_rng(7), 3, 8)
    race = run(values, staged((5, 4, 1), (1, 4, 8)))
    assert race.evaluations == 24 and race.ranking()[0] == values.mean(1).argmax()
