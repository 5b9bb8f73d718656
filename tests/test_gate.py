"""The gate promotes what is shown to be better and to have lost nothing, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.config import GateParams, GateRow, Params, load
from dsd.data.examples import MatchingExample
from dsd.errors import DataError, ParamsError
from dsd.evaluation.gate import Ranks, Verdict, check_gate, judge

N = 400
COM, REF = "scenes-com", "scenes-ref"


def judged(params: Params, challenger: dict[str, Ranks], champion: dict[str, Ranks] | None) -> Verdict:
    check_gate(params, list(challenger))
    return judge(params.gate, params.evaluate, params.seed, challenger, champion)


@pytest.fixture(scope="module")
def gate() -> Params:
    """Both datasets ask for 2 points, and put up with 3."""
    params = load(Path(__file__).parent.parent / "params.yaml")
    row = GateRow(minimum_effect=0.02, maximum_regression=0.03)
    evaluate = params.evaluate.model_copy(update={"resamples": 500})
    return params.model_copy(
        update={"gate": GateParams(method="dsd", datasets={COM: row, REF: row}), "evaluate": evaluate}
    )


def ranks(right: np.ndarray, kind: str = REF) -> Ranks:
    examples = [MatchingExample(f"e{n}", (f"i{n}",), ("a", "b"), ((0, 0),), "subject") for n in range(len(right))]
    return Ranks.of(kind, examples, np.where(right, 1, 2).tolist())


def answers(share: float) -> np.ndarray:
    """The first so many of N are right: two of them differ by no more than they must."""
    return np.arange(N) < round(share * N)


def test_without_a_champion_the_first_is_it(gate: Params) -> None:
    verdict = judged(gate, {REF: ranks(answers(0.1))}, None)
    assert (verdict.promoted, verdict.reason, verdict.compared) == (True, "there was no champion", {})


def test_the_better_one_is_promoted_and_the_reason_has_the_numbers(gate: Params) -> None:
    verdict = judged(gate, {REF: ranks(answers(0.6))}, {REF: ranks(answers(0.5))})
    compared = verdict.compared[REF]
    assert verdict.promoted and compared.better and compared.kept
    assert compared.difference.value == pytest.approx(0.1)
    assert verdict.reason.startswith("better on scenes-ref +10.0 points [+") and verdict.reason.endswith("n = 400")


def test_a_tie_keeps_the_champion(gate: Params) -> None:
    verdict = judged(gate, {REF: ranks(answers(0.5))}, {REF: ranks(answers(0.5))})
    assert not verdict.promoted
    assert verdict.reason.startswith("not shown to be better, and a tie keeps the champion: scenes-ref +0.0 points")


def test_a_gain_below_what_is_asked_for_is_none(gate: Params) -> None:
    challenger, champion = {REF: ranks(answers(0.515))}, {REF: ranks(answers(0.5))}
    found = judged(gate, challenger, champion).compared[REF]
    assert found.difference.low > 0 and not found.better  # shown, and too small


def test_a_gain_must_be_shown_to_exceed_what_is_asked_for(gate: Params) -> None:
    """Of 400 answers 12 are gained, three points: surely more than none, but not surely more than two points."""
    challenger, champion = {REF: ranks(answers(0.53))}, {REF: ranks(answers(0.5))}
    verdict = judged(gate, challenger, champion)
    found = verdict.compared[REF]
    assert found.difference.value > found.minimum_effect and found.difference.p > 0.05
    assert not found.better and not verdict.promoted
    assert "p 0.151 that it exceeds +2.0" in verdict.reason
    rows = {REF: GateRow(minimum_effect=0.0, maximum_regression=0.03)}
    asks_nothing = gate.model_copy(update={"gate": gate.gate.model_copy(update={"datasets": rows})})
    assert judged(asks_nothing, challenger, champion).promoted


@pytest.mark.parametrize("share", [0.53, 0.56, 0.6])
def test_no_verdict_depends_on_the_number_of_resamples(gate: Params, share: float) -> None:
    challenger, champion = {REF: ranks(answers(share))}, {REF: ranks(answers(0.5))}
    verdicts = [
        judged(
            gate.model_copy(update={"evaluate": gate.evaluate.model_copy(update={"resamples": resamples})}),
            challenger,
            champion,
        )
        for resamples in (200, 2000)
    ]
    assert verdicts[0].promoted == verdicts[1].promoted == (share > 0.53)
    assert verdicts[0].compared[REF].p == verdicts[1].compared[REF].p


def test_what_may_be_luck_is_no_gain(gate: Params) -> None:
    flips = np.arange(N) % 4  # a quarter gained, nearly as many lost
    one, other = flips == 0, (flips == 1) & (np.arange(N) > 60)
    found = judged(gate, {REF: ranks(one)}, {REF: ranks(other)}).compared[REF]
    assert found.difference.value >= 0.02 and found.p > 0.05 and not found.better


def test_a_loss_elsewhere_keeps_the_champion(gate: Params) -> None:
    com = [ranks(answers(share)) for share in (0.5, 0.56)]
    challenger = {REF: ranks(answers(0.7)), COM: com[0]}
    verdict = judged(gate, challenger, {REF: ranks(answers(0.5)), COM: com[1]})
    assert not verdict.promoted and verdict.compared[REF].better and not verdict.compared[COM].kept
    assert "may have lost more than is allowed (3.0 on scenes-com, in points): scenes-com −6.0 points" in verdict.reason


def test_a_loss_that_is_allowed_does_no_harm(gate: Params) -> None:
    challenger = {REF: ranks(answers(0.7)), COM: ranks(answers(0.495))}
    verdict = judged(gate, challenger, {REF: ranks(answers(0.5)), COM: ranks(answers(0.5))})
    assert verdict.promoted and verdict.compared[COM].difference.value < 0


def test_a_dataset_without_a_row_is_not_compared(gate: Params) -> None:
    challenger = {REF: ranks(answers(0.7)), "scenes-vqa": ranks(answers(0.0))}
    verdict = judged(gate, challenger, {REF: ranks(answers(0.5)), "scenes-vqa": ranks(answers(1.0))})
    assert verdict.promoted and list(verdict.compared) == [REF]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=20, max_size=60))
@settings(max_examples=30, deadline=None)
def test_never_do_both_beat_each_other(gate: Params, hits: list[tuple[bool, bool]]) -> None:
    one, other = (np.array(side) for side in zip(*hits, strict=True))
    forth = judged(gate, {REF: ranks(one)}, {REF: ranks(other)})
    back = judged(gate, {REF: ranks(other)}, {REF: ranks(one)})
    assert not (forth.promoted and back.promoted)
    assert forth.compared[REF].difference.value == pytest.approx(-back.compared[REF].difference.value)


def test_other_examples_are_no_comparison(gate: Params) -> None:
    with pytest.raises(DataError, match="scenes-ref: the champion was measured on other examples; evaluate it again"):
        judged(gate, {REF: ranks(answers(0.5))}, {REF: ranks(answers(0.5)[1:])})
    with pytest.raises(DataError, match="scenes-ref: the champion was measured on other examples"):
        judged(gate, {REF: ranks(answers(0.5))}, {COM: ranks(answers(0.5))})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"datasets": {}}, "gate.datasets: has a row for none of scenes-com, scenes-ref; give at least one"),
    ],
)
def test_a_gate_that_makes_no_sense_is_one_line(gate: Params, changes: dict[str, object], line: str) -> None:
    with pytest.raises(ParamsError) as caught:
        check_gate(gate.model_copy(update={"gate": gate.gate.model_copy(update=changes)}), [COM, REF])
    assert line in str(caught.value) and "\n" not in str(caught.value)
