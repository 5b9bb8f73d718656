"""Stage score: compute the evidence of every (pair, draw) that the methods need."""

from __future__ import annotations

from dsd.config import Params
from flows import DATA, executors
from flows.stages.common import Details, each, main, prune, stage


@stage
def score(params: Params) -> dict[str, Details]:
    import torch

    from dsd.engine import score
    from dsd.engine.session import Folders, Session

    def dataset(name: str) -> Details:
        session, target = Session(name, params, Folders.of(DATA, name)), DATA / "score" / name
        computed = 0
        if params.runtime.executor == "ray":
            cores = torch.get_num_threads()

            def worker() -> score.Worker:
                own = Session(name, params, Folders.of(DATA, name), cores=cores)
                return score.Worker(own, target, split="test")

            missing = score.missing(session, target, split="test")
            computed = executors.compute(missing, worker, params.runtime, f"score {name}")
        counts = score.score(session, target, split="test")
        counts["computed"] += computed
        # Not on Ray: a race's next requests depend on earlier values, and all races share batches.
        return counts | {"raced": score.score_raced(session, DATA / "races", target, split="test")}

    prune(DATA / "score", params.datasets)
    return each(dataset, params.datasets)


if __name__ == "__main__":
    main(score)
