"""Schedules replayed on recorded evidence: their outcomes, which setting is chosen, and calibrated racing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from dsd.config import Params
from dsd.data.examples import MatchingExample
from dsd.evaluation.claims import DatasetHits, judge
from dsd.metrics import HEADLINES, METRICS
from dsd.schedules import SCHEDULES
from dsd.schedules.base import Course, shortlisted, spread_order
from dsd.schedules.exhaustive import ALL_DRAWS, all_draws
from dsd.schedules.hierarchical import directed_order, published_name
from dsd.schedules.racing import racing_name
from dsd.schedules.replay import (
    AGREED,
    SPARED,
    Identities,
    Outcome,
    RecordedRaces,
    compare_settings,
    label_of,
    matched_name,
    read_hits,
    replay,
)
from dsd.schedules.staged import staged
from dsd.store import digest
from tests.raced import LEVELS, few, synthetic_races


@pytest.fixture(scope="module")
def raced(params: Params) -> Params:
    return params.model_copy(
        update={
            "races": few(params.races).model_copy(update={"datasets": {"scenes-cls": ("denoising",)}}),
            "datasets": {"scenes-cls": params.datasets["scenes-com"]},
        }
    )


def compared(params: Params, choosing: int, measured: int) -> tuple[dict[str, Course], dict[str, Any]]:
    races = synthetic_races(50), synthetic_races(choosing, seed=2), synthetic_races(measured, seed=1)
    return compare_settings(*races, params.races, params.evaluate, params.seed)


@pytest.fixture(scope="module")
def comparison(raced: Params) -> tuple[dict[str, Course], dict[str, Any]]:
    return compared(raced, 200, 100)


def test_all_draws_agree_with_themselves() -> None:
    races = synthetic_races(20)
    outcome = replay(Course(list(range(8)), all_draws(8), None), races)
    assert outcome.agrees.all() and (outcome.share == 1).all()
    assert outcome.hits.tolist() == [values.mean(1).argmax() == 0 for values in races.values]


def test_a_replay_takes_draws_in_the_order_of_the_course() -> None:
    races = synthetic_races(5)
    last = replay(Course([7, 6], staged((3, 1), (1, 2)), None), races)
    assert last.share == pytest.approx([(12 + 3) / 96] * 5)
    assert last.winners.tolist() == [
        max(np.argsort(-v[:, 7], kind="stable")[:3].tolist(), key=lambda c: v[c, 6] + v[c, 7])
        for v in races.values
    ]  # fmt: skip


def test_every_prefix_is_spread_over_the_levels(params: Params) -> None:
    order = spread_order(params.races.model_copy(update={"levels": tuple(range(8)), "draws_per_level": 4}))
    assert sorted(order) == list(range(32))
    assert [k // 4 for k in order[:8]] == [4, 2, 6, 1, 5, 3, 7, 0] and {k % 4 for k in order[:8]} == {0}


def test_directions() -> None:
    orders = {side: [k // 2 for k in directed_order(side, LEVELS, 1, 2)] for side in ("clean", "noisy", "middle")}
    assert orders == {"clean": [0, 1, 2, 3], "noisy": [3, 2, 1, 0], "middle": [1, 2, 0, 3]}
    assert directed_order("clean", LEVELS, 2, 2) == list(range(8))


def test_the_cheapest_at_each_rate_of_disagreement_is_chosen(
    raced: Params, comparison: tuple[dict[str, Course], dict[str, Any]]
) -> None:
    chosen, results = comparison
    floor, reached = results["chosen"][ALL_DRAWS], 0
    for label in ("exhaustive", "staged", "hierarchical", "racing", "racing, clip-zero-shot first"):
        own = [run for run in results["runs"] if label_of(run["schedule"], run["setting"]) == label]
        for rate in raced.races.within:
            kept = [run for run in own if run["validation"]["disagreement"] <= rate]
            assert (matched_name(label, rate) in chosen) == bool(kept)
            if kept:
                setting = results["chosen"][matched_name(label, rate)]["setting"]
                chosen_one = next(run for run in kept if run["setting"] == setting)["validation"]
                assert chosen_one["evaluations"] == min(run["validation"]["evaluations"] for run in kept)
            reached += bool(kept)
    assert 5 < reached < 10 and "staged, within 2 %" not in chosen  # it never disagrees so little
    assert floor["share"]["value"] == 1 and floor["difference"]["value"] == 0 and floor["disagreement"]["value"] == 0
    calibrated = [results["chosen"][name] for name in chosen if "δ" in name]
    assert len(calibrated) == 4 and all(row["disagreement"]["low"] <= 0.1 for row in calibrated)
    assert results["races"] == {"train": 50, "validation": 200, "test": 100}
    assert [len(row["each"]["hits"]) for row in results["chosen"].values()] == [100] * len(chosen)
    json.dumps(results)


def test_a_budget_is_in_force_while_racing_is_calibrated(
    comparison: tuple[dict[str, Course], dict[str, Any]],
) -> None:
    chosen, results = comparison
    for name, course in chosen.items():
        budget = results["chosen"][name]["setting"].get("budget")
        assert course.budget == budget
        if budget:  # of 12 candidates; the proposer's scores cost 1.5 evaluations more
            most = max(float(taken) for taken in results["chosen"][name]["each"]["evaluations"].split())
            assert most <= 12 * budget + 1.5
    assert {course.budget for course in chosen.values()} == {None, 5.0}


def test_every_cost_includes_that_of_the_proposer(raced: Params) -> None:
    races = synthetic_races(20)
    schedule = shortlisted(all_draws(8), 2)
    course = Course(list(range(8)), schedule, "clip-zero-shot")
    outcome, free = replay(course, races), replay(course, races._replace(costs={"clip-zero-shot": 0.0}))
    assert free.share == pytest.approx(16 / 96) and outcome.share == pytest.approx(17.5 / 96)
    assert outcome.means(8)["evaluations"] == pytest.approx(17.5 / 12)
    dear = replay(Course(list(range(8)), all_draws(8), "clip-zero-shot"), races)
    shares = dear.intervals(dear, races, raced.evaluate, raced.seed)["share"]
    assert shares["value"] == pytest.approx(97.5 / 96)  # more than all draws alone


def test_forecasts_are_fitted_on_other_races_than_those_that_choose(
    raced: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def spy(course: Course, races: RecordedRaces) -> Outcome:
        sizes.append(len(races.values))
        return replay(course, races)

    monkeypatch.setattr("dsd.schedules.replay.replay", spy)
    compared(raced, 60, 30)
    assert set(sizes) == {60, 30}  # none is replayed on the 50 that forecasts are fitted on


def test_settings_with_more_draws_than_there_are_are_left_out(raced: Params) -> None:
    greedy = raced.races.staged.model_copy(update={"first": (8,), "to_keep": ((5, 1),)})
    races = raced.races.model_copy(update={"staged": greedy})
    assert list(SCHEDULES["staged"].settings(raced.races)) and not list(SCHEDULES["staged"].settings(races))


def test_claims_of_the_second_paper_rest_on_the_published_setting(
    raced: Params, comparison: tuple[dict[str, Course], dict[str, Any]], tmp_path: Path
) -> None:
    examples = [MatchingExample(str(n), (str(n),), tuple("abcdefghijkl"), ((0, 0),), "all") for n in range(100)]
    _, results = comparison
    file = tmp_path / "scenes-cls.json"
    identity = {"key": "k", "settings": "s"}
    file.write_text(json.dumps({"denoising": {**identity, "examples": digest([e.id for e in examples]), **results}}))
    current = {"denoising": identity}
    hits = read_hits(file, current, HEADLINES["recall"], examples)
    text, clean = (hits[f"denoising, {published_name('clean', reading)}"] for reading in ("text", "listing"))
    assert set(clean) == {"top1", AGREED, SPARED} and clean["top1"][0].shape == (100,)
    share = results["chosen"][published_name("clean", "listing")]["share"]["value"]
    assert clean[SPARED][0].mean() == pytest.approx(1 - share)
    assert not read_hits(file, current, "top1", examples[:50])
    assert not read_hits(tmp_path / "none.json", current, "top1", examples)

    clip = METRICS["recall"](np.full(100, 2), ["all"] * 100)
    judged, measured = judge(
        raced, {"scenes-cls": DatasetHits("scenes-cls", examples, {"clip-zero-shot": clip, **hits}, {})}
    )
    assert set(judged) == {11, 12, 13, 14, 15}
    assert judged[12].verdict == "holds" and measured[13][0].difference.low > 0.1
    *kept, _, spared = measured[11]  # each in both readings of the paper
    whole = hits[f"denoising, {ALL_DRAWS}"]["top1"][0]
    for found, side in zip(kept, (text, clean), strict=False):
        assert found.difference.value == pytest.approx(side["top1"][0].mean() - whole.mean())
        assert found.condition.least == -0.04
    assert spared.difference.value == pytest.approx(clean[SPARED][0].mean()) and spared.condition.least == 0.42
    assert text[SPARED][0].mean() < clean[SPARED][0].mean()
    for found in measured[13]:  # a direction is compared in its own reading
        a, b = (str(side).split(", from ") for side in (found.condition.a, found.condition.b))
        assert a[0] == b[0] and a[1] == "clean" != b[1]

    names = [racing_name(0.1, p, budget) for p in (None, "clip-zero-shot") for budget in (None, 5.0)]
    assert [found.condition.a for found in measured[14]] == [f"denoising, {name}" for name in names]
    for found, name in zip(measured[14], names, strict=True):
        missed = results["chosen"][name]["disagreement"]["value"]
        assert found.difference.value == pytest.approx(-missed) and found.condition.least == -0.1
        assert found.difference.p == pytest.approx(binomtest(round(100 * missed), 100, 0.1).pvalue)
    # Racing against the schedules that disagree as often; staged never disagrees in at most 2 % of races.
    compared_ = [(found.condition.a, found.condition.b, found.condition.least) for found in measured[15]]
    assert compared_ == [
        ("denoising, racing, within 2 %", f"denoising, {ALL_DRAWS}", -0.04),
        ("denoising, racing, within 2 %", "denoising, hierarchical, within 2 %", 0.0),
        ("denoising, racing, within 20 %", f"denoising, {ALL_DRAWS}", -0.04),
        ("denoising, racing, within 20 %", "denoising, staged, within 20 %", 0.0),
        ("denoising, racing, within 20 %", "denoising, hierarchical, within 20 %", 0.0),
    ]
    own, other = (results["chosen"][name]["share"]["value"] for name in ("racing, within 20 %", "staged, within 20 %"))
    assert measured[15][3].difference.value == pytest.approx(other - own)


def test_the_promised_rates_are_tested_for_every_raced_method(
    raced: Params, comparison: tuple[dict[str, Course], dict[str, Any]], tmp_path: Path
) -> None:
    """A rate that the races do not support is no promise; a method without a comparison leaves the claim out."""
    examples = [MatchingExample(str(n), (str(n),), tuple("abcdefghijkl"), ((0, 0),), "all") for n in range(100)]
    identity, (_, results) = {"key": "k", "settings": "s"}, comparison
    refused = {name: row for name, row in results["chosen"].items() if name != "racing, δ = 0.1, budget 5"}
    stored = {**identity, "examples": digest([e.id for e in examples]), **results}
    file, current = tmp_path / "scenes-cls.json", {"denoising": identity, "dsd": identity}
    file.write_text(json.dumps({"denoising": stored, "dsd": {**stored, "chosen": refused}}))
    races = raced.races.model_copy(update={"datasets": {"scenes-cls": ("denoising", "dsd")}})
    params = raced.model_copy(update={"races": races})

    def tested(hits: Any) -> list[str]:
        _, measured = judge(params, {"scenes-cls": DatasetHits("scenes-cls", examples, hits, {})})
        return [str(found.condition.a) for found in measured.get(14, ())]

    hits = read_hits(file, current, "top1", examples)
    assert len(tested(hits)) == 4 + 3 and "dsd, racing, δ = 0.1, budget 5" not in tested(hits)
    assert not tested(read_hits(file, {"denoising": identity}, "top1", examples))


@pytest.mark.parametrize(
    "current", [{}, {"denoising": {"key": "other", "settings": "s"}}, {"denoising": {"key": "k", "settings": "other"}}]
)
def test_comparisons_made_with_other_params_are_left_out_and_named(
    current: Identities, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "scenes-cls.json"
    file.write_text(json.dumps({"denoising": {"key": "k", "settings": "s", "examples": digest([])}}))
    assert read_hits(file, current, "top1", []) == {}
    assert caplog.messages == [f"{file}: denoising was compared with other params, model or code: run `make races`"]
