"""Schedules on evidence that is made up here: what they ask, what they answer, and the error that racing promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.schedules import Race, Schedule, all_draws, calibrate, hierarchical, racing, staged


def run(values_CK: np.ndarray, schedule: Schedule, budget: int | None = None) -> Race:
    race = Race(len(values_CK), schedule, budget)
    while len(rows := race.asks()):
        race.tell(values_CK[rows[:, 0], rows[:, 1]])
    return race


def evidence(rng: np.random.Generator, candidates: int, draws: int, tail: float = 3.0) -> np.ndarray:
    """Candidates of various worth, seen through noise with heavy tails that their draws share in part."""
    worth, shared = rng.normal(size=(candidates, 1)), 2 * rng.standard_t(tail, size=(1, draws))
    return worth + shared + rng.standard_t(tail, size=(candidates, draws))


SCHEDULES = [
    all_draws(8),
    staged((5, 2, 1), (1, 4, 8)),
    hierarchical(4, 2, beam_factor=2, patience=3),
    racing(8, threshold=2.0),
]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 12), st.sampled_from(range(len(SCHEDULES))))
def test_nothing_is_asked_twice_and_everyone_is_seen_once(seed: int, candidates: int, which: int) -> None:
    values, race = evidence(np.random.default_rng(seed), candidates, 8), Race(candidates, SCHEDULES[which])
    asked: list[tuple[int, int]] = []
    while len(rows := race.asks()):
        assert (race.asks() == rows).all()
        asked += [(int(c), int(k)) for c, k in rows]
        race.tell(values[rows[:, 0], rows[:, 1]])
    assert len(asked) == len(set(asked)) == race.evaluations <= candidates * 8
    assert {c for c, _ in asked} == set(range(candidates))
    assert sorted(race.ranking().tolist()) == list(range(candidates))


def test_all_draws_are_ranked_by_their_means() -> None:
    values = evidence(np.random.default_rng(0), 9, 6)
    race = run(values, all_draws(6))
    assert race.evaluations == 54 and race.ranking().tolist() == np.argsort(-values.mean(1)).tolist()


def test_staged_by_hand() -> None:
    values = np.array([[3.0, 0.0, 0.0], [2.0, 5.0, 0.0], [1.0, 9.0, 9.0], [2.5, 0.0, 9.0]])
    race = run(values, staged((3, 1, 1), (1, 2, 3)))
    # The third is dropped after one draw, whatever it would have shown; the second leads after two.
    assert race.ranking().tolist() == [1, 0, 3, 2] and race.evaluations == 4 + 3


def test_hierarchical_by_hand() -> None:
    values = np.array([[4.0, 0.0, 0.0, 0.0], [3.0, 9.0, 9.0, 9.0], [2.0, 1.0, 9.0, 9.0], [1.0, 9.0, 9.0, 9.0]])
    race = run(values, hierarchical(4, 1, beam_factor=2, patience=9))
    assert race.evaluations == 4 + 2 and race.ranking()[:2].tolist() == [1, 0]
    # With a beam of everyone it is patience that ends it: the second leads from draw 2 on.
    patient = run(values, hierarchical(4, 1, beam_factor=1, patience=2))
    assert patient.evaluations == 16 and patient.ranking()[0] == 1
    hasty = run(values, hierarchical(4, 1, beam_factor=1, patience=1))
    assert hasty.evaluations == 12 and hasty.ranking()[0] == 1


def test_a_budget_cuts_any_schedule_off_with_its_best_so_far() -> None:
    values = evidence(np.random.default_rng(1), 6, 8)
    for schedule in SCHEDULES:
        whole = run(values, schedule)
        for budget in (6, 13, 30, 48):
            race = run(values, schedule, budget)
            assert race.evaluations <= min(budget, whole.evaluations)
            assert sorted(race.ranking().tolist()) == list(range(6))
        assert run(values, schedule, 48).ranking().tolist() == whole.ranking().tolist()
    assert run(values, all_draws(8), 13).ranking().tolist() == np.argsort(-values[:, :2].mean(1)).tolist()


def test_evidence_that_is_not_finite_is_left_out_for_all_and_counted() -> None:
    values = evidence(np.random.default_rng(2), 5, 8)
    broken = values.copy()
    broken[3, 2], broken[0, 5] = np.nan, np.inf
    race = run(broken, all_draws(8))
    assert race.dropped == 2 and race.evaluations == 40
    assert race.ranking().tolist() == np.argsort(-np.delete(values, [2, 5], 1).mean(1)).tolist()
    assert run(broken, staged((5, 2, 1), (1, 4, 8))).dropped == 1
    assert run(np.full((3, 8), np.nan), racing(8, 1.0)).ranking().tolist() == [0, 1, 2]


@pytest.mark.parametrize("tail", [2.1, 30.0])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.1])
def test_racing_keeps_the_error_that_it_promises(delta: float, tail: float) -> None:
    """Against the winner over all draws; the share of 2,000 races may exceed δ by chance alone."""
    rng, candidates, draws = np.random.default_rng(int(1000 * delta)), 10, 16
    known = [evidence(rng, candidates, draws, tail) for _ in range(999)]
    schedule = racing(draws, calibrate(known, delta))
    wrong, asked, races = 0, 0, 2000
    for _ in range(races):
        values = evidence(rng, candidates, draws, tail)
        race = run(values, schedule)
        wrong += race.ranking()[0] != values.mean(1).argmax()
        asked += race.evaluations
    # The calibration itself varies as a Beta of 999 races does; three deviations of both.
    spread = np.sqrt(delta * (1 - delta) * (1 / races + 1 / 1000))
    assert wrong / races <= delta + 3 * spread
    assert asked < (0.95 if tail < 3 else 0.7) * races * candidates * draws


def test_a_stricter_promise_asks_for_more() -> None:
    known = [evidence(np.random.default_rng(seed), 6, 12) for seed in range(400)]
    thresholds = [calibrate(known, delta) for delta in (0.2, 0.1, 0.05, 0.01)]
    assert thresholds == sorted(thresholds)
    values = evidence(np.random.default_rng(5), 6, 12)
    asked = [run(values, racing(12, threshold)).evaluations for threshold in thresholds]
    assert asked == sorted(asked)
    assert run(values, racing(12, np.inf)).ranking()[0] == values.mean(1).argmax()


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: calibrate([np.zeros((2, 3))] * 50, 0.01), "50 races cannot promise an error rate of 0.01; 99 can"),
        (lambda: calibrate([np.zeros((2, 3))] * 50, 1.0), "between 0 and 1, not 1.0"),
        (lambda: staged((5, 6), (1, 2)), "must fall"),
        (lambda: staged((5,), (1, 2)), "as long as"),
        (lambda: staged((5, 4), (2, 2)), "must rise"),
        (lambda: hierarchical(2, 1, 0.5, 1), "at least 1"),
        (lambda: Race(4, all_draws(2), budget=3), "a budget of 3 is less than one draw for each of 4 candidates"),
    ],
)
def test_mistakes(call: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        call()  # type: ignore[operator]


def test_fewer_candidates_than_are_to_be_kept() -> None:
    values = evidence(np.random.default_rng(7), 3, 8)
    race = run(values, staged((5, 4, 1), (1, 4, 8)))
    assert race.evaluations == 24 and race.ranking()[0] == values.mean(1).argmax()
