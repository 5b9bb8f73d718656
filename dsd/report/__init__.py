"""The report: one HTML page that opens offline, every number of it computed from the data folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dsd.config import ContrastiveMethod, FusionMethod, Params, noise_of, trained, twin, under_test
from dsd.progress import progress
from dsd.report import figures, findings, paper, races, studies, tables
from dsd.report.gallery import MAPPED, BackboneHeatMaps, HeatMaps, gallery, noisy
from dsd.report.inputs import Dataset, read_claims, read_datasets, read_growth, read_races, read_studies, read_timings
from dsd.store import write_atomic

__all__ = ["build", "environment"]


def build(params: Params, data: Path, target: Path, heatmaps: HeatMaps | None = None) -> Path:
    """Writes `target/index.html` from the folder `data` and returns its path.

    Args:
        heatmaps: where words look in pictures; None opens the backbone of the params with the trained prompts.

    Raises:
        DataError: what an earlier stage must have left is missing, broken, or of other params; one line.
        CheckpointError: the backbone or a prompt does not load; one line.
    """
    timings = read_timings(data)
    datasets = read_datasets(params, data, timings)
    heat = heatmaps or BackboneHeatMaps(params, data / "train")
    method = under_test(params)
    fused = [name for name, row in params.methods.items() if isinstance(row, FusionMethod)]
    sides = {name: _compared(name, datasets, params) for name in (method, *fused)}
    # What is fused is compared with the trained method once, from its own side.
    compared = sides[method] = {other: rows for other, rows in sides[method].items() if other not in fused}
    judged = read_claims(data)
    raced = read_races(params, data)
    clips = [name for name, row in params.methods.items() if isinstance(row, ContrastiveMethod) and row.tuned == "none"]
    shown = [d for d in datasets if method in d.results]
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            params=params,
            method=method,
            twin=twin(params),
            trained=trained(params),
            run=_run(params, heat, timings),
            lead=findings.lead(datasets, compared, params),
            headlines=findings.headlines(datasets, compared, params),
            answers=_answers(sides, datasets, params),
            results=[tables.results(d) for d in datasets],
            legend=_legend(datasets, params),
            comparisons=[row for name, rows in sides.items() for row in _comparisons(name, rows, params)],
            tests=sum(len(rows) for side in sides.values() for rows in side.values()),
            claims=[tables.claims(judged), tables.claim_comparisons(judged)] if judged else [],
            paper=list(paper.tables(params, datasets)),
            redrawn=paper.drawings(params, datasets),
            reasons=findings.reasons(judged, datasets, params),
            subsets=params.ablations.subsets,
            fitting=params.fusion,
            parts=findings.names([part for row in params.methods.values() for part in getattr(row, "parts", ())]),
            figures=_figures(datasets, params),
            races=list(races.races(raced)),
            growth=races.growth(read_growth(data)),
            second=list(races.paper(raced, datasets, next(iter(clips), None))),
            noisy=[noisy(d, params, data / "prepare" / d.name, heat) for d in races.classified(raced, shown)],
            studies=list(studies.studies(params, read_studies(data), datasets, _series(params))),
            galleries=[gallery(d, params, data / "prepare" / d.name, heat) for d in progress(shown, desc="gallery")],
            mapped=MAPPED,
            lost=tables.lost(datasets),
            quarantine=[(d.name, row["name"], row["reason"]) for d in datasets for row in d.quarantine],
            timings=tables.timings(timings, list(params.datasets)) if timings else None,
            throughput=tables.throughput(datasets),
            methods=tables.methods(params),
            datasets=tables.datasets(datasets),
            settings=tables.settings(params),
            confidence=f"{100 * params.evaluate.confidence:g} %",
        )
    )
    write_atomic(target / "index.html", page.encode())
    return target / "index.html"


def environment() -> Environment:
    return Environment(
        loader=PackageLoader("dsd.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _compared(method: str, datasets: Sequence[Dataset], params: Params) -> dict[str, list[tables.Comparison]]:
    """A method against each opponent, over all datasets on which both were evaluated."""
    found: dict[str, list[tables.Comparison]] = {}
    for dataset in datasets:
        for opponent in tables.opponents(method, params, dataset):
            rows = tables.compare(dataset, method, opponent, dataset.metrics, params)
            found.setdefault(opponent, []).extend(rows)
    return found


def _run(params: Params, heat: HeatMaps, timings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What was run, as terms and values."""
    row, images = params.backbones[params.backbone], params.images
    parity = (
        f"parity: {images.parity} → {images.resolution} pixels"
        if images.parity
        else f"direct: {images.resolution} pixels"
    )
    devices = dict.fromkeys(timings[stage]["device"] for stage in ("train", "score") if stage in timings)
    finished = max((str(stage["finished"]) for name, stage in timings.items() if name != "pretrain"), default="")
    return [
        ("checkpoint", f"{params.backbone} ({row.source}{'@' + row.revision if row.revision else ''}, {row.dtype})"),
        ("digest", heat.digest),
        ("images", parity),
        ("noise levels", ", ".join(map(str, params.noise.levels))),
        ("draws at each", ", ".join(f"{name} {noise_of(params, name).draws_per_level}" for name in params.datasets)),
        ("λ of eq. 3", f"{params.evidence.scale:g}"),
        ("finished", finished.replace("T", " ").replace("+00:00", " UTC") or tables.UNKNOWN),
        ("device", "; ".join(devices) or tables.UNKNOWN),
    ]


