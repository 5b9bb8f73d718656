"""The first screen of the report: the verdict in one sentence, a tile per dataset, and a line per method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from dsd.config import ContrastiveMethod, FusionMethod, MethodParams, Params
from dsd.evaluation.claims import TASKS
from dsd.report.inputs import DatasetResults
from dsd.report.matrix import Differences, Gap, gap, leaders, verdict_on
from dsd.report.tables import Column, count, interval, names, percent, points
from dsd.statistics import Difference

ASKED = {  # task → what an example asks for
    "matching": "which image fits the sentence",
    "referring": "which phrase fits the image",
    "answering": "which answer to the question is right",
    "classifying": "which class name fits the image",
}


@dataclass(frozen=True)
class Tile:
    """A dataset: what it asks, the best method on it, and how that compares with the best CLIP and with no image."""

    dataset: str
    task: str
    n: str
    shots: str
    chance: str
    best: list[str]  # and the methods that it is not shown to outperform
    value: str
    interval: str
    clip: str | None
    clip_value: str
    over_clip: Gap
    image: list[tuple[str, str, Gap]]  # metric, method, method minus blind baseline


@dataclass(frozen=True)
class Line:
    """A method. learns: whether it uses the few-shot examples. model: its backbone."""

    name: str
    text: str
    learns: bool
    model: str


def column(dataset: DatasetResults) -> Column:
    values = {method: row[dataset.headline] for method, row in dataset.results.items()}
    return Column(dataset.name, dataset.headline, dataset.chance[dataset.headline], values)


def describe(method: MethodParams) -> str:
    """What a method does, in one line."""
    if method.scorer == "fusion":
        return f"{names(cast(FusionMethod, method).parts).replace('-', ' ')}, weighted by the few-shot examples"
    if method.scorer == "contrastive":
        return {
            None: "CLIP: similarity of image and text embeddings, no training",
            "projections": "CLIP, its last linear layers tuned on the few-shot examples",
            "context": "CLIP, context vectors learned on the few-shot examples (CoCoOp)",
        }[None if method.zero_shot else cast(ContrastiveMethod, method).tuned]
    return {
        ("cross-attention", True): "attention between words and image regions, no training",
        ("cross-attention", False): "the same, with a prompt for the attention learned on the few-shot examples",
        ("denoising", True): "Diffusion Classifier: how well the text helps to remove noise from the image",
        ("released", True): "the rule of the published code of DSD, which differs from its paper",
    }.get((method.scorer, method.zero_shot), f"{method.scorer}, {'no training' if method.zero_shot else 'few-shot'}")


def lines(params: Params, shown: Sequence[str]) -> list[Line]:
    """One per evaluated method, in the order of the params."""
    rows = {name: row for name, row in params.methods.items() if name in shown}
    models = models_of(params)
    return [Line(name, describe(row), not row.zero_shot, models[name]) for name, row in rows.items()]


def models_of(params: Params) -> dict[str, str]:
    """method → the backbone that it uses."""
    return {name: row.own_backbone or params.backbone for name, row in params.methods.items()}


def task(dataset: DatasetResults) -> str:
    """What an example of a dataset asks for, and among how many candidates."""
    low, high = int(dataset.candidates.min()), int(dataset.candidates.max())
    asked = next((ASKED[task] for task, kinds in TASKS.items() if dataset.kind in kinds), "which image and text fit")
    return f"{asked}, 1 of {low if low == high else f'{low} to {high}'}"


@dataclass(frozen=True)
class Sides:
    """The methods that use the diffusion model, and those that use a CLIP."""

    diffusion: list[str]
    clips: list[str]

    def over_clip(self, dataset: DatasetResults, differences: Differences) -> tuple[str, str, Difference] | None:
        """The best diffusion method, the best CLIP, and the first minus the second; None if one side is missing."""
        ours, theirs = ([m for m in side if m in dataset.results] for side in (self.diffusion, self.clips))
        if not ours or not theirs:
            return None
        a, b = dataset.best(ours), dataset.best(theirs)
        return a, b, differences[dataset.name][b][a][dataset.headline]


def sides(params: Params, zero_shot: bool = False) -> Sides:
    """The two sides, of all methods or of those that learn nothing."""
    rows = {name: row for name, row in params.methods.items() if row.zero_shot or not zero_shot}
    return Sides(
        [n for n, row in rows.items() if not row.contrastive], [n for n, row in rows.items() if row.contrastive]
    )


def tile(dataset: DatasetResults, both: Sides, differences: Differences) -> Tile:
    best = leaders(dataset, differences)
    value = dataset.results[best[0]][dataset.headline]
    pair = both.over_clip(dataset, differences)
    strongest = {metric: dataset.best(dataset.methods, metric) for metric in dataset.leading}
    return Tile(
        dataset.name,
        task(dataset),
        count(value.n),
        count(dataset.counts["train"]),
        percent(dataset.chance[dataset.headline]),
        best,
        percent(value.value),
        interval(value),
        pair and pair[1],
        percent(dataset.results[pair[1]][dataset.headline].value) if pair else "",
        gap(pair[2] if pair else None),
        [(metric, m, gap(dataset.blind.differences[m][metric])) for metric, m in strongest.items()],
    )


def main_method(datasets: Sequence[DatasetResults], differences: Differences) -> str:
    """The method that is best, or not shown to be worse, on most datasets; of equals that with the highest mean."""
    wins = Counter(method for dataset in datasets for method in leaders(dataset, differences))

    def mean(method: str) -> float:
        values = [d.results[method][d.headline].value for d in datasets if method in d.results]
        return sum(values) / len(values)

    return max(wins, key=lambda method: (wins[method], mean(method)))


def verdict(datasets: Sequence[DatasetResults], params: Params, differences: Differences, place: str) -> str:
    """One sentence: which method is best where, and how the diffusion model compares with CLIP.

    place: what the datasets are, such as "drawn scenes".
    """
    method = main_method(datasets, differences)
    ranks = {d.name: leaders(d, differences) for d in datasets}
    alone = [d for d, best in ranks.items() if best == [method]]
    tied = {d: [m for m in best if m != method] for d, best in ranks.items() if method in best and len(best) > 1}
    parts = [f"best on {names(alone)}"] if alone else []
    if tied:
        rivals = names(list(dict.fromkeys(m for others in tied.values() for m in others)))
        parts.append(f"not shown to differ from {rivals} on {names(list(tied))}")
    clauses = [f"On {place}, {method} is {' and '.join(parts)}"]
    clip = against_clip(datasets, sides(params), differences)
    if clip:
        clauses.append(f"the best diffusion method {clip.replace('CLIP', 'the best CLIP', 1)}")
    untrained = against_clip(datasets, sides(params, zero_shot=True), differences)
    if untrained and untrained != clip:
        clauses.append(f"without few-shot examples it {untrained.replace('CLIP', 'zero-shot CLIP', 1)}")
    return "; ".join(clauses).replace("; without", ", and without") + "."


def against_clip(datasets: Sequence[DatasetResults], both: Sides, differences: Differences) -> str:
    """Such as "beats CLIP on 3 of 4 datasets (+4.2 to +20.1 points)"; "" where one side is missing."""
    gaps = [pair[2] for d in datasets if (pair := both.over_clip(d, differences))]
    if not gaps:
        return ""
    verdicts = Counter(map(verdict_on, gaps))
    words = {"higher": "beats CLIP on", "lower": "is behind it on", "no difference shown": "is not shown to differ on"}
    if not verdicts["higher"]:
        words["lower"] = "is behind CLIP on"
    texts = [f"{text} {verdicts[word]}" for word, text in words.items() if verdicts[word]]
    texts[0] += f" of {len(gaps)} datasets"
    low, high = min(g.value for g in gaps), max(g.value for g in gaps)
    return f"{names(texts)} ({points(low)} to {points(high)} points)"
