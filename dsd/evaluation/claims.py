"""Tests of the claims of the two papers, and of two of our own, by paired differences.

A claim is a set of comparisons on the test split that must all be true: each difference must exceed a least value. The
comparison that binds is the one with the least evidence for the claim. If p, corrected for the comparisons of the claim
and the number of claims, is below 1 − confidence, the claim holds (the binding difference is above its least value) or
is contradicted (below). Otherwise it is not shown. Whole methods are compared over all few-shot samples and noise sets
that they were measured with (`Replicate`), ablations and races with those of params.yaml alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dsd.config import CrossAttentionMethod, Params
from dsd.data.examples import MatchingExample
from dsd.datasets import benchmark
from dsd.evaluation.ablations import ChangedMethod, values
from dsd.metrics import Hits
from dsd.schedules.exhaustive import ALL_DRAWS
from dsd.schedules.hierarchical import CLEAN, DIRECTIONS, READINGS, published_name
from dsd.schedules.racing import racing_name
from dsd.schedules.replay import AGREED, SPARED, label_of, matched_name
from dsd.statistics import Difference, Groups, Resampling, cohens_h, holm, replicated_difference
from dsd.store import write_json

ByMetric = dict[str, Hits]
Side = str | ChangedMethod  # a method, or a method with one key changed
ClaimVerdict = Literal["holds", "not shown", "contradicted"]
TASKS = {  # task → kinds of datasets
    "matching": ("scenes-com", "comvg", "visual-genome"),
    "referring": ("scenes-ref", "refcocog"),
    "answering": ("scenes-vqa", "vqav2"),
    "classifying": ("scenes-cls", "cifar10", "stl10", "fgvc-aircraft"),
}
PAPER = "paper"  # the study with the paper's number of few-shot examples
MARGIN = 0.04  # an accuracy lower by up to this much counts as kept or comparable
ABOUT_HALF = 0.42  # of the evaluations: the smallest reduction in the second paper's Table 1, from 19 to 11 hours


class Replicate(NamedTuple):
    """The hits of methods with one few-shot sample and one noise set."""

    sample: int
    noise: int
    methods: Mapping[str, dict[str, Hits]]


class DatasetHits(NamedTuple):
    """The test examples of a dataset, and the hits of each method and variant on them.

    replicates: the same methods with other few-shot samples and noise sets, where they were measured.
    """

    kind: str
    examples: list[MatchingExample]
    methods: dict[str, dict[str, Hits]]
    variants: dict[ChangedMethod, dict[str, Hits]]
    replicates: Sequence[Replicate] = ()

    @property
    def metrics(self) -> list[str]:
        return list(next(iter(self.methods.values())))

    def of(self, side: Side) -> dict[str, Hits] | None:
        """Return the hits by metric, or None if the side was not evaluated."""
        return self.methods.get(side) if isinstance(side, str) else self.variants.get(side)

    def measured(self, a: Side, b: Side, own: tuple[int, int]) -> dict[tuple[int, int], tuple[ByMetric, ByMetric]]:
        """Return (few-shot sample, noise set) → hits of both sides, which were evaluated; `own` are those of `methods`.

        A replicate in which neither side has other hits than in one before it is left out.
        """
        one, other = self.of(a), self.of(b)
        assert one is not None and other is not None  # `judge` checks it
        pairs = {own: (one, other)}
        for sample, noise, methods in self.replicates:
            if isinstance(a, str) and isinstance(b, str) and a in methods and b in methods:
                pair = methods[a], methods[b]
                if not any(pair[0] is x and pair[1] is y for x, y in pairs.values()):
                    pairs.setdefault((sample, noise), pair)
        return pairs


class Condition(NamedTuple):
    """What a comparison must show: a on `metric`, minus b on it or on `against` if that is set, exceeds `least`."""

    dataset: str
    metric: str
    a: Side
    b: Side
    against: str | None = None
    least: float = 0.0


@dataclass(frozen=True)
class Measured:
    """A comparison, its paired difference and Cohen's h: means over the replicates (few-shot sample, noise set)."""

    condition: Condition
    difference: Difference
    h: float
    replicates: Sequence[tuple[int, int]]

    @property
    def excess(self) -> float:
        """How far the difference is above the least value of the condition."""
        return self.difference.value - self.condition.least

    @property
    def doubt(self) -> float:
        """The one-sided p-value of the condition: small if the difference is shown to exceed its least value."""
        return self.difference.p / 2 if self.excess > 0 else 1 - self.difference.p / 2


