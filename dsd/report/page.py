"""Assemble the report from the data folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dsd.config import FusionMethod, Params
from dsd.experiments.scaling import read_scaling
from dsd.progress import progress
from dsd.report import comparisons, figures, findings, inputs, papers, races, studies, tables
from dsd.report.gallery import MAPPED, gallery, noisy_example
from dsd.report.heatmaps import HeatMaps
from dsd.report.html import render
from dsd.report.inputs import DatasetResults
from dsd.statistics import Resampling

Values = dict[str, Any]  # variables of the template


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
    method, before = params.under_test, params.twin
    evaluate = params.evaluate
    resampling = Resampling(resamples=evaluate.resamples, confidence=evaluate.confidence, seed=params.seed)
    fusions = {name: cast(FusionMethod, row).parts for name, row in params.methods.items() if row.scorer == "fusion"}
    denoisers = [name for name, row in params.methods.items() if row.scorer == "denoising"]
    untrained = [name for name, row in params.methods.items() if not row.contrastive and row.zero_shot]
    clips = {row.tuned: name for name, row in reversed(params.contrastive.items())}
    (claims, at_paper), replays = inputs.read_claims(data), inputs.read_races(params.races.datasets, data)
    stored_studies = inputs.read_json(data / "evaluate" / "studies.json", "evaluate")
    drawn = all(row.generated for row in params.datasets.values())
    scope = f"on {'drawn scenes' if drawn else tables.names(list(params.datasets))}, with this model"
    tested = [d for d in datasets if method in d.results]
    series = {name: number for number, name in enumerate(params.methods)}
    contributions = findings.images(datasets)
    evaluated = {name for dataset in datasets for name in dataset.methods}
    return render(
        "report.html.j2",
        target / "index.html",
        params=params,
        method=method,
        twin=before,
        trained=params.trained,
        facts=_facts(params, heat.digest, timings),
        confidence=f"{100 * evaluate.confidence:g} %",
        **_comparisons(datasets, method, before, fusions, untrained, resampling),
        image_lead=findings.image_lead(contributions),
        contributions=contributions,
        results=[tables.results(d) for d in datasets],
        images=tables.images(datasets),
        calibrated=tables.calibrated(datasets),
        blind_reasons=findings.blind_reasons(datasets),
        legend=[(name, figures.SYMBOLS[n % 8], n % 8) for name, n in series.items() if name in evaluated],
        claims=[tables.claims(claims, scope, at_paper), tables.claim_comparisons(claims, at_paper)] if claims else [],
        reasons=findings.reasons(claims, datasets, method, denoisers, scope),
        first_paper=list(
            papers.first_paper((clips.get("projections"), clips.get("context"), params.prompted), datasets)
        ),
        first_paper_figures=papers.first_paper_figures(params.prompted, datasets),
        figures=_figures(datasets, method, before, series),
        subsets=params.ablations.subsets,
        fusion=params.fusion,
        races=list(races.sections(replays)),
        growth=races.growth(read_scaling(data / "races").get("rows", [])),
        second_paper=list(papers.second_paper(replays, datasets, clips.get("none"))),
        noisy=[noisy_example(d, data / "prepare" / d.name, heat) for d in papers.classified(replays, tested)],
        studies=list(studies.sections(params, stored_studies, datasets, series)),
        galleries=[
            gallery(d, method, params.report.gallery, params.seed, data / "prepare" / d.name, heat)
            for d in progress(tested, desc="gallery")
        ],
        mapped=MAPPED,
        losses=tables.losses(datasets),
        indistinct=[(d.name, id, reason) for d in datasets for id, reason in d.indistinct.items()],
        quarantine=[(d.name, row["name"], row["reason"]) for d in datasets for row in d.quarantine],
        timings=tables.timings(timings, list(params.datasets)) if timings else None,
        throughput=tables.throughput(datasets),
        methods=tables.methods(params.methods),
        datasets=tables.datasets(datasets),
        settings=tables.settings(params),
    )


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
        ("finished", tables.utc(finished) or tables.UNKNOWN),
        ("device", "; ".join(devices) or tables.UNKNOWN),
    ]


def _comparisons(
    datasets: Sequence[DatasetResults],
    method: str,
    before: str | None,
    fusions: Mapping[str, Sequence[str]],
    untrained: Sequence[str],
    resampling: Resampling,
) -> Values:
    """The findings at the top of the page and the paired comparisons that they are based on."""
    sides = {name: comparisons.compare_all(name, before, datasets, resampling) for name in (method, *fusions)}
    # Each fusion is compared with the tested method once, as fusion minus method.
    sides[method] = {other: rows for other, rows in sides[method].items() if other not in fusions}
    pairs = {(name, other): rows for name, side in sides.items() for other, rows in side.items()}
    tallies = {pair: findings.tally(*pair, rows) for pair, rows in pairs.items()}
    prompting = sides[method].get(before or "", [])
    unbeaten = [s for name, parts in fusions.items() for s in findings.unbeaten(name, parts, sides[name], datasets)]
    answers = {
        "Is zero-shot accuracy above chance?": findings.above_chance(untrained, datasets),
        "Does few-shot prompting help?": [tally for pair, tally in tallies.items() if pair == (method, before)],
        "How do the methods compare?": [tally for pair, tally in tallies.items() if pair != (method, before)],
        "Which methods does fusion not outperform?": unbeaten,
    }
    return {
        "lead": findings.lead(datasets, prompting, before, method, resampling),
        "headlines": findings.headlines(datasets, prompting, before, method) if before else [],
        "answers": [(question, sentences) for question, sentences in answers.items() if sentences],
        "comparisons": [
            (comparisons.table(*pair, rows), tallies[pair], pair == (method, before)) for pair, rows in pairs.items()
        ],
        "tests": sum(map(len, pairs.values())),
        "parts": tables.names([part for parts in fusions.values() for part in parts]),
    }


def _figures(
    datasets: Sequence[DatasetResults], method: str, before: str | None, series: figures.Series
) -> dict[str, list[figures.Plot]]:
    pairs = [d for d in datasets if d.candidates.max() == 2 and {method, before} <= set(d.results)]
    same_keys: dict[tuple[str, ...], dict[str, None]] = {}  # ablated methods by their keys
    for dataset in datasets:
        for name, by_key in dataset.ablations.items():
            same_keys.setdefault(tuple(by_key), {})[name] = None
    return {
        "accuracy": [figures.accuracy(d, series) for d in datasets],
        "ablations": [
            figures.ablations(d, list(methods), series)
            for methods in same_keys.values()
            for d in datasets
            if d.ablations
        ],
        "margins": [figures.margins(d, [m for m in d.methods if m in (before, method)], series) for d in pairs],
        "ranks": [figures.ranks(d, series) for d in datasets if d.candidates.max() > 2 and not d.two_by_two],
        "training": [figures.training(d, name, series) for d in datasets for name in d.curves],
    }
