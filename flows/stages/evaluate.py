"""Stage evaluate: evidence to scores, and scores to metrics with intervals, ablations, claims and studies."""

from __future__ import annotations

from dsd.config import Params
from flows import DATA
from flows.stages.common import Details, each, main, stage, unit


@stage
def evaluate(params: Params) -> dict[str, Details]:
    from dsd.data.examples import read_examples
    from dsd.datasets import benchmark
    from dsd.evaluation import ablations, claims
    from dsd.evaluation import evaluate as evaluation
    from dsd.experiments import variants
    from dsd.metrics import HEADLINES
    from dsd.schedules import replay

    target = DATA / "evaluate"
    results: dict[str, evaluation.Results] = {}
    ablated: dict[str, ablations.Ablations] = {}
    data: dict[str, claims.Answers] = {}

    def dataset(name: str) -> Details:
        prepared, scored = (DATA / stage / name for stage in ("prepare", "score"))
        results[name], hits = evaluation.evaluate(name, params, prepared, scored, target)
        variants = ablations.ablate(name, params, prepared, scored)
        examples = read_examples(prepared / "examples.parquet", "test")
        ablated[name] = ablations.with_intervals(params, examples, variants)
        kind = params.datasets[name].kind
        raced = replay.read_hits(DATA / "races" / f"{name}.json", HEADLINES[benchmark(kind).metrics], examples)
        data[name] = claims.Answers(kind, examples, {**hits, **raced}, variants)
        return {}

    details = each(unit(dataset), params.datasets)
    evaluation.write_metrics(results, target)
    ablations.write(ablated, target)
    claims.write(*claims.judge(params, data), target)
    variants.write({study: variants.compare(params, study, DATA / "studies", data) for study in params.studies}, target)
    return details


if __name__ == "__main__":
    main(evaluate)
