"""The weighted sum of all evidence: its fit against other solvers, and a run through the stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad
from sklearn.linear_model import LogisticRegression

from dsd.config import FusionMethod, FusionParams, Params
from dsd.data.draws import Draw
from dsd.data.examples import MatchingExample, Pair, read_examples
from dsd.engine.score import planned, score
from dsd.engine.session import Folders, Session
from dsd.errors import DataError
from dsd.evaluation.evaluate import ScoredSplit, evaluate
from dsd.scorers.base import StoredEvidence
from dsd.scorers.evidence import UNCONDITIONAL, Evidence, fitting_entry, prompt_without
from dsd.scorers.fusion import (
    SCORER,
    _loss,
    _weights,
    contests,
    features,
    fit,
    fit_stored,
    fitting_examples,
    folds,
    narrowed,
    related,
)
from dsd.store import file_digest
from dsd.training.loop import Training, examples_of, train, trainings

PARAMS = FusionParams(
    examples=100, candidates=4, folds=5, penalties=(0.001, 0.01, 0.1, 1.0, 10.0), denoising=1.0, prompt_folds=2
)


def problem(n: int, width: int, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Contests of candidates; only the first feature is informative."""
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


def test_the_unit_of_a_feature_does_not_matter() -> None:
    values_nCF, _, right_n = problem(60, 3, 4)
    flat = values_nCF.reshape(-1, 4)
    rows = [([3 * n, 3 * n + 1, 3 * n + 2], int(right)) for n, right in enumerate(right_n)]
    plain = fit(list("abcd"), flat, rows, np.arange(len(rows)), PARAMS)
    scaled = fit(list("abcd"), flat * [1, 1000, 1e-6, 7], rows, np.arange(len(rows)), PARAMS)
    assert scaled.weights_F * [1, 1000, 1e-6, 7] == pytest.approx(plain.weights_F, rel=1e-3, abs=1e-5)
    assert np.abs(plain.weights_F).argmax() == 0


def test_a_feature_that_all_candidates_share_gets_no_weight() -> None:
    values_nCF, _, right_n = problem(40, 2, 2)
    flat = values_nCF.reshape(-1, 2)
    flat[:, 1] = np.repeat(np.random.default_rng(2).random(40), 2)
    rows = [([2 * n, 2 * n + 1], int(r)) for n, r in enumerate(right_n)]
    fitted = fit(["informative", "shared"], flat, rows, np.arange(40), PARAMS)
    assert fitted.weights_F[1] == 0 and fitted.weights_F[0] > 0


def test_noise_is_penalised_more_than_evidence() -> None:
    informative, _, right = problem(80, 2, 30)
    rows = [([2 * n, 2 * n + 1], int(r)) for n, r in enumerate(right)]
    noise = np.random.default_rng(5).normal(size=(160, 30))
    names = list(map(str, range(30)))
    assert (
        fit(names, noise, rows, np.arange(len(rows)), PARAMS).penalty
        > fit(names, informative.reshape(-1, 30), rows, np.arange(len(rows)), PARAMS).penalty
    )


