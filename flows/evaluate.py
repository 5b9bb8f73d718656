"""Stage evaluate: from evidence to scores, and to metrics with their intervals."""

from __future__ import annotations

from dsd.params import Params
from flows import DATA
from flows.stage import Details, each, main, stage, unit


@stage
def evaluate(params: Params) -> dict[str, Details]:
    from dsd import evaluation

    results = {}

    def dataset(name: str) -> Details:
        sources = (DATA / "prepare" / name, DATA / "score" / name)
        results[name] = evaluation.evaluate(name, params, *sources, DATA / "evaluate")
        return {}

    details = each(unit(dataset), params.datasets)
    evaluation.write_metrics(results, DATA / "evaluate")
    return details


if __name__ == "__main__":
    main(evaluate)
