"""Races with a model: evidence at every draw, the same winners live as replayed, and user errors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsd.config import NoiseParams, Params
from dsd.data.examples import MatchingExample, Pair, pairs, read_examples
from dsd.engine.engine import Engine
from dsd.engine.races import RaceRunner, answer_index, independent, split_answers
from dsd.engine.score import score, score_raced
from dsd.engine.session import Folders, Session
from dsd.errors import DataError
from dsd.evaluation.evaluate import ScoredSplit, evaluate
from dsd.experiments.schedule_comparison import (
    compare_schedules,
    operations,
    proposing_cost,
    race_examples,
    recorded,
    run_live,
)
from dsd.report.races import note
from dsd.schedules.base import Course, shortlisted
from dsd.schedules.exhaustive import all_draws
from dsd.schedules.hierarchical import hierarchical
from dsd.schedules.replay import compare_settings, replay
from dsd.schedules.staged import staged
from dsd.scorers.evidence import UNCONDITIONAL, evidence_prompts, read_identities, read_ranks, write_index
from dsd.store import Store
from dsd.training.loop import Training, train
from tests.raced import few, synthetic_races

DATASET, K = "scenes-com", 8
EXAMPLES = [MatchingExample("0", ("i",), ("a", "b"), ((0, 0),), "all")]


@pytest.fixture
def raced(params: Params) -> Params:
    """Images are compared: denoising is relative to the unconditional pass of the image, attention is not."""
    races = few(params.races)
    racing = races.racing.model_copy(update={"deltas": (0.9,), "confidence": 0.5, "threshold": (1e9, 1.0)})
    update = {"datasets": {DATASET: ("denoising", "dsd-zero-shot")}, "racing": racing, "timed": 60}
    return params.model_copy(update={"races": races.model_copy(update=update)})


def compare(params: Params, folders: Folders, folder: Path) -> dict[str, object]:
    return compare_schedules(Session(DATASET, params, folders), folder / "draws", folder / "races")


def runner(params: Params, folders: Folders, method: str = "denoising") -> RaceRunner:
    return RaceRunner(Session(DATASET, params, folders), params.methods[method])  # type: ignore[arg-type]


def examples_of(of: RaceRunner) -> list[MatchingExample]:
    return split_answers(of.session.examples("test"))


@pytest.fixture
def folders(prepared: Path, cached: Path, tmp_path: Path) -> Folders:
    return Folders(prepared, cached, tmp_path / "train")


def test_values_are_those_of_single_passes(raced: Params, folders: Folders, tmp_path: Path) -> None:
    races = runner(raced, folders)
    examples = examples_of(races)
    values = races.collect(examples, Store(tmp_path / "draws"), "x")
    pair, draw = pairs(examples[2:3])[1], races.draws[5]
    rows = [(pair, draw), (Pair(pair.image, UNCONDITIONAL), draw)]
    error, nothing = races.session.engine("none").compute(rows)["error"]
    assert values[2].shape == (2, K) and values[2][1, 5] == pytest.approx(nothing - error, abs=1e-6)


def test_a_duplicate_of_the_right_answer_is_one_candidate_and_reported_as_a_tie(raced: Params) -> None:
    twice = MatchingExample("1", ("i",), ("a", "b", "a"), ((0, 0),), "all")
    assert len(pairs([twice])) == 2 and answer_index(twice) == -1
    races = synthetic_races(40)
    tied = races._replace(answers=[-1, *races.answers[1:]])
    _, results = compare_settings(races, races, tied, raced.races, raced.evaluate, raced.seed)
    assert results["ties"] == 1
    assert "In 1 no candidate is correct, or an incorrect one is identical" in note(results)


def test_nothing_is_computed_twice(
    raced: Params, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    races, store = runner(raced, folders), Store(tmp_path / "draws")
    examples = examples_of(races)
    first = races.collect(examples, store, "x")
    monkeypatch.setattr(Engine, "compute", None)
    again = races.collect(examples, store, "x")
    assert all((a == b).all() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("row", ["denoising", "dsd-zero-shot"])
@pytest.mark.parametrize(
    "course",
    [
        Course(list(range(K)), all_draws(K), None),
        Course([3, 1, 7, 0], staged((2, 1), (1, 4)), None),
        Course(list(range(K)), hierarchical(4, 2, 2, 3, reading="text", shrinking=False), None),
        Course([5, 2], shortlisted(all_draws(2), 1), "clip-zero-shot"),
    ],
)
@pytest.mark.parametrize("batch_size", [3, 50])
def test_live_races_end_as_replayed(
    row: str, course: Course, batch_size: int, raced: Params, folders: Folders, tmp_path: Path
) -> None:
    """In other batches, with rows of other races, and as races end at different times."""
    runtime = raced.runtime.model_copy(update={"batch_size": batch_size})
    raced = raced.model_copy(update={"runtime": runtime})
    live = runner(raced, folders, row)
    examples = examples_of(live)
    proposed = {"clip-zero-shot": live.session.proposals("clip-zero-shot", examples)}
    values = live.collect(examples, Store(tmp_path / "draws"), "x")
    races = recorded(examples, values, proposed, {"clip-zero-shot": 0.0})
    costs = run_live(live, course, examples, races, raced.races.timed)
    assert costs["differ"] == 0 and 1 <= costs["images"] <= len(examples)
    assert 0 < costs["fill"] <= 1 and costs["seconds"] > 0


def test_a_comparison_has_results_of_every_method(
    raced: Params, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare(raced, folders, tmp_path) == {"races": 2 * 6 + 1 + 9}
    comparisons = json.loads((tmp_path / "races" / f"{DATASET}.json").read_text())
    assert list(comparisons) == ["denoising", "dsd-zero-shot"]
    for method in comparisons.values():
        assert method["races"] == {"train": 12, "validation": 1, "test": 9} and method["draws"] == K
        assert all(row["live"]["differ"] == 0 for row in method["chosen"].values())

    score_raced(Session(DATASET, raced, folders), tmp_path / "races", tmp_path / "score", split="test")
    current = read_identities(tmp_path / "score")
    assert all(current[name].items() <= comparison.items() for name, comparison in comparisons.items())

    # Nothing has changed, so nothing is compared again.
    monkeypatch.setattr("dsd.experiments.schedule_comparison.compare_settings", None)
    compare(raced, folders, tmp_path)
    assert json.loads((tmp_path / "races" / f"{DATASET}.json").read_text()) == comparisons
    within = raced.races.model_copy(update={"within": (0.5,)})
    with pytest.raises(TypeError, match="not callable"):
        compare(raced.model_copy(update={"races": within}), folders, tmp_path)


def test_a_square_is_two_choices() -> None:
    square = MatchingExample("x", ("i", "j"), ("a", "b"), ((1, 0), (0, 1)), "all")
    assert split_answers([square]) == [
        MatchingExample("x/0", ("i", "j"), ("a",), ((1, 0),), "all"),
        MatchingExample("x/1", ("i", "j"), ("b",), ((0, 0),), "all"),
    ]
    assert [answer_index(choice) for choice in split_answers([square])] == [1, 0]


def test_the_index_of_the_right_pair_ignores_repeated_texts() -> None:
    example = MatchingExample("x", ("i",), ("a", "a", "b"), ((0, 2),), "all")
    assert pairs([example]) == [Pair("i", "a"), Pair("i", "b")] and answer_index(example) == 1
    assert answer_index(replace(example, answer=((0, 1),))) == -1  # a tie
    unanswerable = replace(example, answer=())
    assert split_answers([unanswerable]) == [unanswerable] and answer_index(unanswerable) == -1


def test_without_preparation_there_is_one_line(raced: Params, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"examples\.parquet: no such file; run `make reproduce` first"):
        compare(raced, Folders(tmp_path, tmp_path, tmp_path), tmp_path)


def test_an_error_rate_that_the_races_do_not_support_is_refused_with_the_smallest(
    raced: Params, folders: Folders, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One race of three: they share images. The other results stand, and a method that needs the rate is one line."""
    racing = raced.races.racing.model_copy(update={"deltas": (0.02, 0.96), "budget": (None,), "confidence": 0.95})
    races = raced.races.model_copy(update={"racing": racing, "datasets": {DATASET: ("denoising",)}})
    mine = raced.model_copy(update={"races": races})
    compare(mine, folders, tmp_path)
    line = "δ = 0.02 is refused, the smallest that can be guaranteed is 0.95: 0 of 1 races miss the winner of all draws"
    assert any(line in message for message in caplog.messages)
    results = json.loads((tmp_path / "races" / f"{DATASET}.json").read_text())["denoising"]
    assert "racing, δ = 0.96" in results["chosen"] and "racing, δ = 0.02" not in results["chosen"]
    assert [p["threshold"] is None for p in results["promised"][:2]] == [True, False]
    assert "racing, δ = 0.02: refused, the smallest δ that the races support is 0.950." in note(results)

    params = with_schedule(mine, racing={"kind": "racing", "delta": 0.02, "proposer": None, "budget": None})
    with pytest.raises(DataError, match=r"δ = 0\.02: refused; the smallest δ that .* support is 0\.95$"):
        score_raced(Session(DATASET, params, folders), tmp_path / "races", tmp_path / "score", split="test")