@dataclass(frozen=True)
class Judgement:
    """The result for a claim; p has Holm's correction.

    binding: the index of the comparison that binds; effect, low, high and least are its difference, its interval and
        the value that the difference must exceed.
    samples, noise_sets, replicates: how many few-shot samples, noise sets and pairs of them each of the comparisons is
        the mean of, at least.
    """

    claim: str
    binding: int
    effect: float
    low: float
    high: float
    least: float
    p: float
    verdict: ClaimVerdict
    samples: int
    noise_sets: int
    replicates: int


Data = Mapping[str, DatasetHits]  # by dataset


def stated(params: Params, data: Data) -> dict[int, tuple[str, list[Condition]]]:
    """Return text and conditions of each claim by number: 1 to 13 of the papers, and two of our own.

    Claims about ablations are tested on the headline metric of image choices and of referring expressions, those about
    hierarchical schedules in both readings of its paper, and those about racing for every method that is compared.
    """
    ours = params.prompted or ""  # without a prompted method its claims cannot be tested
    zero_shot = [untrained] if (untrained := params.twin) is not None else []
    tuned = [method for method in params.trained if method != ours]
    matching, referring, answering, classifying = (
        [d for d in data if data[d].kind in kinds] for kinds in TASKS.values()
    )
    clip = next((n for n, m in params.methods.items() if m.contrastive and m.zero_shot), "")
    denoiser = next((n for n, m in params.methods.items() if m.scorer == "denoising" and not m.has_schedule), "")
    races = params.races
    raced = [(d, method) for d in data for method in races.datasets.get(d, ())]
    exhaustive = f"{denoiser}, {ALL_DRAWS}"

    def published(direction: str, reading: str) -> str:
        return f"{denoiser}, {published_name(direction, reading)}"

    def pruned(metric: str, other: str, least: float = 0.0) -> list[Condition]:
        """The second paper's setting, starting clean, against another method or, in the same reading, direction."""
        return [
            Condition(
                d, metric, published(CLEAN, r), published(other, r) if other in DIRECTIONS else other, least=least
            )
            for d, r in product(classifying, READINGS)
        ]

    def measured(dataset: str, method: str, schedule: str) -> bool:
        """False if the comparison of a method left a schedule out; true if the method was not compared."""
        of = data[dataset].of
        return of(f"{method}, {ALL_DRAWS}") is None or of(f"{method}, {schedule}") is not None

    def error_rates() -> Iterator[Condition]:
        """Of each calibrated setting; rates that the calibration races do not support are not promised."""
        options = races.racing
        for (d, method), delta, p, budget in product(raced, options.deltas, options.proposer, options.budget):
            if measured(d, method, name := racing_name(delta, p, budget)):
                yield Condition(d, AGREED, f"{method}, {name}", f"{method}, {ALL_DRAWS}", least=-delta)

    def racing_ahead() -> Iterator[Condition]:
        """Racing against each schedule that reaches the same rate of disagreement."""
        label = label_of("racing", {"proposer": races.racing.proposer[0]})
        for (d, method), rate in product(raced, races.within):
            own, metric = f"{method}, {matched_name(label, rate)}", benchmark(data[d].kind).headline
            yield Condition(d, metric, own, f"{method}, {ALL_DRAWS}", least=-MARGIN)
            for other in ("staged", "hierarchical"):
                if measured(d, method, name := matched_name(other, rate)):
                    yield Condition(d, SPARED, own, f"{method}, {name}")

    def all_metrics(datasets: Sequence[str], *others: str) -> list[Condition]:
        return [Condition(d, m, ours, other) for d in datasets for m in data[d].metrics for other in others]

    def chain(key: str, *steps: tuple[str, str]) -> list[Condition]:
        heads = [(d, "micro") for d in matching] + [(d, "top1") for d in referring]
        sides = [(ChangedMethod(ours, key, better), ChangedMethod(ours, key, worse)) for better, worse in steps]
        return [Condition(d, metric, *step) for d, metric in heads for step in sides]

    texts: dict[str, list[str]] = {}
    for key, text, _ in values(params.ablations, CrossAttentionMethod.ablation_keys):
        texts.setdefault(key, []).append(text)
    last = [text for text in texts["layers"] if text != "all"]
    subsets = [text for text in texts["heads"] if text.endswith(" mean")]
    ensemble = max(texts["levels"], key=len)
    tuned_clip = all_metrics(matching, *tuned)
    poolings = chain("pooling", ("logsumexp", "maximum"), ("maximum", "cosine"))
    levels = chain("levels", *((ensemble, level) for level in texts["levels"] if "," not in level))
    slots = [Condition(d, slot, ours, ours, "predicate") for d in matching for slot in ("subject", "object")]
    halved = [*pruned("top1", exhaustive, -MARGIN), *pruned(SPARED, exhaustive, ABOUT_HALF)]
    ahead = "racing keeps accuracy within 4 points, at fewer evaluations than other schedules that disagree as often"
    return {
        1: ("few-shot DSD is ahead of tuned CLIP on image choices, every slot and average", tuned_clip),
        2: ("few-shot DSD is ahead of tuned CLIP on referring expressions", all_metrics(referring, *tuned)),
        3: ("few-shot DSD is ahead of tuned CLIP on questions: binary, other, all", all_metrics(answering, *tuned)),
        4: ("few-shot DSD is ahead of zero-shot DSD", all_metrics([*matching, *referring, *answering], *zero_shot)),
        5: ("all layers are ahead of the last few", chain("layers", *(("all", few) for few in last))),
        6: ("LogSumExp is ahead of the maximum, and that of the cosine", poolings),
        7: ("all heads are ahead of subsets of them", chain("heads", *(("mean", subset) for subset in subsets))),
        8: ("weighted heads are ahead of averaged heads", chain("heads", ("weighted", "mean"))),
        9: ("the ensemble of noise levels is ahead of each alone", levels),
        10: ("the predicate is the hardest slot", slots),
        11: ("hierarchical pruning keeps accuracy within 4 points, at about half the cost of exhaustive", halved),
        12: ("hierarchical pruning is comparable with a small CLIP, within 4 points", pruned("top1", clip, -MARGIN)),
        13: ("starting clean is the best direction", [*pruned("top1", "noisy"), *pruned("top1", "middle")]),
        14: ("racing names another winner than all draws at a rate of at most its δ", list(error_rates())),
        15: (ahead, list(racing_ahead())),
    }


