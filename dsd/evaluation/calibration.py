"""Prior-calibrated scores of questions: an answer's score minus what it scores on images for which it is wrong.

A method can prefer some answers whatever the image (Zhao et al. 2021, "Calibrate Before Use"). An answer is the last
word of a text. Its prior is the mean, over the few-shot examples with stored evidence for which it is wrong, of its
score minus the mean score of all candidates of the example.

Shapes: I images, T texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dsd.config import EvaluateParams
from dsd.data.examples import MatchingExample
from dsd.datasets import benchmark
from dsd.evaluation.evaluate import ScoredSplit, forced_hits, headline_differences, ranked_hits, tables
from dsd.metrics import Hits
from dsd.statistics import Difference


def answer(text: str) -> str:
    """Return the answer in a question's text, its last word, in lower case."""
    return text.lower().split()[-1]


def priors(examples: Sequence[MatchingExample], scores: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the prior of each answer that is wrong for an example; `scores` are [I, T] of each."""
    relative: dict[str, list[float]] = {}
    for example, scores_IT in zip(examples, scores, strict=True):
        relative_IT = scores_IT - scores_IT.mean()
        for i, t in np.ndindex(relative_IT.shape):
            if (i, t) not in example.answer:
                relative.setdefault(answer(example.texts[t]), []).append(float(relative_IT[i, t]))
    return {word: float(np.mean(values)) for word, values in relative.items()}


def calibrated(
    examples: Sequence[MatchingExample], scores: Sequence[np.ndarray], prior: Mapping[str, float]
) -> list[np.ndarray]:
    """Return the scores [I, T] of each example minus the priors; an answer without one has their mean."""
    mean = float(np.mean(list(prior.values())))
    return [
        scores_IT - np.array([prior.get(answer(text), mean) for text in example.texts])
        for example, scores_IT in zip(examples, scores, strict=True)
    ]


def measure(
    scored: ScoredSplit, hits: Mapping[str, Mapping[str, Hits]], evaluate: EvaluateParams, seed: int
) -> dict[str, dict[str, Difference]]:
    """Return calibrated minus plain accuracy, paired: method → headline metric, and the forced one → difference.

    Empty unless the kind of dataset has `own_kind` and few-shot evidence is stored. Of the methods without a schedule
    that read evidence and fit no weights.

    Args:
        hits: hits and groups of the methods by metric.
    """
    kind, examples = scored.kind, scored.examples
    if benchmark(kind).own_kind is None or not scored.stored.few_shot:
        return {}
    few_shot, differences = scored.stored.on_few_shot(), dict[str, dict[str, Difference]]()
    for name, method in scored.methods.items():
        if method.has_schedule or method.fits_weights or not method.evidence_prompts:
            continue
        learned = tables(few_shot.examples, scored.scores(method, name, stored=few_shot))
        scores = calibrated(examples, scored.tables(name), priors(few_shot.examples, learned))
        mine = ranked_hits(kind, examples, scores) | forced_hits(kind, examples, scores, ranked_hits)
        differences[name] = headline_differences(kind, examples, mine, hits[name], evaluate, seed)
    return differences
