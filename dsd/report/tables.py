"""The tables: results with intervals and chance, paired comparisons, costs and params. Numbers in, words and cells out.

Shapes: n test examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsd.config import Params, twin
from dsd.datasets import benchmark
from dsd.metrics import SQUARE_CHANCE
from dsd.report.inputs import Claims, Dataset
from dsd.statistics import Difference, Interval, paired_difference

NONE = "–"
UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""  # set smaller, after the text
    mark: str = ""  # "best", or a verdict


@dataclass(frozen=True)
class Row:
    head: str
    cells: list[Cell]
    kind: str = ""  # "chance" or "total" are set apart


@dataclass(frozen=True)
class Table:
    caption: str
    head: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Comparison:
    """One metric of one dataset: method a minus method b on the same examples."""

    dataset: str
    metric: str
    difference: Difference
    overlap: bool  # whether the two methods' own intervals overlap

    @property
    def verdict(self) -> str:
        """What the interval of the difference allows to be said of a."""
        if self.difference.low > 0:
            return "higher"
        return "lower" if self.difference.high < 0 else "no difference shown"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """Percentage points with a sign; what rounds to zero has none."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def interval(found: Interval) -> str:
    return f"[{percent(found.low)}, {percent(found.high)}]"


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: float) -> str:
    """Thousands are set apart by a narrow space that does not break."""
    return f"{number:,.0f}".replace(",", "\u202f")


def chance(dataset: Dataset) -> dict[str, float]:
    """What each metric gives a scorer that ranks at random: its mean over ranks 1…candidates, all alike likely.

    The ranks of squares are not.
    """
    candidates_n = dataset.candidates
    expected: dict[str, Any] = {}
    for rank in range(1, int(candidates_n.max()) + 1):
        share_n = SQUARE_CHANCE[rank - 1] if dataset.squares else (rank <= candidates_n) / candidates_n
        for metric, (hits_n, _) in dataset.hits(np.full(len(candidates_n), rank)).items():
            expected[metric] = expected.get(metric, 0) + share_n * hits_n
    groups = {metric: masks for metric, (_, masks) in dataset.hits(candidates_n).items()}
    return {m: float(np.mean([expected_n[mask].mean() for mask in groups[m]])) for m, expected_n in expected.items()}


def results(dataset: Dataset) -> Table:
    """Methods × metrics with intervals, the best of each column marked, and the level of chance."""
    first = next(iter(dataset.results.values()))
    best = {metric: max(row[metric].value for row in dataset.results.values()) for metric in first}
    rows = [
        Row(
            method,
            [
                Cell(f"{percent(v.value)} %", interval(v), "best" if v.value == best[metric] else "")
                for metric, v in row.items()
            ],
        )
        for method, row in dataset.results.items()
    ]
    level = chance(dataset)
    rows.append(Row("chance", [Cell(f"{percent(level[metric])} %") for metric in first], "chance"))
    head = ["method", *(f"{metric}\nn = {count(v.n)}" for metric, v in first.items())]
    return Table(f"{dataset.name}: share of right answers", head, rows)


def opponents(method: str, params: Params, dataset: Dataset) -> list[str]:
    """Whom a method is compared with: the trained method's zero-shot twin first, then every other."""
    if method not in dataset.results:
        return []
    others = [other for other in dataset.methods if other != method]
    return sorted(others, key=lambda other: other != twin(params))


def compare(dataset: Dataset, a: str, b: str, metrics: Sequence[str], params: Params) -> list[Comparison]:
    """a − b on metrics of the dataset, with the clusters and resamples of the metrics' own intervals."""
    clusters = [example.cluster for example in dataset.examples]
    settings = dict(params.evaluate.model_dump(), seed=params.seed)
    hits_a, hits_b = dataset.hits(dataset.ranks[a]), dataset.hits(dataset.ranks[b])
    found = []
    for metric in metrics:
        hits_n, groups = hits_a[metric]
        difference = paired_difference(hits_n, hits_b[metric][0], clusters, groups, **settings)
        own, other = dataset.results[a][metric], dataset.results[b][metric]
        found.append(Comparison(dataset.name, metric, difference, own.low <= other.high and other.low <= own.high))
    return found


def comparisons(a: str, b: str, found: Sequence[Comparison]) -> Table:
    rows = [
        Row(
            c.dataset,
            [
                Cell(c.metric),
                Cell(points(c.difference.value), f"[{points(c.difference.low)}, {points(c.difference.high)}]"),
                Cell(c.verdict, mark=c.verdict.split()[0]),
                Cell(p_value(c.difference.p)),
                Cell(count(c.difference.n)),
                Cell("overlap" if c.overlap else "apart"),
            ],
        )
        for c in found
    ]
    head = ["dataset", "metric", "difference\npercentage points", f"{a} is", "p", "n", "own intervals"]
    return Table(f"{a} − {b}", head, rows)


MARKS = {"holds": "higher", "contradicted": "lower", "not shown": "no"}


def claims(found: Claims) -> Table:
    """The verdict on each claim of the papers."""
    rows = [
        Row(
            number,
            [
                Cell(claim.claim),
                Cell(claim.verdict, mark=MARKS[claim.verdict]),
                Cell(points(claim.effect), f"[{points(claim.low)}, {points(claim.high)}]"),
                Cell(p_value(claim.p)),
                Cell(count(len(rows))),
            ],
        )
        for number, claim, rows in found
    ]
    head = ["claim", "", "verdict", "smallest difference\npercentage points", "p\ncorrected", "comparisons"]
    return Table("Claims", head, rows)