def measure(condition: Condition, data: Data, params: Params) -> Measured:
    """Return the paired difference of two methods on the same examples, or of two metrics on the same clusters."""
    answers, evaluate = data[condition.dataset], params.evaluate
    resampling = Resampling(resamples=evaluate.resamples, confidence=evaluate.confidence, seed=params.seed)
    own = params.datasets[condition.dataset].sample, params.noise.sample
    measured = answers.measured(condition.a, condition.b, own)
    clusters = np.array([example.cluster for example in answers.examples])
    metric, against = condition.metric, condition.against or condition.metric
    pairs = [(one[metric], other[against]) for one, other in measured.values()]
    groups: Groups | None = pairs[0][0][1]
    if condition.against is None:
        a, b = ([hits_n for hits_n, _ in side] for side in zip(*pairs, strict=True))
        shares = [float(np.mean([np.mean(side, axis=0)[mask].mean() for mask in groups or ()])) for side in (a, b)]
    else:
        # The two metrics count different examples of the same sentences: a pair is a sentence that has both.
        sides = [[_by_cluster(hits_n, clusters, np.any(masks, 0)) for hits_n, masks in pair] for pair in pairs]
        shared = sorted(sides[0][0].keys() & sides[0][1].keys())
        a, b = ([np.array([side[n][cluster] for cluster in shared]) for side in sides] for n in (0, 1))
        clusters, groups = np.array(shared), None
        shares = [float(np.mean(a)), float(np.mean(b))]
    difference = replicated_difference(a, b, list(measured), clusters, groups, least=condition.least, **resampling)
    return Measured(condition, difference, cohens_h(shares[0], shares[1]), list(measured))


