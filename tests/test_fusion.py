"""The weighted sum of all evidence: its fit against other ways to the same answer, and its way through the stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from sklearn.linear_model import LogisticRegression

from dsd.config import FusionMethod, FusionParams, Params
from dsd.data.draws import Draw
from dsd.data.examples import MatchingExample, Pair
from dsd.engine.score import score
from dsd.errors import DataError
from dsd.evaluation.evaluate import evaluate
from dsd.scorers.evidence import UNCONDITIONAL, Evidence
from dsd.scorers.fusion import (
    Seen,
    _loss,
    _weights,
    contests,
    features,
    fit,
    fitted_on,
    fitting_examples,
    learn,
    narrowed,
    related,
    scores,
)
from dsd.training.loop import train

PARAMS = FusionParams(examples=100, candidates=4, folds=5, penalties=(0.001, 0.01, 0.1, 1.0, 10.0), denoising=1.0)


def problem(n: int, width: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contests of candidates of which the first feature tells most."""
    rng = np.random.default_rng(seed)
    values_nCF = rng.normal(size=(n, width, size))
    right_n = rng.integers(0, width, n)
    values_nCF[np.arange(n), right_n, 0] += 1.5
    return values_nCF, np.ones((n, width), bool), right_n


def test_two_candidates_are_a_logistic_regression_on_their_difference() -> None:
    values_nCF, there_nC, right_n = problem(200, 2, 3)
    penalty = 0.02
    difference = values_nCF[:, 1] - values_nCF[:, 0]
    # scikit-learn minimises ½|w|² + C Σ loss; ours is penalty |w|² + mean loss.
    oracle = LogisticRegression(C=1 / (2 * penalty * len(right_n)), fit_intercept=False, tol=1e-10)
    expected = oracle.fit(difference, right_n).coef_[0]
    assert _weights(values_nCF, there_nC, right_n, np.full(3, penalty)) == pytest.approx(expected, abs=1e-4)


def test_the_gradient_is_that_of_the_loss() -> None:
    values_nCF, there_nC, right_n = problem(30, 4, 5)
    there_nC[:10, 3] = False
    right_n[:10] %= 3
    start = np.random.default_rng(1).normal(size=5)

    def loss(weights: np.ndarray) -> float:
        return _loss(weights, values_nCF, there_nC, right_n, np.linspace(0, 0.1, 5))[0]

    def gradient(weights: np.ndarray) -> np.ndarray:
        return _loss(weights, values_nCF, there_nC, right_n, np.linspace(0, 0.1, 5))[1]

    assert check_grad(loss, gradient, start) < 1e-5


def test_the_unit_of_a_feature_is_of_no_account() -> None:
    values_nCF, _, right_n = problem(60, 3, 4)
    flat = values_nCF.reshape(-1, 4)
    asked = [([3 * n, 3 * n + 1, 3 * n + 2], int(right)) for n, right in enumerate(right_n)]
    plain = fit(list("abcd"), flat, asked, np.arange(len(asked)), PARAMS)
    scaled = fit(list("abcd"), flat * [1, 1000, 1e-6, 7], asked, np.arange(len(asked)), PARAMS)
    assert scaled.weights_F * [1, 1000, 1e-6, 7] == pytest.approx(plain.weights_F, rel=1e-3, abs=1e-5)
    assert np.abs(plain.weights_F).argmax() == 0


def test_what_all_candidates_share_gets_no_weight() -> None:
    values_nCF, _, right_n = problem(40, 2, 2)
    flat = values_nCF.reshape(-1, 2)
    flat[:, 1] = np.repeat(np.random.default_rng(2).random(40), 2)
    asked = [([2 * n, 2 * n + 1], int(r)) for n, r in enumerate(right_n)]
    fitted = fit(["told", "shared"], flat, asked, np.arange(40), PARAMS)
    assert fitted.weights_F[1] == 0 and fitted.weights_F[0] > 0


def test_noise_is_held_back_more_than_evidence() -> None:
    told, _, right = problem(80, 2, 30)
    asked = [([2 * n, 2 * n + 1], int(r)) for n, r in enumerate(right)]
    noise = np.random.default_rng(5).normal(size=(160, 30))
    names = list(map(str, range(30)))
    assert (
        fit(names, noise, asked, np.arange(len(asked)), PARAMS).penalty
        > fit(names, told.reshape(-1, 30), asked, np.arange(len(asked)), PARAMS).penalty
    )


def test_denoising_is_held_back_less() -> None:
    values_nCF, _, right_n = problem(60, 2, 2)
    values_nCF[..., 1] = values_nCF[..., 0]
    asked = [([2 * n, 2 * n + 1], int(r)) for n, r in enumerate(right_n)]
    less = PARAMS.model_copy(update={"denoising": 0.01})
    denoising, attention = fit(
        ["denoising", "attention"], values_nCF.reshape(-1, 2), asked, np.arange(len(asked)), less
    ).weights_F
    assert denoising == pytest.approx(100 * attention, rel=1e-2)


def example(images: int, texts: int, *answer: tuple[int, int]) -> MatchingExample:
    return MatchingExample(
        "x", tuple(f"i{n}" for n in range(images)), tuple(f"t {n}" for n in range(texts)), answer, "c"
    )


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 30), st.integers(2, 12), st.integers(0, 9), st.data())
def test_a_narrowed_example_keeps_its_answer(texts: int, most: int, seed: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, texts - 1))
    whole = example(1, texts, (0, right))
    few = narrowed(whole, most, seed)
    assert len(few.texts) == min(texts, most) and set(few.texts) <= set(whole.texts)
    assert few.texts[few.answer[0][1]] == whole.texts[right]
    assert narrowed(whole, most, seed) == few


