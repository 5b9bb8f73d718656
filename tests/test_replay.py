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
from dsd.schedules.base import Course, spread_order
from dsd.schedules.exhaustive import ALL_DRAWS, all_draws
from dsd.schedules.hierarchical import directed_order, published_name
from dsd.schedules.racing import racing_name
from dsd.schedules.replay import AGREED, SPARED, Identities, Outcome, RecordedRaces, compare_settings, read_hits, replay
from dsd.schedules.staged import staged
from dsd.store import digest
from tests.raced import LEVELS, few, synthetic_races


@pytest.fixture(scope="module")
def raced(params: Params) -> Params:
    return params.model_copy(
        update={"races": few(params.races).model_copy(update={"datasets": {"scenes-cls": ("denoising",)}})}
    )


def compared(params: Params, learning: int, measured: int) -> tuple[dict[str, Course], dict[str, Any]]:
    races = synthetic_races(learning), synthetic_races(measured, seed=1)
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


def test_the_cheapest_that_agrees_with_all_draws_is_chosen(
    raced: Params, comparison: tuple[dict[str, Course], dict[str, Any]]
) -> None:
    chosen, results = comparison
    floor = results["chosen"][ALL_DRAWS]
    for schedule in ("exhaustive", "staged", "hierarchical"):
        own = [run for run in results["runs"] if run["schedule"] == schedule]
        chosen_one = next(run for run in own if run["setting"] == results["chosen"][schedule]["setting"])["train"]
        kept = [run["train"] for run in own if run["train"]["disagreement"] <= raced.races.within]
        least = min(run["train"]["disagreement"] for run in own)
        rivals = kept or [run["train"] for run in own if run["train"]["disagreement"] == least]
        assert chosen_one["evaluations"] == min(run["evaluations"] for run in rivals)
    assert floor["share"]["value"] == 1 and floor["difference"]["value"] == 0 and floor["disagreement"]["value"] == 0
    calibrated = [results["chosen"][name] for name in chosen if "δ" in name]
    assert len(calibrated) == 2 and all(row["disagreement"]["low"] <= 0.1 for row in calibrated)
    assert results["races"] == {"train": 200, "calibration": 150, "test": 100}
    assert [len(row["each"]["hits"]) for row in results["chosen"].values()] == [100] * len(chosen)
    json.dumps(results)


def test_racing_is_not_chosen_on_the_races_that_it_was_fitted_on(
    raced: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def spy(course: Course, races: RecordedRaces) -> Outcome:
        sizes.append(len(races.values))
        return replay(course, races)

    monkeypatch.setattr("dsd.schedules.replay.replay", spy)
    compared(raced, 60, 30)
    assert set(sizes) == {60, 30, 45}


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
    clean = hits[f"denoising, {published_name('clean')}"]
    assert set(clean) == {"top1", AGREED, SPARED} and clean["top1"][0].shape == (100,)
    assert clean[SPARED][0].mean() == pytest.approx(1 - results["chosen"][published_name("clean")]["share"]["value"])
    assert not read_hits(file, current, "top1", examples[:50])
    assert not read_hits(tmp_path / "none.json", current, "top1", examples)

    clip = METRICS["recall"](np.full(100, 2), ["all"] * 100)
    judged, measured = judge(
        raced, {"scenes-cls": DatasetHits("scenes-cls", examples, {"clip-zero-shot": clip, **hits}, {})}
    )
    assert set(judged) == {11, 12, 13, 14, 15}
    assert judged[12].verdict == "holds" and measured[13][0].difference.low > 0.1
    kept, spared = measured[11]
    whole, pruned = hits[f"denoising, {ALL_DRAWS}"]["top1"][0], clean["top1"][0]
    assert kept.difference.value == pytest.approx(pruned.mean() - whole.mean() + 0.04)
    assert spared.difference.value == pytest.approx(clean[SPARED][0].mean() - 0.42)

    names = [racing_name(0.1, None), racing_name(0.1, "clip-zero-shot")]
    assert [found.comparison.a for found in measured[14]] == [f"denoising, {name}" for name in names]
    for found, name in zip(measured[14], names, strict=True):
        missed = results["chosen"][name]["disagreement"]["value"]
        assert found.difference.value == pytest.approx(0.1 - missed)
        assert found.difference.p == pytest.approx(binomtest(round(100 * missed), 100, 0.1).pvalue)
    accurate, *thrifty = measured[15]
    assert accurate.comparison[1:] == ("top1", "denoising, racing", f"denoising, {ALL_DRAWS}", None, -0.04)
    for found, other in zip(thrifty, ("staged", "hierarchical"), strict=True):
        shares = [results["chosen"][name]["share"]["value"] for name in (other, "racing")]
        assert found.difference.value == pytest.approx(shares[0] - shares[1])


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
