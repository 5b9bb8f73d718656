"""From evidence to metrics, and the whole way from raw pictures to metrics on tiny models."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dsd.config import CrossAttentionMethod, DenoisingMethod, Params
from dsd.data.draws import Draw
from dsd.data.examples import MatchingExample, Pair
from dsd.engine.score import score
from dsd.evaluation.evaluate import attention_scores, denoising_scores, evaluate, table, write_metrics
from dsd.scorers.evidence import UNCONDITIONAL, Evidence
from dsd.statistics import Interval
from dsd.training.loop import train


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


def test_attention_is_averaged_over_the_levels_of_the_method() -> None:
    both = attention_scores(by_hand(), cross_attention(0.2, 0.8), ["logsumexp"])
    assert both[Pair("i", "t")] == pytest.approx(3) and both[Pair("j", "t")] == pytest.approx(2)
    one = attention_scores(by_hand(), cross_attention(0.2), ["logsumexp"])
    assert one[Pair("i", "t")] < one[Pair("j", "t")]


def test_denoising_is_normalised_by_the_unconditional_error() -> None:
    method = DenoisingMethod(scorer="denoising", prompt="none", schedule="exhaustive", levels=(0.2, 0.8))
    scores = denoising_scores(by_hand(), method)
    assert scores[Pair("i", "t")] == pytest.approx((0.4 + 0.2) / 2)
    assert scores[Pair("j", "t")] == pytest.approx((0.1 + 0.0) / 2)


def test_table_is_images_by_texts() -> None:
    example = MatchingExample("x", ("i", "j"), ("a", "b"), ((0, 0), (1, 1)), "c")
    scores = {
        Pair(image, text): float(n) for n, (image, text) in enumerate([("i", "a"), ("i", "b"), ("j", "a"), ("j", "b")])
    }
    assert table(example, scores).tolist() == [[0, 1], [2, 3]]


def test_the_whole_way(params: Params, prepared: Path, cached: Path, tmp_path: Path) -> None:
    trained, scored = tmp_path / "train", tmp_path / "score"
    for method in params.training:
        list(train("scenes-com", method, params, prepared, cached, trained / method))
    counts = score("scenes-com", params, prepared, cached, trained, scored, split="test")
    assert counts["computed"] == counts["rows"] > 0
    results = {"scenes-com": evaluate("scenes-com", params, prepared, scored, tmp_path).results}
    assert list(results["scenes-com"]) == list(params.methods)
    write_metrics(results, tmp_path)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert set(metrics["scenes-com"]["dsd"]) == {"subject", "object", "predicate", "micro", "macro"}
    for row in metrics["scenes-com"].values():
        for value in row.values():
            assert 0 <= value["low"] <= value["value"] <= value["high"] <= 1 and value["n"] > 0
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert len(rows) == len(params.methods) * 5
    again = evaluate("scenes-com", params, prepared, scored, tmp_path / "again").results
    assert again == results["scenes-com"]
    assert (tmp_path / "again/scores/scenes-com.parquet").read_bytes() == (
        tmp_path / "scores/scenes-com.parquet"
    ).read_bytes()


def test_metrics_json_keeps_the_fixed_shape(tmp_path: Path) -> None:
    write_metrics({"d": {"m": {"top1": Interval(0.5, 0.4, 0.6, 10)}}}, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == {
        "d": {"m": {"top1": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}}
    }