def _by_cluster(hits_n: np.ndarray, clusters: np.ndarray, mask_n: np.ndarray) -> dict[str, float]:
    return {str(c): float(hits_n[mask_n & (clusters == c)].mean()) for c in np.unique(clusters[mask_n])}


def binding(comparisons: Sequence[Measured]) -> int:
    """Return the index of the comparison with the least evidence for the claim.

    If every difference exceeds its least value, it is the one with the largest p; otherwise the one that most clearly
    does not.
    """
    return max(range(len(comparisons)), key=lambda n: (comparisons[n].doubt, -comparisons[n].excess))


def uncorrected(comparisons: Sequence[Measured]) -> float:
    """Return p of one claim, before Holm's correction for the number of claims.

    If every difference exceeds its least value, this is the largest p; otherwise the smallest p of those that do not,
    times the number of comparisons (Bonferroni).
    """
    bound = comparisons[binding(comparisons)]
    return bound.difference.p if bound.excess > 0 else min(1.0, len(comparisons) * bound.difference.p)


def judge(params: Params, data: Data) -> tuple[dict[int, Judgement], dict[int, list[Measured]]]:
    """Return judgements and comparisons by number, for every claim whose methods and datasets are evaluated."""
    measured: dict[int, list[Measured]] = {}
    claims = stated(params, data)
    for number, (_, conditions) in claims.items():
        if conditions and all(data[c.dataset].of(c.a) and data[c.dataset].of(c.b) for c in conditions):
            measured[number] = [measure(condition, data, params) for condition in conditions]
    corrected = holm([uncorrected(rows) for rows in measured.values()])
    judgements = {}
    for (number, rows), p in zip(measured.items(), corrected, strict=True):
        place = binding(rows)
        bound, difference = rows[place], rows[place].difference
        verdict: ClaimVerdict = "not shown"
        if p < 1 - params.evaluate.confidence:
            verdict = "holds" if bound.excess > 0 else "contradicted"
        effect = difference.value, difference.low, difference.high
        counts = [_counts(row.replicates) for row in rows]
        least = bound.condition.least
        judgements[number] = Judgement(
            claims[number][0], place, *effect, least, p, verdict, *map(min, zip(*counts, strict=True))
        )
    return judgements, measured


def _counts(replicates: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
    """Return the number of few-shot samples, of noise sets and of pairs of them."""
    samples, noise_sets = (len(set(factor)) for factor in zip(*replicates, strict=True))
    return samples, noise_sets, len(replicates)


class AtPaper(NamedTuple):
    """Judgements and comparisons at the paper's number of few-shot examples; few_shot: that number by dataset."""

    few_shot: dict[str, int]
    judgements: dict[int, Judgement]
    measured: dict[int, list[Measured]]


def write(
    judgements: Mapping[int, Judgement],
    measured: Mapping[int, Sequence[Measured]],
    paper: Mapping[str, AtPaper],
    target: Path,
) -> None:
    """Write `claims.json` and `comparisons.json`: judgement and comparisons of each claim, by number.

    Those at the paper's number of examples are under the key "paper", by variant of the study.
    """

    def named(side: Side) -> str:
        return side if isinstance(side, str) else f"{side.method}, {side.key} {side.value}"

    def row(one: Measured) -> dict[str, Any]:
        c = one.condition
        b = named(c.b) if c.against is None else f"{named(c.b)}, {c.against}"
        sides = dict(dataset=c.dataset, metric=c.metric, a=named(c.a), b=b, least=c.least)
        counts = dict(zip(("samples", "noise_sets", "replicates"), _counts(one.replicates), strict=True))
        return {**sides, **one.difference.as_dict(), "cohens_h": one.h, **counts}

    def rows(measured: Mapping[int, Sequence[Measured]]) -> dict[Any, Any]:
        return {number: [row(comparison) for comparison in comparisons] for number, comparisons in measured.items()}

    claims: dict[Any, Any] = dict(judgements)
    comparisons = rows(measured)
    if paper:
        claims[PAPER] = {v: {"few_shot": at.few_shot, "claims": at.judgements} for v, at in paper.items()}
        comparisons[PAPER] = {variant: rows(at.measured) for variant, at in paper.items()}
    write_json(target / "claims.json", claims)
    write_json(target / "comparisons.json", comparisons)
