"""The claims of the two papers, and two of our own, measured by paired differences.

Each is judged: holds, not shown, contradicted. A claim is a set of comparisons that must all be true. Its effect is the
smallest of their differences. The claim holds if that is above zero and is contradicted if it is below, in either case
only where p, corrected for the comparisons of the claim and for the number of claims, is below 1 − confidence. Every
comparison is on the test split.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dsd.config import CrossAttentionMethod, Params, prompted, trained, twin
from dsd.data.examples import MatchingExample
from dsd.datasets import benchmark
from dsd.evaluation.ablations import Variant, values
from dsd.metrics import HEADLINES, Hits
from dsd.schedules.exhaustive import ALL_DRAWS
from dsd.schedules.hierarchical import DIRECTIONS, published_name
from dsd.schedules.racing import racing_name
from dsd.schedules.replay import AGREED, SPARED
from dsd.statistics import Difference, cohens_h, difference_above, holm, paired_difference
from dsd.store import write_atomic

Side = str | Variant  # a method, or one with a key changed
Verdict = Literal["holds", "not shown", "contradicted"]
TASKS = {  # kinds by task
    "matching": ("scenes-com", "comvg", "visual-genome"),
    "referring": ("scenes-ref", "refcocog"),
    "answering": ("scenes-vqa", "vqav2"),
    "classifying": ("scenes-cls", "cifar10", "stl10", "fgvc-aircraft"),
}
ABOUT = 0.04  # the points that accuracy may differ by and still be kept, or be comparable
HALF = 0.42  # of the evaluations spared: what the paper's Table 1 shows at the least, 11 hours in place of 19


class Answers(NamedTuple):
    """The test examples of a dataset and how each method and variant answered them."""

    kind: str
    examples: list[MatchingExample]
    methods: dict[str, dict[str, Hits]]
    variants: dict[Variant, dict[str, Hits]]

    @property
    def metrics(self) -> list[str]:
        return list(next(iter(self.methods.values())))

    def of(self, side: Side) -> dict[str, Hits] | None:
        """Hits by metric, or None where it was not evaluated."""
        return self.methods.get(side) if isinstance(side, str) else self.variants.get(side)


class Comparison(NamedTuple):
    """a − b on a metric; where `against` is given, a's metric minus a's `against` instead. It is to exceed `least`."""

    dataset: str
    metric: str
    a: Side
    b: Side
    against: str | None = None
    least: float = 0.0


@dataclass(frozen=True)
class Measured:
    """A comparison with its paired difference and Cohen's h."""

    comparison: Comparison
    difference: Difference
    h: float


@dataclass(frozen=True)
class Judgement:
    """effect, low and high are of the comparison with the smallest difference; p is Holm's."""

    claim: str
    effect: float
    low: float
    high: float
    p: float
    verdict: Verdict


Data = Mapping[str, Answers]  # by dataset