def test_contests_are_what_the_test_asks() -> None:
    squares, choice = example(2, 2, (1, 0), (0, 1)), example(1, 3, (0, 2))
    pairs = [Pair(f"i{i}", f"t {t}") for i in range(2) for t in range(3)]
    assert list(contests([squares], pairs)) == [([0, 3], 1), ([1, 4], 0)]
    assert list(contests([choice], pairs)) == [([0, 1, 2], 2)]


def test_what_shares_a_picture_is_held_out_together() -> None:
    """Copies of a contest beside each other: only where they stay together does the fit see that they tell nothing."""

    def showing(*images: str) -> MatchingExample:
        return MatchingExample("x", images, ("t", "u"), ((0, 0), (1, 1)), "c")

    chain = [showing("a", "b"), showing("c", "d"), showing("b", "e"), showing("e", "f"), showing("g", "h")]
    assert related(chain).tolist() == [0, 0, 1, 1, 0, 0, 0, 0, 2, 2]
    assert list(np.repeat([0, 1], 2)) == related([showing("a", "b"), showing("c", "d")]).tolist()
    values = np.random.default_rng(0).normal(size=(40, 30)).repeat(5, 0).reshape(40, 5, 30).transpose(1, 0, 2)
    asked = [([2 * n, 2 * n + 1], n % 20 % 2) for n in range(100)]
    names, flat = list(map(str, range(30))), values.reshape(-1, 30)
    together, torn = np.arange(100) % 20, np.arange(100) // 20
    assert fit(names, flat, asked, together, PARAMS).penalty > fit(names, flat, asked, torn, PARAMS).penalty


def test_examples_that_all_share_a_picture_are_an_error(params: Params) -> None:
    one = [example(2, 2, (0, 0), (1, 1))] * 3
    plain, prompted = by_hand()
    with pytest.raises(DataError, match="raise few_shot"):
        learn(
            Seen([replace(e, images=("i", "j"), texts=("a b",), answer=((0, 0),)) for e in one], plain, prompted),
            method("denoising"),
            params,
        )


def by_hand() -> tuple[Evidence, Evidence]:
    """Two images, one text, two levels of one draw each, two layers of one head; with and without a prompt."""
    draws = [Draw(0.2, 0), Draw(0.6, 1)]
    asked = [Pair("i", "a b"), Pair("j", "a b")]
    alone = [Pair("i", UNCONDITIONAL), Pair("j", UNCONDITIONAL)]
    attention = np.arange(16, dtype=np.float32).reshape(4, 2, 1, 2, 1)
    error = np.array([[1, 2], [3, 4], [10, 20], [30, 40]], np.float32)
    ones = np.ones((4, 2, 2, 1), np.float32)
    plain = Evidence([*asked, *alone], draws, attention, ones, error, ["one", "two"], 256)
    # The prompted evidence lists the pairs the other way round.
    prompted = Evidence(asked[::-1], draws, attention[:2] + 100, ones[:2], error[:2] + 0.5, ["one", "two"], 256)
    return plain, prompted


def method(*parts: str) -> FusionMethod:
    return FusionMethod.model_validate(
        dict(
            scorer="fusion",
            prompt="few-shot",
            schedule="exhaustive",
            levels=(0.2, 0.6),
            pooling="logsumexp",
            heads="mean",
            parts=parts,
        )
    )


def test_features_by_hand() -> None:
    names, pairs, values = features(*by_hand(), method("attention", "denoising"), ["logsumexp"])
    assert pairs == [Pair("i", "a b"), Pair("j", "a b")]
    assert names[:3] == ["attention, level 0.2, layer 1", "attention, level 0.2, layer 2", "denoising, level 0.2"]
    assert values.tolist() == [[0, 1, 9, 2, 3, 18], [4, 5, 27, 6, 7, 36]]
    _, _, values = features(*by_hand(), method("prompted-attention", "prompted-denoising"), ["logsumexp"])
    assert values[0].tolist() == pytest.approx([104, 105, 10 - 3.5, 106, 107, 20 - 4.5])


def test_the_whole_way(params: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    trained, scored = tmp_path / "train", tmp_path / "score"
    for name in params.training:
        list(train("scenes-com", name, params, prepared, cached, trained / name))
    score("scenes-com", params, prepared, cached, trained, scored, split="test")
    evaluated = evaluate("scenes-com", params, prepared, scored, tmp_path)
    assert set(evaluated.results["dsd-plus"]) == {"subject", "object", "predicate", "micro", "macro"}
    row = params.methods["dsd-plus"]
    assert isinstance(row, FusionMethod)
    seen = fitted_on("scenes-com", params, prepared, scored)
    fitted = learn(seen, row, params)
    layers = len([name for name in fitted.names if name.startswith("prompted-attention, level 0.2")])
    assert len(fitted.names) == 2 * (layers + 1) and fitted.penalty in params.fusion.penalties
    assert np.isfinite(fitted.weights_F).all()
    assert (learn(seen, row, params).weights_F == fitted.weights_F).all()


def test_nothing_is_scored_for_a_fusion_that_is_not_there(params: Params, prepared: Path) -> None:
    assert fitting_examples(params, prepared)
    without = {name: row for name, row in params.methods.items() if not isinstance(row, FusionMethod)}
    assert fitting_examples(params.model_copy(update={"methods": without}), prepared) == []


def test_scores_are_the_weighted_sum() -> None:
    plain, prompted = by_hand()
    row = method("denoising")
    names, pairs, values = features(plain, prompted, row, ["logsumexp"])
    fitted = fit(names, values, [([0, 1], 1)] * 10, np.arange(10), PARAMS)
    found = scores(fitted, plain, prompted, row, ["logsumexp"])
    assert found == pytest.approx({pair: float(v @ fitted.weights_F) for pair, v in zip(pairs, values, strict=True)})
