"""The sentences at the top of the report, computed from its numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dsd.report.comparisons import ByOpponent, Comparison, compare, verdict_on
from dsd.report.inputs import Claim, DatasetResults
from dsd.report.tables import bounds, compared, interval, names, percent, points
from dsd.statistics import Difference, Interval, Resampling

CLAIM_KEYS = {"5": "layers", "6": "pooling", "7": "heads", "8": "heads", "9": "levels"}  # claim → ablated key


@dataclass(frozen=True)
class Headline:
    """A metric of one dataset without and with something: the attention prompt, or the image."""

    dataset: str
    metric: str
    method: str
    before: str
    after: str
    change: str
    interval: str
    verdict: str
    chance: str


def headline(dataset: DatasetResults, metric: str, method: str, before: float, difference: Difference) -> Headline:
    """A method on a metric, whose value without something was `before`."""
    return Headline(
        dataset.name,
        metric,
        method,
        percent(before),
        percent(dataset.results[method][metric].value),
        points(difference.value),
        bounds(difference.low, difference.high),
        verdict_on(difference),
        percent(dataset.chance[metric]),
    )


def headlines(
    datasets: Sequence[DatasetResults], comparisons: Sequence[Comparison], before: str, after: str
) -> list[Headline]:
    """One per dataset on which both methods were evaluated; `comparisons` are of `after` minus `before`."""
    by_metric = {(c.dataset, c.metric): c for c in comparisons}
    return [
        headline(d, d.headline, after, d.results[before][d.headline].value, comparison.difference)
        for d in datasets
        if (comparison := by_metric.get((d.name, d.headline)))
    ]


def images(datasets: Sequence[DatasetResults]) -> list[Headline]:
    """What the image contributes: the best method minus the blind baseline, by leading metric of each dataset."""
    headlines = []
    for d in datasets:
        for metric in d.leading:
            best = max(d.results, key=lambda method: d.results[method][metric].value)
            blind = d.blind.metrics[metric].value
            headlines.append(headline(d, metric, best, blind, d.blind.differences[best][metric]))
    return headlines


def image_lead(headlines: Sequence[Headline]) -> str:
    """The sentence on what the image contributes to the best method."""
    places = [f"{h.change} points {h.interval} on {h.dataset} ({h.metric}, {h.method})" for h in headlines]
    return f"Compared with the texts alone, the image contributes {names(places)}."


def blind_reasons(datasets: Sequence[DatasetResults]) -> list[str]:
    """For each dataset whose blind baseline is at chance by construction: why."""
    return [f"{d.name}: the blind baseline is at chance, since {d.blind.reason}." for d in datasets if d.blind.reason]


def leaders(dataset: DatasetResults, resampling: Resampling) -> list[str]:
    """The best method by the headline metric, then those that it is not shown to outperform."""
    values = {method: row[dataset.headline].value for method, row in dataset.results.items()}
    best, *others = sorted(values, key=lambda method: -values[method])

    def verdict(other: str) -> str:
        return compare(dataset, best, other, [dataset.headline], resampling)[0].verdict

    return [best, *(other for other in others if verdict(other) != "higher")]


def counted(comparisons: Sequence[Comparison]) -> str:
    """Return such as "higher on 9, lower on 1 and not shown to differ on 2"."""
    counts = Counter(c.verdict.replace("no difference shown", "not shown to differ") for c in comparisons)
    return names([f"{word} on {counts[word]}" for word in ("higher", "lower", "not shown to differ") if counts[word]])


def lead(
    datasets: Sequence[DatasetResults],
    comparisons: Sequence[Comparison],
    before: str | None,
    after: str,
    resampling: Resampling,
) -> str:
    """The one-sentence summary: on how many datasets prompting helps, and which method leads where."""
    clauses = []
    if comparisons:
        headline_metrics = {(d.name, d.headline) for d in datasets}
        rows = [c for c in comparisons if (c.dataset, c.metric) in headline_metrics]
        clauses.append(
            f"with few-shot prompting ({after} vs. {before}) accuracy is {counted(rows)} of {len(rows)} datasets"
        )
    alone: dict[str, list[str]] = {}
    shared = []
    for dataset in datasets:
        methods = leaders(dataset, resampling)
        values = [f"{percent(dataset.results[method][dataset.headline].value)}\u00a0%" for method in methods]
        if len(methods) == 1:
            alone.setdefault(methods[0], []).append(f"{dataset.name} ({values[0]})")
        else:
            pairs = [f"{method} ({value})" for method, value in zip(methods, values, strict=True)]
            shared.append(f"on {dataset.name} no difference is shown between {names(pairs)}")
    clauses += [f"{method} leads on {names(places)}" for method, places in alone.items()] + shared
    text = "; ".join(clauses)
    return f"{text[:1].upper()}{text[1:]}."


def above_chance(methods: Sequence[str], datasets: Sequence[DatasetResults]) -> list[str]:
    """For each method, on how many metrics its interval lies above chance."""
    sentences = []
    for method in methods:
        above = below = total = 0
        for d in (d for d in datasets if method in d.results):
            for metric in d.metrics:
                level = d.chance[metric]
                total += 1
                below += d.results[method][metric].high < level
                above += d.results[method][metric].low > level
        rest = f", below chance on {below}" if below else ""
        if total:
            sentences.append(f"{method} is above chance on {above} of {total} metrics{rest}.")
    return sentences


def tally(a: str, b: str, comparisons: Sequence[Comparison]) -> str:
    """On how many metrics a is higher, lower or not shown to differ, and on how many the intervals are disjoint."""
    disjoint = sum(not c.overlap for c in comparisons)
    return (
        f"{a} vs. {b}: {counted(comparisons)} of {len(comparisons)} metrics; "
        f"the intervals of the two methods are disjoint on {disjoint}."
    )


def value_text(name: str, value: Interval) -> str:
    return f"{name} {percent(value.value)} % {interval(value)}"


def headline_text(dataset: DatasetResults, method: str) -> str:
    """A method's headline metric with its interval."""
    return value_text(method, dataset.results[method][dataset.headline])