def stated(params: Params, data: Data) -> dict[int, tuple[str, list[Comparison]]]:
    """The claims of the papers, 1 to 13, and two of our own, each with the comparisons that must be true.

    What the paper shows on image choices and referring expressions is compared on the headline metric of both.
    """
    ours = prompted(params) or ""  # without one, nothing is said of it
    untrained = twin(params)
    bare = [] if untrained is None else [untrained]
    tuned = [method for method in trained(params) if method != ours]
    matching, referring, answering, classifying = (
        [d for d in data if data[d].kind in kinds] for kinds in TASKS.values()
    )
    clip = next((n for n, m in params.methods.items() if m.contrastive and m.zero_shot), "")
    denoiser = next((n for n, m in params.methods.items() if m.scorer == "denoising" and not m.has_schedule), "")
    racing = [d for d in (*classifying, *answering) if denoiser in params.races.datasets.get(d, ())]
    clean, noisy, middle = (f"{denoiser}, {published_name(direction)}" for direction in DIRECTIONS)
    exhaustive = f"{denoiser}, {ALL_DRAWS}"

    def pruned(metric: str, other: str, least: float = 0.0) -> list[Comparison]:
        return [Comparison(d, metric, clean, other, least=least) for d in classifying]

    def kept_promises() -> Iterator[Comparison]:
        for dataset, delta, proposer in product(racing, params.races.racing.deltas, params.races.racing.proposer):
            yield Comparison(dataset, AGREED, f"{denoiser}, {racing_name(delta, proposer)}", exhaustive, least=-delta)

    def spared_by_racing() -> Iterator[Comparison]:
        best = f"{denoiser}, racing"
        for dataset in racing:
            yield Comparison(dataset, HEADLINES[benchmark(data[dataset].kind).metrics], best, exhaustive, least=-ABOUT)
            for other in ("staged", "hierarchical"):
                yield Comparison(dataset, SPARED, best, f"{denoiser}, {other}")

    def ahead(datasets: Sequence[str], *others: str) -> list[Comparison]:
        return [Comparison(d, m, ours, other) for d in datasets for m in data[d].metrics for other in others]

    def chain(key: str, *steps: tuple[str, str]) -> list[Comparison]:
        heads = [(d, "micro") for d in matching] + [(d, "top1") for d in referring]
        sides = [(Variant(ours, key, better), Variant(ours, key, worse)) for better, worse in steps]
        return [Comparison(d, metric, *step) for d, metric in heads for step in sides]

    listed: dict[str, list[str]] = {}
    for key, text, _ in values(params.ablations, CrossAttentionMethod.ablation_keys):
        listed.setdefault(key, []).append(text)
    last = [text for text in listed["layers"] if text != "all"]
    some = [text for text in listed["heads"] if text.endswith(" mean")]
    together = max(listed["levels"], key=len)
    return {
        1: ("few-shot DSD is ahead of tuned CLIP on image choices, every slot and average", ahead(matching, *tuned)),
        2: ("few-shot DSD is ahead of tuned CLIP on referring expressions", ahead(referring, *tuned)),
        3: ("few-shot DSD is ahead of tuned CLIP on questions: binary, other, all", ahead(answering, *tuned)),
        4: ("few-shot DSD is ahead of zero-shot DSD", ahead([*matching, *referring, *answering], *bare)),
        5: ("all layers are ahead of the last few", chain("layers", *(("all", few) for few in last))),
        6: (
            "LogSumExp is ahead of the maximum, and that of the cosine",
            chain("pooling", ("logsumexp", "maximum"), ("maximum", "cosine")),
        ),
        7: ("all heads are ahead of subsets of them", chain("heads", *(("mean", few) for few in some))),
        8: ("weighted heads are ahead of averaged heads", chain("heads", ("weighted", "mean"))),
        9: (
            "the ensemble of noise levels is ahead of each alone",
            chain("levels", *((together, alone) for alone in listed["levels"] if "," not in alone)),
        ),
        10: (
            "the predicate is the hardest slot",
            [Comparison(d, slot, ours, ours, "predicate") for d in matching for slot in ("subject", "object")],
        ),
        11: (
            "hierarchical pruning keeps accuracy within 4 points, at about half the cost of exhaustive",
            [*pruned("top1", exhaustive, -ABOUT), *pruned(SPARED, exhaustive, HALF)],
        ),
        12: ("hierarchical pruning is comparable with a small CLIP, within 4 points", pruned("top1", clip, -ABOUT)),
        13: ("starting clean is the best direction", [*pruned("top1", noisy), *pruned("top1", middle)]),
        14: ("racing names another winner than all draws at a rate of at most its δ", list(kept_promises())),
        15: (
            "racing keeps accuracy within 4 points of exhaustive, at fewer evaluations than staged and hierarchical",
            list(spared_by_racing()),
        ),
    }


