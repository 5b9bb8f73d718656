"""Ablations are reductions of evidence, and claims are judged by paired tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dsd.config import CrossAttentionMethod, Params
from dsd.data.draws import Draw
from dsd.data.examples import MatchingExample, Pair, read_examples
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.evaluation.ablations import ChangedMethod, ablate, mean, subsets, values, with_intervals, write
from dsd.evaluation.claims import (
    Condition,
    DatasetHits,
    Measured,
    Replicate,
    binding,
    judge,
    measure,
    stated,
    uncorrected,
)
from dsd.evaluation.claims import write as write_claims
from dsd.evaluation.evaluate import ScoredSplit, evaluate
from dsd.metrics import slots
from dsd.scorers.evidence import Evidence
from dsd.statistics import Difference
from dsd.training.loop import train, trainings

SENTENCES = 60


@pytest.fixture
def settings(params: Params) -> Params:
    """Enough resamples for small p-values."""
    return params.model_copy(update={"evaluate": params.evaluate.model_copy(update={"resamples": 1000})})


def examples() -> list[MatchingExample]:
    """Sentences with one example per slot."""
    return [
        MatchingExample(f"{n}/{slot}", (f"{n}a", f"{n}{slot}"), (f"sentence {n}",), ((0, 0),), slot)
        for n in range(SENTENCES)
        for slot in ("subject", "object", "predicate")
    ]


def answers(shares: dict[str, dict[str, float]], seed: int = 0) -> DatasetHits:
    """Methods with random hits at the given share of each slot."""
    rows, rng = examples(), np.random.default_rng(seed)
    hits = {}
    for method, by_slot in shares.items():
        right = np.array([rng.random() < by_slot[example.category] for example in rows])
        hits[method] = slots(np.where(right, 1, 2), [example.category for example in rows])
    return DatasetHits("scenes-com", rows, hits, {})


def uniform(share: float) -> dict[str, float]:
    return dict.fromkeys(("subject", "object", "predicate"), share)


def test_verdicts_of_a_clear_gain_a_clear_loss_and_no_difference(settings: Params) -> None:
    for ours, verdict in ((0.95, "holds"), (0.3, "contradicted"), (0.6, "not shown")):
        shares = {"dsd": uniform(ours), "dsd-zero-shot": uniform(0.6)}
        judged, measured = judge(settings, {"scenes-com": answers(shares)})
        assert judged[4].verdict == verdict
        assert len(measured[4]) == 5  # three slots and two averages
        assert judged[4].low <= judged[4].effect <= judged[4].high and 0 <= judged[4].p <= 1


def test_the_effect_of_a_claim_is_that_of_the_comparison_that_binds(settings: Params) -> None:
    shares = {"dsd": {"subject": 0.95, "object": 0.95, "predicate": 0.6}, "dsd-zero-shot": uniform(0.6)}
    judged, measured = judge(settings, {"scenes-com": answers(shares)})
    by_metric = {m.condition.metric: m.difference for m in measured[4]}
    assert judged[4].effect == by_metric["predicate"].value and judged[4].verdict == "not shown"
    assert by_metric["subject"].p < 0.05
    assert measured[4][judged[4].binding].condition.metric == "predicate"


def one_measured(value: float, p: float, least: float = 0.0) -> Measured:
    return Measured(
        Condition("d", f"{value}", "a", "b", least=least), Difference(value, value - 1, value + 1, p, 9), 0.0, [(0, 0)]
    )


@pytest.mark.parametrize(
    ("rows", "binds"),
    [
        # The largest p, not the smallest difference: a small gain on many examples is better shown.
        ([one_measured(0.02, 0.001), one_measured(0.1, 0.2)], 1),
        # The clearest failure, not the smallest difference.
        ([one_measured(-0.1, 0.4), one_measured(-0.02, 0.001), one_measured(0.3, 0.9)], 1),
        # A gain of 3 points that must exceed 5 fails; a loss of 2 points within a margin of 4 does not.
        ([one_measured(0.03, 0.01, least=0.05), one_measured(-0.02, 0.01, least=-0.04)], 0),
        ([one_measured(0.0, 1.0), one_measured(0.5, 0.1)], 0),
    ],
)
def test_the_comparison_that_binds(rows: list[Measured], binds: int) -> None:
    assert binding(rows) == binds


@pytest.mark.parametrize("ours", [0.95, 0.72, 0.66, 0.6, 0.5, 0.3])
def test_no_verdict_depends_on_the_number_of_resamples(settings: Params, ours: float) -> None:
    """All claims of image choices; their p can be as small as the data show."""
    shares = {"dsd": uniform(ours) | {"object": 0.6}, "dsd-zero-shot": uniform(0.6), "clip-finetune": uniform(0.4)}
    data = {"scenes-com": answers(shares | {"clip-prompt": uniform(0.55)})}
    found = []
    for resamples in (2000, 20000):
        evaluate = settings.evaluate.model_copy(update={"resamples": resamples})
        judged, measured = judge(settings.model_copy(update={"evaluate": evaluate}), data)
        verdicts = {number: (row.verdict, row.p, row.binding) for number, row in judged.items()}
        found.append((verdicts, [m.difference.p for rows in measured.values() for m in rows]))
    assert found[0] == found[1]
    if ours in (0.95, 0.3):
        assert min(found[0][1]) < 1 / 2001


def test_claims_without_results_are_left_out(settings: Params) -> None:
    judged, _ = judge(settings, {"scenes-com": answers({"dsd": uniform(0.8), "dsd-zero-shot": uniform(0.6)})})
    assert set(judged) == {4, 10}


def test_whole_methods_are_compared_over_all_samples_and_noise_sets(settings: Params) -> None:
    """A side that does not depend on a sample has the same hits; a replicate without a side does not count."""
    tuned = dict.fromkeys(("clip-finetune", "clip-prompt"), uniform(0.5))
    own = answers({"dsd": uniform(0.75), "dsd-zero-shot": uniform(0.6), **tuned})

    def replicate(sample: int, noise: int) -> Replicate:
        again = answers({"dsd": uniform(0.75 + 0.05 * sample)}, seed=9 * sample + noise)
        return Replicate(sample, noise, {**own.methods, **again.methods})

    others = [replicate(1, 0), replicate(2, 0), replicate(1, 1)]
    alone = Replicate(0, 1, {"dsd-zero-shot": own.methods["dsd-zero-shot"]})
    repeated = own._replace(replicates=[*others, alone, Replicate(3, 0, own.methods)])
    data = {"scenes-com": repeated}
    judged, measured = judge(settings, data)
    assert (judged[4].samples, judged[4].noise_sets, judged[4].replicates) == (3, 2, 4)
    assert (judged[10].samples, judged[10].noise_sets, judged[10].replicates) == (3, 2, 4)
    assert measured[4][0].replicates == [(0, 0), (1, 0), (2, 0), (1, 1)]
    zero_shot, of = own.methods["dsd-zero-shot"]["micro"][0], [own, *others]
    [micro] = [row for row in measured[4] if row.condition.metric == "micro"]
    expected = np.mean([one.methods["dsd"]["micro"][0].mean() for one in of]) - zero_shot.mean()
    assert micro.difference.value == pytest.approx(expected)
    assert judged[1].replicates == 4 and judge(settings, {"scenes-com": own})[0][4].replicates == 1
    assert judge(settings, {"scenes-com": own._replace(replicates=[alone])}) == judge(settings, {"scenes-com": own})
    unaffected = measure(Condition("scenes-com", "micro", "dsd-zero-shot", "clip-finetune"), data, settings)
    assert unaffected.replicates == [(0, 0)]


def test_slots_are_compared_within_sentences(settings: Params) -> None:
    data = {"scenes-com": answers({"dsd": {"subject": 0.95, "object": 0.95, "predicate": 0.4}})}
    measured = measure(Condition("scenes-com", "subject", "dsd", "dsd", "predicate"), data, settings)
    hits = data["scenes-com"].methods["dsd"]
    (right_n, [subject_n]), (_, [predicate_n]) = hits["subject"], hits["predicate"]
    assert measured.difference.value == pytest.approx(right_n[subject_n].mean() - right_n[predicate_n].mean())
    assert measured.difference.n == SENTENCES and measured.h > 0 and measured.difference.p < 0.01


def test_p_is_that_of_the_weakest_gain_or_of_the_clearest_loss_corrected(settings: Params) -> None:
    shares = {"dsd": {"subject": 0.95, "object": 0.85, "predicate": 0.2}, "dsd-zero-shot": uniform(0.6)}
    data = {"scenes-com": answers(shares)}
    measured = [measure(Condition("scenes-com", m, "dsd", "dsd-zero-shot"), data, settings) for m in shares["dsd"]]
    subject, obj, predicate = measured
    assert uncorrected([subject, obj]) == max(subject.difference.p, obj.difference.p)
    assert uncorrected(measured) == pytest.approx(3 * predicate.difference.p)


def test_claims_are_numbered_1_to_15(params: Params) -> None:
    assert list(stated(params, {"scenes-com": answers({"dsd": uniform(0.5)})})) == list(range(1, 16))


def test_without_the_zero_shot_twin_only_that_claim_is_left_out(params: Params) -> None:
    without = params.model_copy(update={"methods": {n: m for n, m in params.methods.items() if n != "dsd-zero-shot"}})
    assert set(judge(without, {"scenes-com": answers({"dsd": uniform(0.5)})})[0]) == {10}


def evidence(heads: int = 4, layers: int = 3) -> Evidence:
    attribution = np.random.default_rng(0).random((2, 2, layers, heads)).astype(np.float32) + 0.1
    attribution[..., 0, 2:] = 0  # the first layer has two heads
    attention = np.random.default_rng(1).random((2, 2, 1, layers, heads)).astype(np.float32)
    pairs = [Pair("i", "t"), Pair("j", "t")]
    error, names = np.zeros((2, 2), np.float32), [f"layer {n}" for n in range(layers)]
    return Evidence(pairs, [Draw(0.2, 0), Draw(0.6, 1)], attention, attribution, error, names, 256)


def test_subsets_choose_present_heads() -> None:
    chosen = list(subsets(evidence(), 3, 8, seed=0))
    assert all(mask.sum(-1).tolist() == [2, 3, 3] and not mask[0, 2:].any() for mask in chosen)
    assert len({mask.tobytes() for mask in chosen}) > 1
    again = list(subsets(evidence(), 3, 8, seed=0))
    assert all((a == b).all() for a, b in zip(chosen, again, strict=True))


def test_a_subset_of_all_heads_is_all_heads() -> None:
    (mask,) = subsets(evidence(), 4, 1, seed=0)
    assert (mask == (evidence().attribution > 0).any((0, 1))).all()


def test_hits_are_averaged_example_by_example() -> None:
    one, other = (slots(np.array(ranks), ["subject", "object", "predicate"]) for ranks in ([1, 2, 1], [2, 2, 1]))
    assert mean([one, other])["micro"][0].tolist() == [0.5, 0, 1]


def test_from_evidence_to_files(params: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    session, scored = Session("scenes-com", params, Folders(prepared, cached, tmp_path / "train")), tmp_path / "score"
    for training in trainings(params):
        list(train(session, training))
    score(session, scored, split="test")
    split = ScoredSplit.of("scenes-com", params, prepared, scored)
    results, hits = evaluate("scenes-com", split, params.evaluate, params.seed, tmp_path)
    variants = ablate(split, params.ablations, params.seed)
    ablated = with_intervals(split.examples, variants, params.evaluate, params.seed)
    changes = list(values(params.ablations, CrossAttentionMethod.ablation_keys))
    assert len(variants) == 2 * len(changes) + len(params.ablations.parts)
    # The unchanged value of a key gives the result of the method.
    assert ablated["dsd-plus"]["parts"]["denoising, prompted-attention"] == results["dsd-plus"]
    for method in ("dsd-zero-shot", "dsd"):
        assert ablated[method]["pooling"]["logsumexp"] == ablated[method]["layers"]["all"] == results[method]
    write({"scenes-com": ablated}, tmp_path)
    written = json.loads((tmp_path / "ablations.json").read_text())
    assert set(written["scenes-com"]["dsd"]) == {"pooling", "heads", "layers", "levels"}
    assert set(written["scenes-com"]["dsd"]["heads"]["1 mean"]["micro"]) == {"value", "low", "high", "n"}

    rows = read_examples(prepared / "examples.parquet", "test")
    assert split.examples == rows
    judged, measured = judge(params, {"scenes-com": DatasetHits("scenes-com", rows, hits, variants)})
    assert set(judged) == {1, 4, 5, 6, 7, 8, 9, 10}
    layers = [m.condition.b for m in measured[5]]
    assert layers == [ChangedMethod("dsd", "layers", value) for value in ("2", "1")]
    write_claims(judged, measured, {}, tmp_path)
    claims = json.loads((tmp_path / "claims.json").read_text())
    keys = {"claim", "binding", "effect", "low", "high", "least", "p", "verdict", "samples", "noise_sets", "replicates"}
    assert all(set(row) == keys for row in claims.values())
    assert len(json.loads((tmp_path / "comparisons.json").read_text())["9"]) == len(params.ablations.levels) - 1
