"""The claims of the papers as cards, each with its verdict, and the comparison that binds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dsd.report.inputs import Claim, ClaimsAtPaper, DatasetResults
from dsd.report.tables import bounds, compared, count, interval, names, p_value, percent, points, replicates, shots
from dsd.statistics import Interval

CLAIM_KEYS = {"5": "layers", "6": "pooling", "7": "heads", "8": "heads", "9": "levels"}  # claim → ablated key
SYMBOLS = {"holds": "✓", "contradicted": "✕", "not shown": "○"}
SOURCES = {**dict.fromkeys(map(str, range(1, 11)), "first paper"), **dict.fromkeys(("11", "12", "13"), "second paper")}
OURS = "this project"  # source of the other claims


@dataclass(frozen=True)
class Card:
    """A claim. facts: p, and what the verdict rests on. reason: related results if the claim does not hold."""

    number: str
    source: str
    claim: str
    verdict: str
    scope: str
    symbol: str
    effect: str
    interval: str
    must: str
    n: str
    binding: str
    facts: list[str]
    reason: str


def cards(
    judged: Sequence[Claim],
    scope: str,
    papers: Sequence[ClaimsAtPaper],
    datasets: Sequence[DatasetResults],
    tested: str,
    denoisers: Sequence[str],
) -> Iterator[Card]:
    """One per claim. scope: what the verdicts are about, such as "on drawn scenes, with this model"."""
    for number, claim, comparisons in judged:
        row = comparisons[claim.binding]
        again = [f"at the paper’s {shots(paper)}: {text}" for paper in papers if (text := at_paper(number, paper))]
        yield Card(
            number,
            SOURCES.get(number, OURS),
            claim.claim,
            claim.verdict,
            scope,
            SYMBOLS[claim.verdict],
            points(claim.effect),
            bounds(claim.low, claim.high),
            points(claim.least),
            count(row["n"]) if "n" in row else "",
            compared(row),
            [
                f"p {p_value(claim.p)}, corrected",
                f"{count(len(comparisons))} comparisons",
                f"{replicates(vars(claim))} few-shot samples × noise sets",
                *again,
            ],
            "" if claim.verdict == "holds" else reason(number, row, datasets, tested, denoisers),
        )


def tally(cards: Sequence[Card]) -> str:
    """How many claims have which verdict."""
    verdicts = [card.verdict for card in cards]
    return names([f"{verdicts.count(v)} {v.replace('holds', 'hold')}" for v in SYMBOLS if v in verdicts])


def at_paper(number: str, paper: ClaimsAtPaper) -> str:
    """The verdict on a claim at the paper's number of few-shot examples, with the difference that binds."""
    claim = next((one.judgement for one in paper.claims if one.number == number), None)
    if claim is None:
        return ""
    return f"{claim.verdict}: {points(claim.effect)} {bounds(claim.low, claim.high)}, p {p_value(claim.p)}"


def value_text(name: str, value: Interval) -> str:
    return f"{name} {percent(value.value)} % {interval(value)}"


def reason(
    number: str, row: Mapping[str, str], datasets: Sequence[DatasetResults], tested: str, denoisers: Sequence[str]
) -> str:
    """Results on the dataset of the comparison that binds, `row`, which say more about a claim that does not hold."""
    dataset = next(d for d in datasets if d.name == row["dataset"])
    key = CLAIM_KEYS.get(number)
    if key is not None and tested in dataset.ablations:
        variants = {text: result[dataset.headline] for text, result in dataset.ablations[tested][key].items()}
        best = max(variants, key=lambda text: variants[text].value)
        return f"The best variant by {key} there is {value_text(f'“{best}”', variants[best])}."
    methods = [m for m in (tested, *denoisers) if m in dataset.results]
    values = [value_text(m, dataset.results[m][dataset.headline]) for m in methods]
    return f"On {dataset.name} ({dataset.headline}): {names(values)}."