def test_calibration_uses_validation_races_that_share_no_image(raced: Params, folders: Folders) -> None:
    session = Session(DATASET, raced, folders)
    few_shot, validation, test = race_examples(session).values()
    ids = {split: {e.id.split("/")[0] for e in session.examples(split)} for split in ("train", "validation", "test")}
    for split, races in (("train", few_shot), ("validation", validation), ("test", test)):
        assert {e.id.split("/")[0] for e in races} <= ids[split]
    images = [image for example in validation for image in example.images]
    assert len(images) == len(set(images))
    few_races = raced.races.model_copy(update={"racing": raced.races.racing.model_copy(update={"learning": 2})})
    few_params = raced.model_copy(update={"races": few_races})
    assert len(race_examples(Session(DATASET, few_params, folders))["train"]) == 2
    with pytest.raises(ValueError, match="no two of one cluster"):
        some = synthetic_races(4)
        twice = some._replace(clusters=["a", "b", "a", "c"])
        compare_settings(some, twice, some, raced.races, raced.evaluate, raced.seed)


def test_independent_examples_are_random_and_share_neither_image_nor_sentence() -> None:
    questions = [MatchingExample(f"{n}", (f"i{n % 7}",), ("a", "b"), ((0, 0),), "all") for n in range(70)]
    chosen = independent(questions, 99, 0)
    assert sorted(e.images[0] for e in chosen) == [f"i{n}" for n in range(7)]
    assert chosen == independent(questions, 99, 0) != independent(questions, 99, 1)
    assert independent(questions, 3, 0) == chosen[:3]
    sentence = [MatchingExample(f"{n}", (f"p{n}", f"q{n}"), ("a red circle",), ((0, 0),), "all") for n in range(5)]
    chain = [MatchingExample(f"{n}", (f"p{n}", f"p{n + 1}"), (f"text {n}",), ((0, 0),), "all") for n in range(5)]
    assert len(independent(sentence, 9, 0)) == 1 and 2 <= len(independent(chain, 9, 0)) <= 3


