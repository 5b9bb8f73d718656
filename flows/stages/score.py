"""Stage score: compute the evidence of every (pair, draw)."""

from __future__ import annotations

from functools import partial

from dsd.config import Params
from flows import DATA, executors
from flows.stages.common import Details, each, main, prune, stage, unit


@stage
def score(params: Params) -> dict[str, Details]:
    import torch

    from dsd.engine import score as scoring
    from dsd.engine.tracks import Folders

    def dataset(name: str) -> Details:
        folders = Folders(*(DATA / part / name for part in ("prepare", "cache", "train")))
        target = DATA / "score" / name
        computed = 0
        if params.runtime.executor == "ray":
            cores = torch.get_num_threads()
            opened = partial(scoring.Worker, name, params, folders, target, split="test", cores=cores)
            missing = scoring.missing(name, params, folders, target, split="test")
            computed = executors.compute(missing, opened, params.runtime, f"score {name}")
        counts = scoring.score(name, params, *folders, target, split="test")
        counts["computed"] += computed
        # Races run in this process: their requests depend on earlier results, and all of them share batches.
        return counts | {"raced": scoring.score_raced(name, params, folders, DATA / "races", target, split="test")}

    prune(DATA / "score", params.datasets)
    return each(unit(dataset), params.datasets)


if __name__ == "__main__":
    main(score)