def claim_comparisons(found: Claims) -> Table:
    """Every comparison that a claim rests on."""
    rows = [
        Row(
            number,
            [
                Cell(row["dataset"]),
                Cell(row["metric"]),
                Cell(row["a"]),
                Cell(row["b"]),
                Cell(points(row["value"]), f"[{points(row['low'])}, {points(row['high'])}]"),
                Cell(p_value(row["p"])),
                Cell(f"{row['cohens_h']:+.2f}".replace("-", "−")),
                Cell(count(row["n"])),
            ],
        )
        for number, _, rows in found
        for row in rows
    ]
    head = ["claim", "dataset", "metric", "a", "b", "a − b\npercentage points", "p", "Cohen’s h", "n"]
    return Table("What the claims rest on", head, rows)


LOST = {  # column → the stage and the key of its summary
    "pictures\nstored": ("prepare", "images"),
    "pictures\nquarantined": ("prepare", "quarantined"),
    "examples\ndropped for it": ("prepare", "dropped"),
    "examples that\nshared a picture": ("prepare", "shared"),
    "texts\nencoded": ("cache", "texts"),
    "texts\ntruncated": ("cache", "truncated"),
    "damaged files\ncache": ("cache", "corrupt"),
    "damaged files\nscore": ("score", "corrupt"),
}


def lost(datasets: Sequence[Dataset]) -> Table:
    """How many pictures, examples, texts and files did not come through whole."""

    def cell(dataset: Dataset, stage: str, key: str) -> Cell:
        value = dataset.summaries.get(stage, {}).get(key)
        return Cell(UNKNOWN if value is None else count(value))

    rows = [Row(d.name, [cell(d, stage, key) for stage, key in LOST.values()]) for d in datasets]
    return Table("What did not come through whole", ["dataset", *LOST], rows)


def timings(stages: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Table:
    """Seconds by stage and dataset. The frozen stage `pretrain` is no part of a reproduction, so not of the total."""

    def seconds(stage: Mapping[str, Any], name: str) -> Cell:
        detail = stage["details"].get(name, {})
        return Cell(duration(detail["seconds"]) if "seconds" in detail else NONE)

    def row(name: str, stage: Mapping[str, Any]) -> Row:
        parts = [seconds(stage, dataset) for dataset in names]
        where = [Cell(stage["finished"].replace("T", " ").replace("+00:00", " UTC")), Cell(stage["device"])]
        return Row(name, [Cell(duration(stage["seconds"])), *parts, *where])

    rows = [row(name, stage) for name, stage in stages.items()]
    counted = [stage for name, stage in stages.items() if name != "pretrain"]
    if counted:
        total = Cell(duration(sum(stage["seconds"] for stage in counted)))
        blank = [Cell("") for _ in range(len(names) + 2)]
        rows.append(Row("total without pretrain" if "pretrain" in stages else "total", [total, *blank], "total"))
    return Table("Time by stage", ["stage", "time", *names, "finished", "device"], rows)


def throughput(datasets: Sequence[Dataset]) -> Table:
    """How fast the stage `score` computed evidence."""
    rows = []
    for dataset in datasets:
        summary = dataset.summaries.get("score", {})
        texts = [count(summary[key]) if key in summary else UNKNOWN for key in ("pairs", "rows", "computed")]
        computed, seconds = summary.get("computed"), summary.get("seconds")
        texts.append(duration(seconds) if seconds is not None else UNKNOWN)
        texts.append(f"{computed / seconds:.0f}" if computed and seconds else NONE)
        rows.append(Row(dataset.name, [Cell(text) for text in texts]))
    head = ["dataset", "pairs", "rows\npair × draw × prompt", "computed\nin the last run", "time", "rows per second"]
    return Table("Evidence: passes through the U-Net", head, rows)


def _plain(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def methods(params: Params) -> Table:
    """The rows of `methods` with everything that params.yaml says of them."""
    dumped = {name: method.model_dump() for name, method in params.methods.items()}
    keys = list(dict.fromkeys(key for row in dumped.values() for key in row))
    keys = sorted(keys, key=lambda key: key != "scorer")
    rows = [Row(name, [Cell(_plain(row.get(key))) for key in keys]) for name, row in dumped.items()]
    return Table("Methods", ["method", *keys], rows)


def datasets(found: Sequence[Dataset]) -> Table:
    """What is asked, of how many examples."""
    rows = []
    for d in found:
        first, candidates = d.examples[0], d.candidates
        low, high = int(candidates.min()), int(candidates.max())
        shape = f"{len(first.images)} × {len(first.texts)}" if low == high else f"{low} to {high} candidates"
        told = [Cell(d.citation), Cell(benchmark(d.kind).licence)]
        rows.append(Row(d.name, [Cell(shape), *(Cell(count(n)) for n in d.counts.values()), *told]))
    return Table("Datasets", ["dataset", "images × texts", *next(iter(found)).counts, "source", "licence"], rows)


def settings(params: Params) -> Table:
    """Every further parameter that the numbers depend on, by its key in params.yaml."""
    sections = {
        "images": params.images,
        "noise": params.noise,
        "evidence": params.evidence,
        "prompt": params.prompt,
        "context": params.context,
        **{f"training.{method}": row for method, row in params.training.items()},
        "evaluate": params.evaluate,
    }
    rows = [
        Row(f"{section}.{key}", [Cell(_plain(value))])
        for section, model in sections.items()
        for key, value in model.model_dump().items()
    ]
    return Table("Parameters", ["key", "value"], [Row("seed", [Cell(str(params.seed))]), *rows])
