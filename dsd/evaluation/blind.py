"""The blind baseline: the accuracy that the candidate texts alone give, without the image.

A naive Bayes model of right against wrong texts, learned on the few-shot split, scores every candidate text: the sum
over its words w of log P(w | right) − log P(w | wrong), and the same over its pairs (w, last word), since the last word
of a question's text is the answer. The probabilities are frequencies with Laplace smoothing. What a method adds to this
accuracy is what the image contributes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum, log
from pathlib import Path

import numpy as np

from dsd.config import EvaluateParams
from dsd.data.examples import MatchingExample
from dsd.evaluation.evaluate import forced_hits, headline_differences, intervals, random_hits
from dsd.metrics import Hits
from dsd.scorers.fusion import narrowed
from dsd.statistics import Difference, Interval
from dsd.store import write_json

CANDIDATES = 64  # texts per few-shot example that are learned from: all right ones, and wrong ones at random
DIGITS = 9  # scores are rounded, so that texts with the same features in another order tie
FILE = "blind.json"


@dataclass(frozen=True)
class Blind:
    """The baseline of a dataset.

    reason: why its accuracy is chance whatever the texts; None if it learned from them.
    metrics: metric → interval.
    differences: method → headline metric, and the forced one if there is one → method minus baseline, paired.
    calibrated: method → the same metrics → prior-calibrated minus plain score; see `dsd.evaluation.calibration`.
    """

    reason: str | None
    metrics: dict[str, Interval]
    differences: dict[str, dict[str, Difference]]
    calibrated: dict[str, dict[str, Difference]]


def features(text: str) -> tuple[list[str], list[str]]:
    """Return the words of a text, in lower case, and their pairs with the last word."""
    words = text.lower().split()
    return words, [f"{word} {words[-1]}" for word in words[:-1]]


def learn(few_shot: Iterable[MatchingExample], seed: int) -> Callable[[str], float]:
    """Return the log-likelihood ratio of a text being right, learned on the texts of the few-shot examples."""
    right, wrong = (Counter[str](), Counter[str]()), (Counter[str](), Counter[str]())  # of words and of pairs
    for example in few_shot:
        chosen = narrowed(example, CANDIDATES, seed)
        answers = {t for _, t in chosen.answer}
        for t, text in enumerate(chosen.texts):
            for counts, values in zip(right if t in answers else wrong, features(text), strict=True):
                counts.update(values)
    ratios = [_log_ratios(*counts) for counts in zip(right, wrong, strict=True)]

    def score(text: str) -> float:
        parts = zip(ratios, features(text), strict=True)
        return round(fsum(known.get(value, 0.0) for known, values in parts for value in values), DIGITS)

    return score


def _log_ratios(right: Counter[str], wrong: Counter[str]) -> dict[str, float]:
    """Return log P(value | right) − log P(value | wrong) of each value, with Laplace smoothing over all of them."""
    values = right.keys() | wrong.keys()
    totals = [sum(counts.values()) + len(values) for counts in (right, wrong)]
    return {v: log((right[v] + 1) / totals[0]) - log((wrong[v] + 1) / totals[1]) for v in values}


def blind_hits(
    kind: str, few_shot: Sequence[MatchingExample], examples: Sequence[MatchingExample], seed: int
) -> tuple[str | None, dict[str, Hits]]:
    """Return why the baseline is at chance, if it is, and its expected hits of every metric, ties in random order."""
    reason = chance_reason(few_shot, examples)
    scores = [np.zeros((len(e.images), len(e.texts))) for e in examples]
    if reason is None:
        score = learn(few_shot, seed)
        for example, scores_IT in zip(examples, scores, strict=True):
            scores_IT[:] = [score(text) for text in example.texts]
    return reason, random_hits(kind, examples, scores) | forced_hits(kind, examples, scores, random_hits)


def chance_reason(few_shot: Sequence[MatchingExample], examples: Sequence[MatchingExample]) -> str | None:
    """Return why texts alone cannot be better than chance on these examples; None if they can."""
    if all(len(example.texts) == 1 for example in examples):
        return "all candidates of an example have the same text"
    if any(len(example.images) > 1 and len(example.texts) > 1 for example in examples):
        return "every text of an example is right for one of its images"
    return None if few_shot else "there is no few-shot split to learn from"


def measure(
    kind: str,
    few_shot: Sequence[MatchingExample],
    examples: Sequence[MatchingExample],
    hits: Mapping[str, Mapping[str, Hits]],
    calibrated: dict[str, dict[str, Difference]],
    evaluate: EvaluateParams,
    seed: int,
) -> Blind:
    """Return the baseline on the examples, and how much higher each method is.

    Args:
        hits: hits and groups of the methods by metric.
        calibrated: of `dsd.evaluation.calibration.measure`.
    """
    reason, own = blind_hits(kind, few_shot, examples, seed)
    differences = {
        method: headline_differences(kind, examples, by_metric, own, evaluate, seed)
        for method, by_metric in hits.items()
    }
    return Blind(reason, intervals(examples, own, evaluate, seed), differences, calibrated)


def write(baselines: Mapping[str, Blind], target: Path) -> None:
    """Write `blind.json`: dataset → `Blind`."""
    write_json(target / FILE, baselines, indent=2)