def test_denoising_is_penalised_less() -> None:
    values_nCF, _, right_n = problem(60, 2, 2)
    values_nCF[..., 1] = values_nCF[..., 0]
    rows = [([2 * n, 2 * n + 1], int(r)) for n, r in enumerate(right_n)]
    less = PARAMS.model_copy(update={"denoising": 0.01})
    denoising, attention = fit(
        ["denoising", "attention"], values_nCF.reshape(-1, 2), rows, np.arange(len(rows)), less
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


def test_contests_are_over_images_where_there_are_several() -> None:
    squares, choice = example(2, 2, (1, 0), (0, 1)), example(1, 3, (0, 2))
    pairs = [Pair(f"i{i}", f"t {t}") for i in range(2) for t in range(3)]
    assert list(contests([squares], pairs)) == [([0, 3], 1), ([1, 4], 0)]
    assert list(contests([choice], pairs)) == [([0, 1, 2], 2)]


def test_contests_that_share_an_image_are_held_out_together() -> None:
    """Copies of contests of pure noise: only if copies share a fold does cross-validation choose a large penalty."""

    def showing(*images: str) -> MatchingExample:
        return MatchingExample("x", images, ("t", "u"), ((0, 0), (1, 1)), "c")

    chain = [showing("a", "b"), showing("c", "d"), showing("b", "e"), showing("e", "f"), showing("g", "h")]
    assert related(chain).tolist() == [0, 1, 0, 0, 2]
    assert folds(chain, 2) == [0, 1, 0, 0, 0] and folds(chain, 3) == [0, 1, 0, 0, 2]
    values = np.random.default_rng(0).normal(size=(40, 30)).repeat(5, 0).reshape(40, 5, 30).transpose(1, 0, 2)
    rows = [([2 * n, 2 * n + 1], n % 20 % 2) for n in range(100)]
    names, flat = list(map(str, range(30))), values.reshape(-1, 30)
    together, torn = np.arange(100) % 20, np.arange(100) // 20
    assert fit(names, flat, rows, together, PARAMS).penalty > fit(names, flat, rows, torn, PARAMS).penalty


class Given:
    """Evidence that is given rather than stored, without and with a prompt."""

    poolings, fusion = ("logsumexp",), PARAMS

    def __init__(
        self,
        evidence: tuple[Evidence, Evidence],
        few_shot: list[MatchingExample],
        few_shot_evidence: tuple[Evidence, Evidence],
    ) -> None:
        self.few_shot, self._evidence, self._few_shot_evidence = [few_shot], evidence, few_shot_evidence

    def evidence(self, prompt: str) -> Evidence:
        return self._evidence[prompt == "few-shot"]

    def few_shot_evidence(self, prompt: str) -> Evidence:
        return self._few_shot_evidence[prompt == "few-shot"]


def stored(few_shot: list[MatchingExample], few_shot_evidence: tuple[Evidence, Evidence]) -> StoredEvidence:
    return cast(StoredEvidence, Given(by_hand(), few_shot, few_shot_evidence))


def choice(*images: str) -> MatchingExample:
    """A choice among images, of which the second is right."""
    return replace(example(2, 1, (1, 0)), images=images, texts=("a b",))


def test_examples_that_all_share_an_image_are_an_error() -> None:
    with pytest.raises(DataError, match=r"fusion\.prompt_folds: 2, but there are 1 groups.*raise few_shot"):
        folds([choice("i", "j")] * 3, 2)


def by_hand() -> tuple[Evidence, Evidence]:
    """Two images, one text, two levels of one draw each, two layers of one head; with and without a prompt."""
    draws = [Draw(0.2, 0), Draw(0.6, 1)]
    pairs = [Pair("i", "a b"), Pair("j", "a b")]
    alone = [Pair("i", UNCONDITIONAL), Pair("j", UNCONDITIONAL)]
    attention = np.arange(16, dtype=np.float32).reshape(4, 2, 1, 2, 1)
    error = np.array([[1, 2], [3, 4], [10, 20], [30, 40]], np.float32)
    ones = np.ones((4, 2, 2, 1), np.float32)
    plain = Evidence([*pairs, *alone], draws, attention, ones, error, ["one", "two"], 256)
    # The prompted evidence lists the pairs in reverse order.
    prompted = Evidence(pairs[::-1], draws, attention[:2] + 100, ones[:2], error[:2] + 0.5, ["one", "two"], 256)
    return plain, prompted


def few_shot_by_hand() -> tuple[Evidence, Evidence]:
    """Four images, one text; at the second level the right images, j and l, have the lower relative error."""
    plain, _ = by_hand()
    pairs = [Pair(image, text) for text in ("a b", UNCONDITIONAL) for image in "ijkl"]
    error = np.array([[1, 2], [3, 1], [2, 2], [1, 1], [10, 20], [30, 40], [10, 20], [10, 30]], np.float32)
    attention, ones = np.ones((8, 2, 1, 2, 1), np.float32), np.ones((8, 2, 2, 1), np.float32)
    some = replace(plain, pairs=pairs, attention=attention, attribution=ones, error=error)
    return some, replace(some, pairs=pairs[:4], attention=attention[:4], attribution=ones[:4], error=error[:4])


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


def test_fusion_runs_through_all_stages(params: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    session, scored = Session("scenes-com", params, Folders(prepared, cached, tmp_path / "train")), tmp_path / "score"
    for training in trainings(params):
        list(train(session, training))
    score(session, scored, split="test")
    split = ScoredSplit.of("scenes-com", params, prepared, scored)
    evaluated = evaluate("scenes-com", split, params.evaluate, params.seed, tmp_path)
    assert set(evaluated.results["dsd-plus"]) == {"subject", "object", "predicate", "micro", "macro"}
    row = params.methods["dsd-plus"]
    assert isinstance(row, FusionMethod)
    fitted = fit_stored(row, split.stored)
    layers = len([name for name in fitted.names if name.startswith("prompted-attention, level 0.2")])
    assert len(fitted.names) == 2 * (layers + 1) and fitted.penalty in params.fusion.penalties
    assert np.isfinite(fitted.weights_F).all()
    again = ScoredSplit.of("scenes-com", params, prepared, scored).stored
    assert (fit_stored(row, again).weights_F == fitted.weights_F).all()


def test_weights_are_fitted_on_evidence_of_prompts_that_have_not_seen_the_examples(
    params: Params, prepared: Path, cached: Path, tmp_path: Path
) -> None:
    session = Session("scenes-com", params, Folders(prepared, cached, tmp_path))
    for training in (learned := trainings(params)):
        list(train(session, training))
    assert {t.folder for t in learned} > {"dsd", "dsd/without-0", "dsd/without-1"}
    assert len({file_digest(tmp_path / t.folder / "prompt.safetensors") for t in learned if t.method == "dsd"}) == 3
    parts = {part.entry: part for part in planned(session, "test")}
    for fold in range(2):
        part = parts[fitting_entry("few-shot", fold)]
        assert part.prompt == prompt_without(fold) != "few-shot"
        seen = {image for e in examples_of(session, Training("dsd", fold)) for image in e.images}
        fitted = {pair.image for shard in part.shards for pair, _ in shard.rows}
        assert fitted and seen and not fitted & seen
    assert parts["few-shot"].prompt == "few-shot" and parts[fitting_entry("none", 0)].prompt == "none"


def test_no_few_shot_example_is_scored_without_a_fusion(params: Params, prepared: Path) -> None:
    few_shot = read_examples(prepared / "examples.parquet", "train")
    fitting = fitting_examples(few_shot, params.methods, params.fusion, params.seed)
    assert len(fitting) == 2 and all(fitting)
    without = {name: row for name, row in params.methods.items() if not isinstance(row, FusionMethod)}
    assert fitting_examples(few_shot, without, params.fusion, params.seed) == []


def test_scores_are_the_weighted_sum() -> None:
    row = method("denoising")
    fitting = [choice("i", "j"), choice("k", "l")]
    source = stored(fitting, few_shot_by_hand())
    _, pairs, values = features(*by_hand(), row, ["logsumexp"])
    fitted = fit_stored(row, source)
    names, learned, learned_values = features(*few_shot_by_hand(), row, ["logsumexp"])
    by_fit = fit(names, learned_values, list(contests(fitting, learned)), related(fitting), PARAMS)
    assert (fitted.weights_F == by_fit.weights_F).all() and fitted.weights_F.any()
    scores = SCORER.scores("any", row, source)
    assert scores == pytest.approx({pair: float(v @ fitted.weights_F) for pair, v in zip(pairs, values, strict=True)})
