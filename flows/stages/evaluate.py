"""Stage evaluate: from evidence to scores, and to metrics with their intervals."""

from __future__ import annotations

from dsd.config import Params
from flows import DATA
from flows.stages.common import Details, each, main, stage


@stage
def evaluate(params: Params) -> dict[str, Details]:
    from functools import cache

    from dsd.datasets import benchmark
    from dsd.evaluation import ablations, blind, calibration, claims
    from dsd.evaluation import evaluate as evaluation
    from dsd.experiments.study_results import (
        compare_variants,
        judge_at_paper,
        read_study,
        with_replicates,
        write_studies,
    )
    from dsd.experiments.variants import Study
    from dsd.metrics import unforced
    from dsd.models.checkpoint import identify
    from dsd.schedules.replay import read_hits
    from dsd.scorers.evidence import read_identities
    from dsd.store import libraries, write_json
    from dsd.versions import VERSIONS

    target = DATA / "evaluate"
    results: dict[str, evaluation.Results] = {}
    ablated: dict[str, ablations.Ablations] = {}
    data: dict[str, claims.DatasetHits] = {}
    baselines: dict[str, blind.Blind] = {}
    known = cache(identify)

    def dataset(name: str) -> Details:
        scored = evaluation.ScoredSplit.of(name, params, DATA / "prepare" / name, DATA / "score" / name)
        results[name], hits = evaluation.evaluate(name, scored, params.evaluate, params.seed, target)
        gained = calibration.measure(scored, hits, params.evaluate, params.seed)
        baselines[name] = blind.measure(
            scored.kind, scored.few_shot, scored.examples, hits, gained, params.evaluate, params.seed
        )
        variants = ablations.ablate(scored, params.ablations, params.seed)
        ablated[name] = ablations.with_intervals(scored.examples, variants, params.evaluate, params.seed)
        metric = benchmark(scored.kind).headline
        identities = read_identities(DATA / "score" / name)
        raced = read_hits(DATA / "races" / f"{name}.json", identities, metric, scored.examples)
        published = {method: unforced(by_metric) for method, by_metric in hits.items()}
        data[name] = claims.DatasetHits(scored.kind, scored.examples, {**published, **raced}, variants)
        return {}

    details = each(dataset, params.datasets)
    evaluation.write_metrics(results, target)
    write_json(target / "code.json", {"versions": VERSIONS, "libraries": libraries()}, indent=2)
    blind.write(baselines, target)
    ablations.write(ablated, target)
    stored = {name: read_study(DATA / "studies" / f"{name}.json") for name in params.studies}
    judged = claims.judge(params, with_replicates(params, data, stored, known))
    claims.write(*judged, judge_at_paper(params, data, stored, known), target)
    compared = {name: compare_variants(Study(name, params), stored[name], data, known) for name in params.studies}
    write_studies(compared, target)
    return details


if __name__ == "__main__":
    main(evaluate)