def unbeaten(method: str, parts: Sequence[str], compared: ByOpponent, datasets: Sequence[DatasetResults]) -> list[str]:
    """By dataset, which methods a fusion is not shown to outperform on the headline metric, and how its parts score.

    A part fitted alone has a weight per noise level, so it can differ from the method of the same name.
    """
    sentences = []
    for d in datasets:
        rivals = [
            opponent
            for opponent, rows in compared.items()
            if any((c.dataset, c.metric) == (d.name, d.headline) and c.verdict != "higher" for c in rows)
        ]
        if not rivals:
            continue
        fitted = d.ablations.get(method, {}).get("parts", {})
        alone = [value_text(part, fitted[part][d.headline]) for part in parts if part in fitted]
        values = f"; fitted alone, its parts reach {names(alone)}" if alone else ""
        sentences.append(f"{method} is not shown to outperform {names(rivals)} on {d.name} ({d.headline}){values}.")
    return sentences


def reasons(
    claims: Sequence[Claim], datasets: Sequence[DatasetResults], tested: str, denoisers: Sequence[str], scope: str
) -> list[str]:
    """For each claim that does not hold: the comparison that binds, and related values on its dataset.

    scope: as in `tables.claims`.
    """
    sentences = []
    for number, claim, comparisons in claims:
        if claim.verdict == "holds":
            continue
        row = comparisons[claim.binding]
        dataset = next(d for d in datasets if d.name == row["dataset"])
        must = f", must exceed {points(claim.least)}" if claim.least else ""
        verdict = f"Claim {number} ({claim.verdict} {scope})"
        binds = f"{verdict} fails at {compared(row)} ({points(claim.effect)} points{must})"
        key = CLAIM_KEYS.get(number)
        if key is not None and tested in dataset.ablations:
            values = {text: result[dataset.headline] for text, result in dataset.ablations[tested][key].items()}
            best = max(values, key=lambda text: values[text].value)
            sentences.append(f"{binds}; the best variant by {key} is {value_text(f'“{best}”', values[best])}.")
        else:
            methods = names([headline_text(dataset, name) for name in (tested, *denoisers) if name in dataset.results])
            sentences.append(f"{binds}; {dataset.headline} there: {methods}.")
    return sentences
