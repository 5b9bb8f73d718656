"""Tables of the report, and the formats of its numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsd.config import MethodParams, Params
from dsd.datasets import benchmark
from dsd.report.inputs import Claim, ClaimsAtPaper, DatasetResults
from dsd.statistics import Interval

NONE = "–"
UNKNOWN = "not recorded"
REFERENCE = "reference"  # instead of the difference of a row from itself


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""  # in small type after the text
    mark: str = ""  # CSS class: "best", or "higher", "lower" or "no" of a verdict


@dataclass(frozen=True)
class Row:
    head: str
    cells: list[Cell]
    kind: str = ""  # CSS class: "chance" or "total"


@dataclass(frozen=True)
class Table:
    caption: str
    head: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Column:
    """The headline metric of one dataset for every method; `chance` is that of random scores."""

    dataset: str
    metric: str
    chance: float
    values: dict[str, Interval]


def names(items: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(difference: float) -> str:
    """Percentage points with a sign, except a rounded zero."""
    text = f"{100 * difference:+.1f}"
    return "0.0" if float(text) == 0 else text.replace("-", "−")


def bounds(low: float, high: float, text: Callable[[float], str] = points) -> str:
    return f"[{text(low)}, {text(high)}]"


def interval(value: Interval) -> str:
    return bounds(value.low, value.high, percent)


def p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: float) -> str:
    """An integer with thousands separated by a narrow no-break space."""
    return f"{number:,.0f}".replace(",", "\u202f")


def utc(timestamp: str) -> str:
    """An ISO 8601 timestamp in UTC, for reading."""
    return timestamp.replace("T", " ").replace("+00:00", " UTC")


def percent_cell(value: Interval | None, unit: str = " %", mark: str = "") -> Cell:
    return Cell(NONE) if value is None else Cell(percent(value.value) + unit, interval(value), mark)


def points_cell(value: float, low: float, high: float) -> Cell:
    return Cell(points(value), bounds(low, high))


def best_of(values: Sequence[Interval]) -> float:
    return max((v.value for v in values), default=0.0)


def calibrated(datasets: Sequence[DatasetResults]) -> Table | None:
    """Each method with prior-calibrated scores minus itself; None if no dataset has calibrated scores."""
    columns = [(d, metric) for d in datasets if d.blind.calibrated for metric in d.leading]
    methods = dict.fromkeys(method for d, _ in columns for method in d.blind.calibrated)
    rows = [
        Row(
            method,
            [
                points_cell(v.value, v.low, v.high)
                if (v := d.blind.calibrated.get(method, {}).get(metric))
                else Cell(NONE)
                for d, metric in columns
            ],
        )
        for method in methods
    ]
    head = ["calibrated − plain\npercentage points", *(f"{d.name}\n{metric}" for d, metric in columns)]
    return Table("Prior-calibrated scores", head, rows) if rows else None


POINTS = "a − b\npercentage points"


def replicates(counts: Mapping[str, int]) -> str:
    """How many few-shot samples and noise sets a row of claims.json or comparisons.json is the mean of: "3 × 2"."""
    samples, noise_sets, measured = (counts[key] for key in ("samples", "noise_sets", "replicates"))
    grid = f"{samples} × {noise_sets}"
    return grid if measured == samples * noise_sets else f"{measured} of {grid}"


def shots(paper: ClaimsAtPaper) -> str:
    """Such as "270 examples"."""
    return f"{names([count(number) for number in dict.fromkeys(paper.few_shot.values())])} examples"


def compared(row: Mapping[str, Any]) -> str:
    """A row of comparisons.json in words."""
    return f"{row['dataset']}, {row['metric']}: {row['a']} vs. {row['b']}"


def claim_comparisons(judged: Sequence[Claim], papers: Sequence[ClaimsAtPaper]) -> Table:
    """Every comparison that the verdicts are derived from."""
    claims = [(claim.number, claim) for claim in judged]
    claims += [(f"{claim.number}, {shots(paper)}", claim) for paper in papers for claim in paper.claims]
    rows = [
        Row(
            number,
            [
                *(Cell(row[key]) for key in ("dataset", "metric", "a", "b")),
                points_cell(row["value"], row["low"], row["high"]),
                Cell(points(row["least"])),
                Cell(p_value(row["p"])),
                Cell(f"{row['cohens_h']:+.2f}".replace("-", "−")),
                Cell(count(row["n"])),
                Cell(replicates(row)),
            ],
        )
        for number, claim in claims
        for row in claim.comparisons
    ]
    grid = "samples\n× noise sets"
    head = ["claim", "dataset", "metric", "a", "b", POINTS, "must\nexceed", "p", "Cohen’s h", "n", grid]
    return Table("Comparisons behind the claims", head, rows)


LOSSES = {  # column → the stage and the key of its summary
    "images\nstored": ("prepare", "images"),
    "images\nquarantined": ("prepare", "quarantined"),
    "examples dropped\nfor unreadable images": ("prepare", "dropped"),
    "examples left out\nfor shared images": ("prepare", "shared"),
    "texts\nencoded": ("cache", "texts"),
    "texts\ntruncated": ("cache", "truncated"),
    "corrupt files\ncache": ("cache", "corrupt"),
    "corrupt files\nscore": ("score", "corrupt"),
}


def losses(results: Sequence[DatasetResults]) -> Table:
    """Counts of images, examples, texts and files that were excluded, truncated or recomputed."""

    def cell(dataset: DatasetResults, stage: str, key: str) -> Cell:
        value = dataset.summaries.get(stage, {}).get(key)
        return Cell(UNKNOWN if value is None else count(value))

    rows = [
        Row(d.name, [*(cell(d, stage, key) for stage, key in LOSSES.values()), Cell(count(len(d.indistinct)))])
        for d in results
    ]
    return Table("Data loss", ["dataset", *LOSSES, "test examples left out\nas ties"], rows)


def timings(stages: Mapping[str, Mapping[str, Any]], datasets: Sequence[str]) -> Table:
    """Time by stage and dataset. The total leaves out the frozen stage `pretrain`: it is not part of a reproduction."""

    def seconds(stage: Mapping[str, Any], dataset: str) -> Cell:
        detail = stage["details"].get(dataset, {})
        return Cell(duration(detail["seconds"]) if "seconds" in detail else NONE)

    rows = [
        Row(
            name,
            [
                Cell(duration(stage["seconds"])),
                *(seconds(stage, dataset) for dataset in datasets),
                Cell(utc(stage["finished"])),
                Cell(stage["device"]),
            ],
        )
        for name, stage in stages.items()
    ]
    counted = [stage for name, stage in stages.items() if name != "pretrain"]
    if counted:
        total = Cell(duration(sum(stage["seconds"] for stage in counted)))
        blank = [Cell("") for _ in range(len(datasets) + 2)]
        rows.append(Row("total without pretrain" if "pretrain" in stages else "total", [total, *blank], "total"))
    return Table("Time by stage", ["stage", "time", *datasets, "finished", "device"], rows)


def throughput(results: Sequence[DatasetResults]) -> Table:
    """The rate at which the stage `score` computed evidence."""
    rows = []
    for dataset in results:
        summary = dataset.summaries.get("score", {})
        texts = [count(summary[key]) if key in summary else UNKNOWN for key in ("pairs", "rows", "computed")]
        computed, seconds = summary.get("computed"), summary.get("seconds")
        texts.append(duration(seconds) if seconds is not None else UNKNOWN)
        texts.append(f"{computed / seconds:.0f}" if computed and seconds else NONE)
        rows.append(Row(dataset.name, [Cell(text) for text in texts]))
    head = ["dataset", "pairs", "rows\npair × draw × prompt", "computed\nin the last run", "time", "rows per second"]
    return Table("Evidence: U-Net passes", head, rows)


def _plain(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def methods(rows: Mapping[str, MethodParams]) -> Table:
    """The section `methods` of params.yaml."""
    dumped = {name: method.model_dump() for name, method in rows.items()}
    keys = list(dict.fromkeys(key for row in dumped.values() for key in row))
    keys = sorted(keys, key=lambda key: key != "scorer")
    cells = [Row(name, [Cell(_plain(row.get(key))) for key in keys]) for name, row in dumped.items()]
    return Table("Methods", ["method", *keys], cells)


def datasets(results: Sequence[DatasetResults]) -> Table:
    """Shape, number of examples, source and licence of each dataset."""
    rows = []
    for d in results:
        first, candidates, source = d.examples[0], d.candidates, benchmark(d.kind)
        low, high = int(candidates.min()), int(candidates.max())
        shape = f"{len(first.images)} × {len(first.texts)}" if low == high else f"{low} to {high} candidates"
        texts = [shape, *map(count, d.counts.values()), source.citation, source.licence]
        rows.append(Row(d.name, [Cell(text) for text in texts]))
    return Table("Datasets", ["dataset", "images × texts", *results[0].counts, "source", "licence"], rows)


def settings(params: Params) -> Table:
    """The other parameters that results depend on, by their key in params.yaml."""
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
