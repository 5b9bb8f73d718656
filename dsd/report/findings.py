"""The sentences on top of the page, each computed from the numbers below them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsd.params import ContrastiveMethod, Params
from dsd.report.inputs import Dataset
from dsd.report.tables import Comparison, chance, compare, interval, percent, points, twin

Compared = Mapping[str, Sequence[Comparison]]  # opponent → comparisons with the trained method, over all datasets


@dataclass(frozen=True)
class Headline:
    """One dataset in a nutshell: the headline metric without and with the attention prompt."""

    dataset: str
    metric: str
    before: str
    after: str
    change: str
    interval: str
    verdict: str
    chance: str


def names(items: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def headlines(datasets: Sequence[Dataset], compared: Compared, params: Params) -> list[Headline]:
    """Nothing where the trained method or its zero-shot twin was not evaluated."""
    before, after = twin(params), params.training.method
    by_place = {(c.dataset, c.metric): c for c in compared.get(before or "", ())}
    found = []
    for d in datasets:
        comparison = by_place.get((d.name, d.headline))
        if before is not None and comparison is not None:
            difference = comparison.difference
            old, new = (percent(d.results[method][d.headline].value) for method in (before, after))
            span = f"[{points(difference.low)}, {points(difference.high)}]"
            level = percent(chance(d)[d.headline])
            found.append(Headline(d.name, d.headline, old, new, points(difference.value), span, comparison.verdict, level))
    return found


def leader(dataset: Dataset, params: Params) -> tuple[str, str]:
    """Who is best by the headline metric, with the number; and the runners-up over whom no lead is shown."""
    values = {method: row[dataset.headline] for method, row in dataset.results.items()}
    best, *others = sorted(values, key=lambda method: -values[method].value)
    level = [
        other
        for other in others
        if next(c for c in compare(dataset, best, other, params) if c.metric == dataset.headline).verdict != "higher"
    ]
    return best, names([f"{method} ({percent(values[method].value)} %)" for method in (best, *level)])


def lead(datasets: Sequence[Dataset], compared: Compared, params: Params) -> str:
    """The one-sentence summary: which method leads where, and on how many datasets prompting helps."""
    clauses: dict[str, list[str]] = {}
    for dataset in datasets:
        best, shown = leader(dataset, params)
        alone = shown.startswith(best) and " and " not in shown
        value = percent(dataset.results[best][dataset.headline].value)
        if alone:
            clauses.setdefault(f"{best} leads on", []).append(f"{dataset.name} ({value} %)")
        else:
            clauses.setdefault("with no difference shown between the best,", []).append(f"{shown} lead on {dataset.name}")
    said = [f"{start} {names(places)}" for start, places in clauses.items()]
    before = twin(params)
    if before in compared:
        heads = {(d.name, d.headline) for d in datasets}
        verdicts = Counter(c.verdict for c in compared[before] if (c.dataset, c.metric) in heads)
        parts = [f"{word} on {verdicts[word]}" for word in ("higher", "lower") if verdicts[word]]
        said.append(f"few-shot {params.training.method} is {names(parts) or 'not shown to differ on any'} of {len(datasets)} datasets against {before}")
    return "; ".join(said)[:1].upper() + "; ".join(said)[1:] + "."


def above_chance(datasets: Sequence[Dataset], params: Params) -> list[str]:
    """For each diffusion method without training: on how many metrics its interval lies above chance."""
    sentences = []
    for method, row in params.methods.items():
        seen = [d for d in datasets if method in d.results]
        if not seen or isinstance(row, ContrastiveMethod) or row.prompt != "none":
            continue
        above, below, total = [], 0, 0
        for d in seen:
            for metric, level in chance(d).items():
                total += 1
                below += d.results[method][metric].high < level
                if d.results[method][metric].low > level:
                    above.append(f"{d.name} {metric}")
        rest = f", below it on {below}" if below else ""
        sentences.append(f"{method} is above chance on {len(above)} of {total} metrics{rest}.")
    return sentences


def tally(a: str, b: str, found: Sequence[Comparison]) -> str:
    """On how many metrics a is higher, lower or not shown to differ, and whether the intervals themselves overlap."""
    verdicts = Counter(c.verdict for c in found)
    parts = [f"{word} on {verdicts[word]}" for word in ("higher", "lower") if verdicts[word]]
    if verdicts["no difference shown"]:
        parts.append(f"not shown to differ on {verdicts['no difference shown']}")
    apart = [f"{c.dataset} {c.metric}" for c in found if not c.overlap]
    return f"{a} against {b}: {names(parts)} of {len(found)} metrics; the two methods' own intervals are apart on {len(apart)}."


def overlaps(found: Sequence[Comparison]) -> list[str]:
    """Dataset by dataset, on which metrics the two methods' own intervals overlap."""
    sentences = []
    for dataset in dict.fromkeys(c.dataset for c in found):
        rows = [c for c in found if c.dataset == dataset]
        apart = [c.metric for c in rows if not c.overlap]
        overlapping = [c.metric for c in rows if c.overlap]
        said = [f"{word} on {names(metrics)}" for word, metrics in (("apart", apart), ("overlapping", overlapping)) if metrics]
        sentences.append(f"{dataset}: {', '.join(said)}.")
    return sentences


def best_interval(dataset: Dataset, method: str) -> str:
    """A method's headline with its interval, for alternative texts."""
    found = dataset.results[method][dataset.headline]
    return f"{method} {percent(found.value)} % {interval(found)}"
