"""Stage evaluate: from evidence to scores, and to metrics with their intervals."""

from __future__ import annotations

from dsd.params import Params
from flows import DATA
from flows.stage import Details, each, main, stage, unit


@stage
def evaluate(params: Params) -> dict[str, Details]:
    from dsd import ablations, claims, evaluation, variants
    from dsd.matching import read_examples

    target = DATA / "evaluate"
    results: dict[str, evaluation.Results] = {}
    taken_apart: dict[str, ablations.Ablations] = {}
    data: dict[str, claims.Answers] = {}

    def dataset(name: str) -> Details:
        prepared, scored = (DATA / stage / name for stage in ("prepare", "score"))
        results[name], hits = evaluation.evaluate(name, params, prepared, scored, target)
        variants = ablations.ablate(name, params, prepared, scored)
        examples = read_examples(prepared / "examples.parquet", "test")
        taken_apart[name] = ablations.with_intervals(params, examples, variants)
        data[name] = claims.Answers(params.datasets[name].kind, examples, hits, variants)
        return {}

    details = each(unit(dataset), params.datasets)
    evaluation.write_metrics(results, target)
    ablations.write(taken_apart, target)
    claims.write(*claims.judge(params, data), target)
    variants.write({study: variants.compare(params, study, DATA / "studies", data) for study in params.studies}, target)
    return details


if __name__ == "__main__":
    main(evaluate)
