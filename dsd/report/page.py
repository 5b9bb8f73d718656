"""Assemble the report from the data folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dsd.config import FusionMethod, Params
from dsd.experiments.scaling import read_scaling
from dsd.progress import progress
from dsd.report import charts, claims, examples, inputs, overview, papers, races, studies, tables
from dsd.report.downloads import downloads
from dsd.report.heatmaps import HeatMaps
from dsd.report.html import render
from dsd.report.inputs import DatasetResults
from dsd.report.matrix import Matrix, differences, matrix, metrics_shown
from dsd.statistics import Resampling


def build(params: Params, data: Path, target: Path, heatmaps: HeatMaps | None = None) -> Path:
    """Write `target/index.html` from the folder `data` and return its path.

    Args:
        heatmaps: source of the heat maps; None opens the backbone of the params with the trained prompts.

    Raises:
        DataError: an output of an earlier stage is missing, malformed, or was made with other params.
        CheckpointError: the backbone or a prompt does not load.
    """
    timings = inputs.read_timings(data)
    datasets = inputs.read_datasets(params, data, timings)
    heat = heatmaps or HeatMaps(params, data / "train")
    method, evaluate = params.under_test, params.evaluate
    resampling = Resampling(resamples=evaluate.resamples, confidence=evaluate.confidence, seed=params.seed)
    (judged, at_paper), replays = inputs.read_claims(data), inputs.read_races(params.races.datasets, data)
    stored = {
        name: inputs.read_json(data / "evaluate" / f"{name}.json", "evaluate")
        for name in ("claims", "comparisons", "ablations", "studies")
    }
    drawn = all(row.generated for row in params.datasets.values())
    place = "drawn scenes" if drawn else tables.names(list(params.datasets))
    series = {name: number for number, name in enumerate(params.methods)}
    models, tested = overview.models_of(params), [d for d in datasets if method in d.results]
    gaps = differences(datasets, resampling)
    best, sides = overview.main_method(datasets, gaps), overview.sides(params)
    denoisers = [name for name, row in params.methods.items() if row.scorer == "denoising"]
    clips = {row.tuned: name for name, row in reversed(params.contrastive.items())}
    cards = list(claims.cards(judged, f"on {place}, with this model", at_paper, datasets, method, denoisers))
    columns = [overview.column(d) for d in datasets]
    matrices = _matrices(datasets, models, clips.get("none"), gaps)
    caption = "Accuracy on the test examples; dashed: chance"
    return render(
        "report.html.j2",
        target / "index.html",
        params=params,
        method=method,
        trained=params.trained,
        drawn=drawn,
        place=place,
        confidence=f"{100 * evaluate.confidence:g} %",
        facts=_facts(params, heat.digest, timings),
        verdict=overview.verdict(datasets, params, gaps, place),
        tiles=[overview.tile(d, sides, gaps) for d in datasets],
        lines=overview.lines(params, list(dict.fromkeys(m for d in datasets for m in d.methods))),
        look={name: (charts.SYMBOLS[n % 8], n % 8) for name, n in series.items()},
        wide=charts.accuracy(columns, series, min(4, len(columns)), caption),
        narrow=charts.accuracy(columns, series, min(2, len(columns)), caption),
        best=best,
        first=examples.first_card(datasets, best, data),
        matrices=matrices,
        gaps=json.dumps({m.name: m.gaps for m in matrices}, default=asdict, ensure_ascii=False),
        calibrated=tables.calibrated(datasets),
        blind_reasons=[f"{d.name}, since {d.blind.reason}" for d in datasets if d.blind.reason],
        claims=cards,
        tally=claims.tally(cards),
        comparisons=tables.claim_comparisons(judged, at_paper),
        first_paper=list(
            papers.first_paper((clips.get("projections"), clips.get("context"), params.prompted), datasets)
        ),
        first_paper_figures=papers.first_paper_figures(params.prompted, datasets),
        races=list(races.sections(replays)),
        race_charts=races.charts(replays),
        growth=races.growth(read_scaling(data / "races").get("rows", [])),
        second_paper=list(papers.second_paper(replays, datasets, clips.get("none"))),
        noisy=[examples.noisy_example(d, data / "prepare" / d.name, heat) for d in papers.classified(replays, tested)],
        studies=list(studies.sections(params, stored["studies"], datasets, series)),
        ablations=_ablations(datasets, series),
        ablated=params.ablations,
        fusion=params.fusion,
        training=[charts.training(d, name, series) for d in datasets for name in d.curves],
        examples=[
            card
            for d in progress(tested, desc="examples")
            for card in examples.cards(d, method, params.report.gallery, params.seed, data / "prepare" / d.name, heat)
        ],
        parts=tables.names([p for row in params.methods.values() if isinstance(row, FusionMethod) for p in row.parts]),
        losses=tables.losses(datasets),
        indistinct=[(d.name, id, reason) for d in datasets for id, reason in d.indistinct.items()],
        quarantine=[(d.name, row["name"], row["reason"]) for d in datasets for row in d.quarantine],
        timings=tables.timings(timings, list(params.datasets)) if timings else None,
        throughput=tables.throughput(datasets),
        methods=tables.methods(params.methods),
        datasets=tables.datasets(datasets),
        settings=tables.settings(params),
        downloads=downloads(params, datasets, models, gaps, stored),
        vega=charts.vega_bundle(),
    )


def _matrices(
    datasets: Sequence[DatasetResults], models: Mapping[str, str], clip: str | None, gaps: Any
) -> list[Matrix]:
    """The headline metrics of all datasets, then all metrics of each; differences are first from the zero-shot CLIP."""
    leading = [(d, metric) for d in datasets for metric in d.leading]
    every = [("all", "Headline metrics", leading)]
    every += [(d.name, d.name, [(d, metric) for metric in metrics_shown(d)]) for d in datasets]

    def reference(of: Sequence[tuple[DatasetResults, str]]) -> str:
        shown = [method for method in models if any(method in d.results for d, _ in of)]
        return clip if clip in shown else shown[0]

    return [matrix(name, caption, cols, models, reference(cols), gaps) for name, caption, cols in every]


def _facts(params: Params, digest: str, timings: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What was evaluated and how, as terms and values."""
    row, images = params.backbones[params.backbone], params.images
    pixels = f"{images.parity} → {images.resolution}" if images.parity else str(images.resolution)
    devices = dict.fromkeys(timings[stage]["device"] for stage in ("train", "score") if stage in timings)
    finished = max((str(stage["finished"]) for name, stage in timings.items() if name != "pretrain"), default="")
    return [
        ("checkpoint", f"{params.backbone} ({row.source}{'@' + row.revision if row.revision else ''}, {row.dtype})"),
        ("digest", digest),
        ("images", f"{pixels} pixels"),
        ("noise levels", ", ".join(map(str, params.noise.levels))),
        ("draws per level", ", ".join(f"{name} {params.noise_of(name).draws_per_level}" for name in params.datasets)),
        ("λ of eq. 3", f"{params.evidence.scale:g}"),
        ("seed", str(params.seed)),
        ("finished", tables.utc(finished) or tables.UNKNOWN),
        ("device", "; ".join(devices) or tables.UNKNOWN),
    ]


def _ablations(datasets: Sequence[DatasetResults], series: charts.Series) -> list[charts.Chart]:
    """A chart per dataset and group of methods with the same keys."""
    same_keys: dict[tuple[str, ...], dict[str, None]] = {}  # ablated methods by their keys
    for dataset in datasets:
        for name, by_key in dataset.ablations.items():
            same_keys.setdefault(tuple(by_key), {})[name] = None
    return [
        charts.ablations(dataset, shown, series)
        for methods in same_keys.values()
        for dataset in datasets
        if (shown := [method for method in methods if method in dataset.ablations])
    ]