def test_a_split_without_examples_is_one_line(raced: Params, folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Session, "examples", lambda self, split: [] if split == "validation" else EXAMPLES)
    with pytest.raises(DataError, match=r"^datasets\.scenes-com\.validation: no examples, and schedules are compared"):
        race_examples(Session(DATASET, raced, folders))


@pytest.mark.parametrize("tuned", ["none", "context"])
def test_the_cost_of_a_proposer_is_that_of_its_encodings(raced: Params, folders: Folders, tuned: str) -> None:
    """Each distinct image and text once; with a context that depends on the image, each text for each image."""
    name = {"none": "clip-zero-shot", "context": "clip-prompt"}[tuned]
    of, texts = runner(raced, folders, "dsd-zero-shot"), {"none": 2, "context": 4}[tuned]
    example, *_ = examples_of(of)
    words = of.session.texts[1:3]
    pair = [replace(example, id=f"{n}", texts=(text,)) for n, text in enumerate(words)]
    clip = of.session.clip("embedded-clip")
    one = operations(lambda: clip.text_features(words[:1]))
    both = operations(lambda: clip.text_features(words))
    assert both == pytest.approx(2 * one) and one > 0
    image = operations(lambda: clip.image_features(np.zeros((1, 32, 32, 3), np.uint8)))
    evaluation = operations(lambda: of.session.engine("none").compute([(pairs([example])[0], of.draws[0])]))
    expected = (2 * image + texts * one) / evaluation / 2
    assert proposing_cost(of, name, pair) == pytest.approx(expected, rel=1e-6)