def _answers(
    sides: Mapping[str, findings.Compared], datasets: Sequence[Dataset], params: Params
) -> list[tuple[str, list[str]]]:
    """The reader's questions, with the sentences that answer them; the first side is the trained method's."""
    before = twin(params)
    tallies = {
        (method, opponent): findings.tally(method, opponent, rows)
        for method, compared in sides.items()
        for opponent, rows in compared.items()
    }
    helps = under_test(params), before
    answers = [
        ("Does it tell right from wrong untrained?", findings.above_chance(datasets, params)),
        ("Does few-shot prompting help?", [tallies[helps]] if helps in tallies else []),
        ("How does it compare?", [tally for pair, tally in tallies.items() if pair != helps]),
        (
            "What does fusion not beat, and why?",
            [
                sentence
                for method, compared in sides.items()
                if method != under_test(params)
                for sentence in findings.unbeaten(method, compared, datasets, params)
            ],
        ),
    ]
    return [(question, sentences) for question, sentences in answers if sentences]


def _comparisons(method: str, compared: findings.Compared, params: Params) -> list[tuple[tables.Table, str, list[str]]]:
    """A table for each opponent, its tally, and for the trained method's zero-shot twin which intervals overlap."""
    return [
        (
            tables.comparisons(method, opponent, rows),
            findings.tally(method, opponent, rows),
            findings.overlaps(rows) if (method, opponent) == (under_test(params), twin(params)) else [],
        )
        for opponent, rows in compared.items()
    ]


def _series(params: Params) -> dict[str, int]:
    return {method: number for number, method in enumerate(params.methods)}


def _legend(datasets: Sequence[Dataset], params: Params) -> list[tuple[str, str, int]]:
    """(method, symbol, number of its colour) as the figures show them."""
    shown = {method for dataset in datasets for method in dataset.methods}
    return [(m, figures.SYMBOLS[n % 8], n % 8) for m, n in _series(params).items() if m in shown]


def _alike(datasets: Sequence[Dataset]) -> list[list[str]]:
    """The methods that were taken apart, those with the same keys together."""
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for dataset in datasets:
        for method, by_key in dataset.ablations.items():
            found.setdefault(tuple(by_key), {})[method] = None
    return [list(methods) for methods in found.values()]


def _figures(datasets: Sequence[Dataset], params: Params) -> dict[str, list[figures.Drawing]]:
    method, before, series = under_test(params), twin(params), _series(params)
    pairs = [d for d in datasets if d.candidates.max() == 2 and {method, before} <= set(d.results)]
    return {
        "accuracy": [figures.accuracy(d, series) for d in datasets],
        "ablations": [
            figures.ablations(d, methods, series) for methods in _alike(datasets) for d in datasets if d.ablations
        ],
        "margins": [figures.margins(d, [m for m in d.methods if m in (before, method)], series) for d in pairs],
        "ranks": [figures.ranks(d, series) for d in datasets if d.candidates.max() > 2 and not d.squares],
        "curves": [figures.curves(d, trained, series) for d in datasets for trained in d.curves],
    }
