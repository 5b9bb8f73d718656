"""Forced choice among the answers of a question's kind, and the accuracy of the texts alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from dsd.config import EvaluateParams, load
from dsd.data.examples import MatchingExample, Pair, pairs
from dsd.datasets import benchmark
from dsd.evaluation import blind, calibration
from dsd.evaluation.evaluate import ScoredSplit, forced_hits, random_hits, ranked_hits
from dsd.metrics import Hits, unforced
from tests.conftest import ROOT

EVALUATE = EvaluateParams(resamples=50, confidence=0.95)
VQA = "scenes-vqa"
ANSWERS = ("yes", "red", "no", "circle", "two", "blue", "three")


def question(
    number: int, text: str, answer: str | None, category: str, answers: tuple[str, ...] = ANSWERS
) -> MatchingExample:
    """One image, one question with all answers; without a right pair if `answer` is None."""
    right = () if answer is None else ((0, answers.index(answer)),)
    return MatchingExample(str(number), (f"image {number}",), tuple(f"{text} {a}" for a in answers), right, category)


def means(hits: dict[str, Hits]) -> dict[str, float]:
    return {metric: float(np.mean([hits_n[mask].mean() for mask in masks])) for metric, (hits_n, masks) in hits.items()}


def test_a_forced_choice_is_among_the_answers_of_the_kind() -> None:
    examples = [
        question(0, "is there a star ?", "no", "binary"),
        question(1, "is there a star ?", "yes", "binary"),
        question(2, "what colour is it ?", "blue", "colour"),
        question(3, "how many things are there ?", "two", "number"),
    ]
    # By answer: yes, red, no, circle, two, blue, three. The circle is always first.
    scores = [
        np.array([row], dtype=float)
        for row in ([1, 5, 2, 9, 0, 0, 0], [1, 5, 2, 9, 0, 0, 0], [8, 1, 8, 9, 8, 3, 8], [8, 8, 8, 9, 1, 8, 1])
    ]
    assert means(ranked_hits(VQA, examples, scores)) == {"binary": 0, "other": 0, "all": 0}
    # Right: no before yes, blue before red. Wrong: no before yes, and two tied with three.
    assert means(forced_hits(VQA, examples, scores, ranked_hits)) == pytest.approx(
        {"forced binary": 1 / 2, "forced other": 1 / 2, "forced all": 1 / 2}
    )
    chance = means(forced_hits(VQA, examples, [np.zeros((1, 7))] * 4, random_hits))
    assert chance == pytest.approx({"forced binary": 1 / 2, "forced other": 1 / 2, "forced all": 1 / 2})


def test_ranks_of_a_schedule_are_scores_like_others() -> None:
    """Methods with a schedule have minus the rank of each candidate."""
    examples = [question(0, "is it red ?", "no", "binary"), question(1, "what colour ?", "red", "colour")]
    scores = [-np.array([[7.0, 6, 3, 1, 2, 4, 5]]), -np.array([[1.0, 7, 3, 2, 4, 5, 6]])]
    assert means(forced_hits(VQA, examples, scores, ranked_hits)) == {
        "forced binary": 1,
        "forced other": 0,
        "forced all": 0.5,
    }


def test_kinds_without_questions_have_no_forced_choice() -> None:
    example = MatchingExample("r", ("i",), ("a", "b"), ((0, 0),), "above")
    assert forced_hits("scenes-ref", [example], [np.zeros((1, 2))], ranked_hits) == {}


def test_answers_of_vqav2_have_the_form_of_the_right_one() -> None:
    answers = ("yes", "no", "2", "20", "red and white", "left", "2 dogs")
    own_kind = benchmark("vqav2").own_kind
    assert own_kind is not None

    def own(answer: str | None, category: str) -> list[str]:
        example = question(0, "What is it? 2", answer, category, answers)
        return [answers[t] for t in own_kind(example)]

    assert own("no", "binary") == ["yes", "no"]
    assert own("20", "other") == ["2", "20"]
    assert own("left", "other") == ["red and white", "left", "2 dogs"]
    assert own(None, "binary") == ["yes", "no"]
    assert own(None, "other") == ["2", "20", "red and white", "left", "2 dogs"]


def test_a_question_without_right_answer_is_wrong_in_a_forced_choice_too() -> None:
    answers = ("yes", "no", "2", "3")
    examples = [question(0, "Is it?", None, "binary", answers), question(1, "How many?", "3", "other", answers)]
    scores = [np.array([[1.0, 2, 3, 4]])] * 2
    assert means(forced_hits("vqav2", examples, scores, ranked_hits)) == {
        "forced binary": 0,
        "forced other": 1,
        "forced all": 0.5,
    }
    equal = [np.zeros((1, 4))] * 2
    assert means(forced_hits("vqav2", examples, equal, random_hits))["forced all"] == pytest.approx(1 / 4)


def test_a_single_answer_of_the_kind_is_no_choice() -> None:
    answers = ("yes", "2", "left", "right")
    examples = [question(0, "Is it?", "yes", "binary", answers), question(1, "Where?", "left", "other", answers)]
    forced = means(forced_hits("vqav2", examples, [np.zeros((1, 4))] * 2, random_hits))
    assert forced == pytest.approx({"forced binary": 1 / 4, "forced other": 1 / 2, "forced all": 3 / 8})


def biased(count: int, first: int) -> list[MatchingExample]:
    """Questions whose wording gives their answer: cats are black and dogs are white."""
    return [
        question(
            first + n,
            f"what colour is the {('cat', 'dog')[n % 2]} ?" if n % 4 < 2 else "is there a cat ?",
            ("red", "blue")[n % 2] if n % 4 < 2 else "yes",
            "colour" if n % 4 < 2 else "binary",
        )
        for n in range(count)
    ]


def test_a_bias_of_the_texts_is_learned_on_the_few_shot_split() -> None:
    reason, hits = blind.blind_hits(VQA, biased(40, 0), biased(20, 100), seed=0)
    assert reason is None
    assert means(hits) == dict.fromkeys(("binary", "other", "all", "forced binary", "forced other", "forced all"), 1)


def test_the_score_is_that_of_naive_bayes_by_hand() -> None:
    """Right: "a x"; wrong: "a y". Words: a, x, y; pairs: (a, x), (a, y)."""
    score = blind.learn([MatchingExample("e", ("i",), ("a x", "a y"), ((0, 0),), "all")], seed=0)
    # log of ((1 + 1) / (2 + 3)) / ((1 + 1) / (2 + 3)) for a, (2 / 5) / (1 / 5) for x, (2 / 3) / (1 / 3) for (a, x).
    assert score("a x") == pytest.approx(2 * np.log(2)) and score("A x") == score("a x")
    assert score("a y") == pytest.approx(-2 * np.log(2))
    assert score("b") == 0.0  # an unknown word says nothing


def test_ties_of_the_baseline_are_broken_at_random() -> None:
    examples = [question(n, "is there a bird ?", "yes", "binary") for n in range(3)]
    examples += [question(9, "what ?", "two", "number")]
    few_shot = [replace(examples[0], texts=("q",) * 2, answer=((0, 0),))]  # no word of the candidates
    _, hits = blind.blind_hits(VQA, few_shot, examples, seed=0)
    assert means(hits)["all"] == pytest.approx(1 / 7) and means(hits)["forced binary"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("kind", "few_shot", "example", "reason", "level"),
    [
        ("comvg", 1, (("i", "j"), ("a",), ((0, 0),), "subject"), "the same text", 1 / 2),
        ("winoground", 1, (("i", "j"), ("a", "b"), ((0, 0), (1, 1)), "all"), "right for one of its images", 1 / 6),
        ("refcocog", 0, (("i",), ("a", "b", "c"), ((0, 2),), "all"), "no few-shot split", 1 / 3),
    ],
)
def test_the_baseline_says_why_it_is_at_chance(
    kind: str, few_shot: int, example: tuple[object, ...], reason: str, level: float
) -> None:
    one = MatchingExample("e", *example)  # type: ignore[arg-type]
    examples = [replace(one, category=slot) for slot in ("subject", "object", "predicate")]
    found, hits = blind.blind_hits(kind, examples[:few_shot], examples, seed=0)
    assert found is not None and reason in found
    values = means(hits)
    assert values["group" if kind == "winoground" else next(iter(values))] == pytest.approx(level)


def test_the_image_contributes_the_paired_difference(tmp_path: Path) -> None:
    test = biased(20, 100)
    wrong = [np.zeros((1, 7))] * len(test)
    right = [np.eye(7)[[e.answer[0][1]]] for e in test]
    every = {
        name: ranked_hits(VQA, test, scores) | forced_hits(VQA, test, scores, ranked_hits)
        for name, scores in (("wrong", wrong), ("right", right))
    }
    measured = blind.measure(VQA, biased(40, 0), test, every, {}, EVALUATE, seed=0)
    blind.write({"d": measured}, tmp_path)
    row = json.loads((tmp_path / "blind.json").read_text())["d"]
    assert row["reason"] is None and row["metrics"]["all"]["value"] == 1 and row["metrics"]["all"]["n"] == 20
    assert row["metrics"]["all"]["low"] < 1
    differences = row["differences"]
    assert set(differences["wrong"]) == {"all", "forced all"}
    assert differences["wrong"]["all"]["value"] == -1 and differences["right"]["forced all"]["value"] == 0
    assert differences["right"]["all"]["n"] == 20 and differences["right"]["all"]["p"] == 1


def test_claims_are_tested_among_all_candidates() -> None:
    test = biased(8, 0)
    scores = [np.eye(7)[[e.answer[0][1]]] for e in test]
    hits = ranked_hits(VQA, test, scores)
    assert unforced(hits | forced_hits(VQA, test, scores, ranked_hits)).keys() == hits.keys()


def test_a_preference_for_an_answer_is_learned_on_few_shot_images_and_taken_back() -> None:
    """The scorer likes "yes" whatever the image; beyond that it knows the right answer."""
    rng = np.random.default_rng(0)
    row = next(row for row in load(ROOT / "params.yaml").methods.values() if row.scorer == "denoising")
    few_shot, test = (
        [question(n + first, "is it so ?", str(rng.choice(ANSWERS[:3:2])), "binary", ANSWERS[:3]) for n in range(40)]
        for first in (0, 100)
    )
    test.append(question(999, "what colour ?", "red", "colour", ("yes", "red", "blue")))

    def scored(example: MatchingExample) -> np.ndarray:
        wrong = rng.normal(size=(1, 3)) * 0.1 + [[2.0, 0, 0]] + rng.normal() * 50  # images differ in level
        wrong[example.answer[0]] += 1
        return np.asarray(wrong)

    values = {e.id: scored(e) for e in few_shot + test}

    class Given:
        kind, examples, methods = VQA, test, {"m": row}
        stored = SimpleNamespace(few_shot=[few_shot], on_few_shot=lambda: SimpleNamespace(examples=few_shot))

        def scores(self, method: object, name: str, stored: object) -> dict[Pair, float]:
            return {pair: v for e in few_shot for pair, v in zip(pairs([e]), values[e.id][0].tolist(), strict=True)}

        def tables(self, name: str) -> list[np.ndarray]:
            return [values[e.id] for e in test]

    hits = {"m": ranked_hits(VQA, test, Given().tables("m")) | forced_hits(VQA, test, Given().tables("m"), ranked_hits)}
    gained = calibration.measure(cast(ScoredSplit, Given()), hits, EVALUATE, seed=0)
    assert set(gained["m"]) == {"all", "forced all"}
    right = float(np.mean([e.answer[0][1] == 0 for e in test]))
    # The colour is right without calibration too, if the choice is forced.
    assert gained["m"]["forced all"].value == pytest.approx(1 - right - 1 / 41) and gained["m"]["all"].low > 0
    assert calibration.priors(few_shot, [values[e.id] for e in few_shot])["yes"] > 0.9
    # An answer that was never wrong has the mean of the others.
    [own] = calibration.calibrated(test[:1], [np.zeros((1, 3))], {"yes": 3.0, "no": 1.0})
    assert own.tolist() == [[-3.0, -2.0, -1.0]]
