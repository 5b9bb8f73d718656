"""From evidence to metrics, and all stages from raw images to metrics on tiny models."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from dsd.config import CrossAttentionMethod, DenoisingMethod, MethodParams, Params
from dsd.data.draws import Draw
from dsd.data.examples import MatchingExample, Pair
from dsd.engine.score import score
from dsd.engine.session import Folders, Session
from dsd.evaluation.evaluate import Results, ScoredSplit, evaluate, table, write_metrics
from dsd.scorers import SCORERS
from dsd.scorers.base import Scores, StoredEvidence
from dsd.scorers.evidence import UNCONDITIONAL, Evidence
from dsd.statistics import Interval
from dsd.training.loop import train, trainings


def by_hand() -> Evidence:
    pairs = [Pair("i", "t"), Pair("j", "t"), Pair("i", UNCONDITIONAL), Pair("j", UNCONDITIONAL)]
    attention = np.zeros((4, 2, 1, 1, 1), np.float32)
    attention[0, :, 0, 0, 0] = [1, 5]
    attention[1, :, 0, 0, 0] = [2, 2]
    error = np.array([[0.5, 0.4], [0.2, 0.1], [0.9, 0.6], [0.3, 0.1]], np.float32)
    ones = np.ones((4, 2, 1, 1), np.float32)
    return Evidence(pairs, [Draw(0.2, 0), Draw(0.8, 1)], attention, ones, error, ["mid_block.attentions.0"], 16)


def cross_attention(*levels: float) -> CrossAttentionMethod:
    return CrossAttentionMethod(
        scorer="cross-attention",
        prompt="none",
        schedule="exhaustive",
        levels=levels,
        pooling="logsumexp",
        layers="all",
        heads="mean",
    )


def scores(method: MethodParams) -> Scores:
    """The scores of the evidence by hand."""
    stored = SimpleNamespace(evidence={"none": by_hand()}.__getitem__, poolings=("logsumexp",))
    return SCORERS[method.scorer].scores("any", method, cast(StoredEvidence, stored))


def test_attention_is_averaged_over_the_levels_of_the_method() -> None:
    both = scores(cross_attention(0.2, 0.8))
    assert both[Pair("i", "t")] == pytest.approx(3) and both[Pair("j", "t")] == pytest.approx(2)
    one = scores(cross_attention(0.2))
    assert one[Pair("i", "t")] < one[Pair("j", "t")]


def test_denoising_is_normalised_by_the_unconditional_error() -> None:
    method = DenoisingMethod(scorer="denoising", prompt="none", schedule="exhaustive", levels=(0.2, 0.8))
    relative = scores(method)
    assert relative[Pair("i", "t")] == pytest.approx((0.4 + 0.2) / 2)
    assert relative[Pair("j", "t")] == pytest.approx((0.1 + 0.0) / 2)


def test_table_is_images_by_texts() -> None:
    example = MatchingExample("x", ("i", "j"), ("a", "b"), ((0, 0), (1, 1)), "c")
    by_pair = {
        Pair(image, text): float(n) for n, (image, text) in enumerate([("i", "a"), ("i", "b"), ("j", "a"), ("j", "b")])
    }
    assert table(example, by_pair).tolist() == [[0, 1], [2, 3]]


def test_all_stages(params: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    session, scored = Session("scenes-com", params, Folders(prepared, cached, tmp_path / "train")), tmp_path / "score"
    for training in trainings(params):
        list(train(session, training))
    counts = score(session, scored, split="test")
    assert counts["computed"] == counts["rows"] > 0

    def results_in(folder: Path) -> Results:
        split = ScoredSplit.of("scenes-com", params, prepared, scored)
        return evaluate("scenes-com", split, params.evaluate, params.seed, folder).results

    results = {"scenes-com": results_in(tmp_path)}
    assert list(results["scenes-com"]) == list(params.methods)
    write_metrics(results, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["scenes-com"]["dsd"]) == {"subject", "object", "predicate", "micro", "macro"}
    for row in metrics["scenes-com"].values():
        for value in row.values():
            assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1 and value["n"] > 0
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert len(rows) == len(params.methods) * 5
    assert results_in(tmp_path / "again") == results["scenes-com"]
    assert (tmp_path / "again/scores/scenes-com.parquet").read_bytes() == (
        tmp_path / "scores/scenes-com.parquet"
    ).read_bytes()


def test_metrics_json_keeps_the_fixed_shape(tmp_path: Path) -> None:
    write_metrics({"d": {"m": {"top1": Interval(0.5, 0.4, 0.6, 10)}}}, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "d": {"m": {"top1": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}}
    }
