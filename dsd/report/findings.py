"""The sentences on top of the page, each computed from the numbers below them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsd.config import ContrastiveMethod, DenoisingMethod, FusionMethod, Params, twin, under_test
from dsd.report.inputs import Claims, Dataset
from dsd.report.tables import Comparison, chance, compare, interval, percent, points
from dsd.statistics import Interval

Compared = Mapping[str, Sequence[Comparison]]  # opponent → comparisons with the trained method, over all datasets

KEYS = {
    "5": "layers",
    "6": "pooling",
    "7": "heads",
    "8": "heads",
    "9": "levels",
}  # what a claim is about, by its number


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
    before, after = twin(params), under_test(params)
    by_place = {(c.dataset, c.metric): c for c in compared.get(before or "", ())}
    found = []
    for d in datasets:
        comparison = by_place.get((d.name, d.headline))
        if before is not None and comparison is not None:
            difference = comparison.difference
            old, new = (percent(d.results[method][d.headline].value) for method in (before, after))
            span = f"[{points(difference.low)}, {points(difference.high)}]"
            level = percent(chance(d)[d.headline])
            found.append(
                Headline(d.name, d.headline, old, new, points(difference.value), span, comparison.verdict, level)
            )
    return found


def leaders(dataset: Dataset, params: Params) -> list[str]:
    """The best method by the headline metric, then those over whom its lead is not shown."""
    values = {method: row[dataset.headline].value for method, row in dataset.results.items()}
    best, *others = sorted(values, key=lambda method: -values[method])

    def verdict(other: str) -> str:
        return compare(dataset, best, other, [dataset.headline], params)[0].verdict

    return [best, *(other for other in others if verdict(other) != "higher")]


def said(comparisons: Sequence[Comparison]) -> str:
    """ "higher on 9, lower on 1 and not shown to differ on 2"."""
    counts = Counter(c.verdict.replace("no difference shown", "not shown to differ") for c in comparisons)
    return names([f"{word} on {counts[word]}" for word in ("higher", "lower", "not shown to differ") if counts[word]])


def lead(datasets: Sequence[Dataset], compared: Compared, params: Params) -> str:
    """The one-sentence summary: on how many datasets prompting helps, and which method leads where."""
    clauses = []
    if (before := twin(params)) is not None and before in compared:
        heads = {(d.name, d.headline) for d in datasets}
        rows = [c for c in compared[before] if (c.dataset, c.metric) in heads]
        pair = f"{under_test(params)} against {before}"
        clauses.append(f"with few-shot prompting ({pair}) accuracy is {said(rows)} of {len(rows)} datasets")
    alone: dict[str, list[str]] = {}
    shared = []
    for dataset in datasets:
        methods = leaders(dataset, params)
        shown = [f"{percent(dataset.results[method][dataset.headline].value)}\u00a0%" for method in methods]
        if len(methods) == 1:
            alone.setdefault(methods[0], []).append(f"{dataset.name} ({shown[0]})")
        else:
            pairs = [f"{method} ({value})" for method, value in zip(methods, shown, strict=True)]
            shared.append(f"on {dataset.name} no difference is shown between {names(pairs)}")
    clauses += [f"{method} leads on {names(places)}" for method, places in alone.items()] + shared
    text = "; ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}."


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
    apart = sum(not c.overlap for c in found)
    return (
        f"{a} against {b}: {said(found)} of {len(found)} metrics; the two methods’ own intervals are apart on {apart}."
    )


def overlaps(found: Sequence[Comparison]) -> list[str]:
    """Dataset by dataset, on which metrics the two methods' own intervals overlap."""
    sentences = []
    for dataset in dict.fromkeys(c.dataset for c in found):
        rows = [c for c in found if c.dataset == dataset]
        apart = [c.metric for c in rows if not c.overlap]
        overlapping = [c.metric for c in rows if c.overlap]
        parts = [
            f"{word} on {names(metrics)}"
            for word, metrics in (("apart", apart), ("overlapping", overlapping))
            if metrics
        ]
        sentences.append(f"{dataset}: {', '.join(parts)}.")
    return sentences


def best_interval(dataset: Dataset, method: str) -> str:
    """A method's headline with its interval, for alternative texts."""
    found = dataset.results[method][dataset.headline]
    return told(method, found)


def told(name: str, found: Interval) -> str:
    return f"{name} {percent(found.value)} % {interval(found)}"


def unbeaten(method: str, compared: Compared, datasets: Sequence[Dataset], params: Params) -> list[str]:
    """By dataset, over whom a fusion's lead on the headline is not shown, and what each of its parts has when it is
    fitted alone: a weight for each noise level, so denoising is not quite the method of that name."""
    row, found = params.methods[method], []
    assert isinstance(row, FusionMethod)
    for d in datasets:
        rivals = [
            opponent
            for opponent, rows in compared.items()
            if any((c.dataset, c.metric) == (d.name, d.headline) and c.verdict != "higher" for c in rows)
        ]
        if not rivals:
            continue
        tried = d.ablations.get(method, {}).get("parts", {})
        alone = [told(part, tried[part][d.headline]) for part in row.parts if part in tried]
        why = f": fitted alone, its parts have {names(alone)}" if alone else ""
        found.append(f"{method} is not shown to be ahead of {names(rivals)} on {d.name} ({d.headline}){why}.")
    return found


def reasons(judged: Claims, datasets: Sequence[Dataset], params: Params) -> list[str]:
    """For each claim that does not hold, what else the same evidence tells."""
    ours, found = under_test(params), []
    denoisers = [name for name, row in params.methods.items() if isinstance(row, DenoisingMethod)]
    for number, claim, rows in judged:
        if claim.verdict == "holds":
            continue
        weakest = min(rows, key=lambda row: float(row["value"]))
        dataset = next(d for d in datasets if d.name == weakest["dataset"])
        place = f"Claim {number} ({claim.verdict}) fails first on {dataset.name}, {weakest['metric']}"
        key = KEYS.get(number)
        if key is not None and ours in dataset.ablations:
            values = dataset.ablations[ours][key]
            best = max(values, key=lambda value: values[value][dataset.headline].value)
            v = values[best][dataset.headline]
            found.append(f"{place}: of its variants by {key}, “{best}” is highest, {percent(v.value)} % {interval(v)}.")
            continue
        told = names([best_interval(dataset, name) for name in [ours, *denoisers] if name in dataset.results])
        found.append(
            f"{place}, where {weakest['a']} is compared with {weakest['b']}; {dataset.headline} there: {told}."
        )
    return found