def measure(comparison: Comparison, data: Data, params: Params) -> Measured:
    """The paired difference: of two methods on the same examples, or of two metrics within a cluster."""
    answers, settings = data[comparison.dataset], dict(params.evaluate.model_dump(), seed=params.seed)
    clusters = np.array([example.cluster for example in answers.examples])
    one, other = answers.of(comparison.a), answers.of(comparison.b)
    assert one is not None and other is not None  # `judge` asks for no other
    hits_n, groups = one[comparison.metric]
    if comparison.against is None:
        other_n, _ = other[comparison.metric]
        if comparison.least:
            difference = difference_above(hits_n, other_n, clusters, comparison.least, **settings)
        else:
            difference = paired_difference(hits_n, other_n, clusters, groups, **settings)
        shares = [float(np.mean([values_n[mask].mean() for mask in groups])) for values_n in (hits_n, other_n)]
    else:
        # Other examples have the other metric, but of the same sentences: each sentence that has both is a pair.
        other_n, others = other[comparison.against]
        sides = [
            _by_cluster(values, clusters, np.any(masks, 0)) for values, masks in ((hits_n, groups), (other_n, others))
        ]
        shared = sorted(sides[0].keys() & sides[1].keys())
        a_n, b_n = ([side[cluster] for cluster in shared] for side in sides)
        difference = paired_difference(a_n, b_n, shared, **settings)
        shares = [float(np.mean(a_n)), float(np.mean(b_n))]
    return Measured(comparison, difference, cohens_h(shares[0], shares[1]))


def _by_cluster(hits_n: np.ndarray, clusters: np.ndarray, mask_n: np.ndarray) -> dict[str, float]:
    return {str(c): float(hits_n[mask_n & (clusters == c)].mean()) for c in np.unique(clusters[mask_n])}


def uncorrected(found: Sequence[Measured]) -> float:
    """p of one claim. For it every comparison must show a gain; against it the clearest of their losses is enough,
    corrected by Bonferroni for their number."""
    if min(measured.difference.value for measured in found) > 0:
        return max(measured.difference.p for measured in found)
    losses = [measured.difference.p for measured in found if measured.difference.value < 0]
    return min([1.0, *(len(found) * p for p in losses)])


def judge(params: Params, data: Data) -> tuple[dict[int, Judgement], dict[int, list[Measured]]]:
    """Every claim, by number, that params.yaml has the methods and datasets for: its judgement and what it rests on."""
    measured: dict[int, list[Measured]] = {}
    claims = stated(params, data)
    for number, (_, asked) in claims.items():
        there = [c for c in asked if data[c.dataset].of(c.a) and data[c.dataset].of(c.b)]
        if there and len(there) == len(asked):
            measured[number] = [measure(comparison, data, params) for comparison in there]
    corrected = holm([uncorrected(found) for found in measured.values()])
    judged = {}
    for (number, found), p in zip(measured.items(), corrected, strict=True):
        least = min((m.difference for m in found), key=lambda difference: difference.value)
        verdict: Verdict = "not shown"
        if p < 1 - params.evaluate.confidence:
            verdict = "holds" if least.value > 0 else "contradicted"
        judged[number] = Judgement(claims[number][0], least.value, least.low, least.high, p, verdict)
    return judged, measured


def write(judged: Mapping[int, Judgement], measured: Mapping[int, Sequence[Measured]], target: Path) -> None:
    """`claims.json`: number → claim, effect (a fraction of 1), low, high, p, verdict; and `comparisons.json`: number →
    the comparisons that it rests on."""

    def named(side: Side) -> str:
        return side if isinstance(side, str) else f"{side.method}, {side.key} {side.value}"

    def row(found: Measured) -> dict[str, Any]:
        c = found.comparison
        b = named(c.b) if c.against is None else f"{named(c.b)}, {c.against}"
        b += f", {100 * c.least:+.0f} points" if c.least else ""
        sides = dict(dataset=c.dataset, metric=c.metric, a=named(c.a), b=b)
        return {**sides, **found.difference.as_dict(), "cohens_h": found.h}

    rows = {number: [row(found) for found in several] for number, several in measured.items()}
    judgements = {number: asdict(judgement) for number, judgement in judged.items()}
    for name, content in {"claims": judgements, "comparisons": rows}.items():
        write_atomic(target / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