def test_values_that_are_not_finite_are_dropped_and_counted(raced: Params, folders: Folders, tmp_path: Path) -> None:
    races = runner(raced, folders)
    examples = examples_of(races)
    values = races.collect(examples, Store(tmp_path / "draws"), "x")
    values[0][0, 3] = np.nan
    outcome = replay(Course(list(range(K)), all_draws(K), None), recorded(examples, values, {}, {}))
    kept = np.delete(values[0], 3, 1).mean(1)
    assert outcome.winners[0] == kept.argmax()


def with_schedule(raced: Params, **rows: dict[str, object]) -> Params:
    """Methods `denoising-<row>` with these rows of `schedules`, and the methods that they need."""
    content = raced.model_dump(mode="json")
    kept = {name: content["methods"][name] for name in ("dsd-zero-shot", "dsd", "denoising", "clip-zero-shot")}
    levels = content["races"]["levels"]
    own = {f"denoising-{row}": {**kept["denoising"], "schedule": row, "levels": levels} for row in rows}
    content |= {"schedules": rows, "methods": kept | own, "training": {"dsd": content["training"]["dsd"]}}
    content["ablations"]["methods"] = ["dsd-zero-shot"]
    return Params.model_validate(content)


def test_methods_with_a_schedule_are_ranked_by_their_races(
    raced: Params, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(raced, folders, tmp_path)
    params = with_schedule(
        raced,
        staged={"kind": "staged", "to_keep": [2, 1], "n_samples": [2, 8], "shortlist": None, "budget": None},
        listed={
            "kind": "hierarchical",
            **raced.races.published.model_dump(),
            "direction": "clean",
            "reading": "listing",
            "shortlist": {"proposer": "clip-zero-shot", "keep": 1},
            "budget": None,
        },
        racing={"kind": "racing", "delta": 0.9, "proposer": "clip-zero-shot", "budget": None},
        cut={"kind": "staged", "to_keep": [2, 1], "n_samples": [2, 8], "shortlist": None, "budget": 3.0},
    )
    monkeypatch.setattr("dsd.engine.score.GROUP", 4)
    target = tmp_path / "score"
    session = Session(DATASET, params, folders)
    costs = score_raced(session, tmp_path / "races", target, split="test")
    assert costs["denoising-staged"] == 2 * 8 and costs["denoising-cut"] == 2 * 3
    examples = read_examples(folders.prepared / "examples.parquet", "test")
    assert costs["denoising-listed"] == 0  # one is left of two: nothing is computed
    proposed = session.proposals("clip-zero-shot", examples)
    winners = [place.argmin() for place in read_ranks(target, "denoising-listed", examples)]
    assert winners == [scores.argmax() for scores in proposed]
    values = runner(raced, folders).collect(examples, Store(tmp_path / "draws"), "x")
    places = read_ranks(target, "denoising-staged", examples)
    assert [place.argmin() for place in places] == [v.mean(1).argmax() for v in values]
    assert all(sorted(place.tolist()) == [1, 2] for place in read_ranks(target, "denoising-racing", examples))
    write_index(target, {}, [], 1, {})
    (example_table, *_) = ScoredSplit.of(DATASET, params, folders.prepared, target).tables("denoising-staged")
    assert example_table.ravel().tolist() == (-places[0]).tolist()

    monkeypatch.setattr(Engine, "compute", None)  # finished races are not run again
    again = score_raced(Session(DATASET, params, folders), tmp_path / "races", target, split="test")
    assert again == costs


def test_races_use_the_stored_evidence_of_the_same_draws(
    raced: Params, folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass is computed that a method without a schedule has stored at the same draws."""
    noise = NoiseParams(levels=raced.races.levels, draws_per_level=raced.races.draws_per_level, sample=0)
    rows = {"kind": "staged", "to_keep": [2, 1], "n_samples": [2, 8], "shortlist": None, "budget": None}
    params = with_schedule(raced, staged=rows)
    methods = {
        name: row.model_copy(update={"levels": noise.levels}) if hasattr(row, "levels") else row
        for name, row in params.methods.items()
        if name != "dsd"
    }
    params = params.model_copy(update={"noise": noise, "methods": methods})
    session = Session(DATASET, params, folders)
    alone = score_raced(session, tmp_path / "races", tmp_path / "alone", split="test")
    score(session, tmp_path / "score", split="test")
    monkeypatch.setattr(Engine, "compute", None)
    assert score_raced(session, tmp_path / "races", tmp_path / "score", split="test") == alone
    examples = read_examples(folders.prepared / "examples.parquet", "test")
    for one, other in zip(
        *(read_ranks(tmp_path / f, "denoising-staged", examples) for f in ("alone", "score")), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_all_methods_may_have_schedules_with_a_proposer(raced: Params, folders: Folders, tmp_path: Path) -> None:
    """They need no `make races` and store no evidence; a method with a schedule trains the prompt."""
    listed = {"kind": "staged", "to_keep": [2, 1], "n_samples": [2, 8], "budget": None}
    shortlist = {"proposer": "clip-zero-shot", "keep": 2}
    whole = with_schedule(raced, listed={**listed, "shortlist": shortlist})
    levels = whole.races.levels
    methods = {
        name: row.model_copy(update={"schedule": "listed", "levels": levels})
        for name, row in whole.methods.items()
        if name in ("dsd", "denoising")
    } | {"clip-zero-shot": whole.methods["clip-zero-shot"]}
    params = whole.model_copy(update={"methods": methods})
    assert params.prompted == "dsd" and not evidence_prompts(params.methods)
    session, target = Session(DATASET, params, folders), tmp_path / "score"
    list(train(session, Training("dsd")))
    assert score(session, target, split="test")["rows"] == 0
    costs = score_raced(session, tmp_path / "races", target, split="test")
    assert costs == {"dsd": 2 * 8, "denoising": 2 * 8}
    scored = ScoredSplit.of(DATASET, params, folders.prepared, target)
    results = evaluate(DATASET, scored, params.evaluate, params.seed, tmp_path / "evaluate").results
    assert list(results) == ["dsd", "denoising", "clip-zero-shot"]


def test_racing_without_a_comparison_is_one_line(raced: Params, folders: Folders, tmp_path: Path) -> None:
    raced = raced.model_copy(update={"races": raced.races.model_copy(update={"datasets": {DATASET: ("denoising",)}})})

    def race(delta: float, budget: float | None = None) -> float:
        params = with_schedule(raced, racing={"kind": "racing", "delta": delta, "proposer": None, "budget": budget})
        session = Session(DATASET, params, folders)
        return score_raced(session, tmp_path / "races", tmp_path / "score", split="test")["denoising-racing"]

    with pytest.raises(DataError, match=r"no races that denoising-racing could learn from"):
        race(0.9)
    compare(raced, folders, tmp_path)
    race(0.9)
    assert race(0.9, budget=5.0) <= 2 * 5
    with pytest.raises(ValueError, match=r"schedules\.racing\.budget: 2\.0 is not calibrated"):
        race(0.9, budget=2.0)
    with pytest.raises(ValueError, match=r"schedules\.racing\.delta: 0\.3 is not calibrated"):
        race(0.3)
    other = raced.model_copy(update={"seed": 5})
    with pytest.raises(DataError, match=r"no races that denoising-racing could learn from"):
        params = with_schedule(other, racing={"kind": "racing", "delta": 0.9, "proposer": None, "budget": None})
        score_raced(Session(DATASET, params, folders), tmp_path / "races", tmp_path / "other", split="test")
