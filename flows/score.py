"""Stage score: one U-Net pass per (pair, draw), kept as evidence."""

from __future__ import annotations

from dsd.params import Params
from flows import DATA
from flows.stage import Details, each, main, prune, stage, unit


@stage
def score(params: Params) -> dict[str, Details]:
    from dsd import scoring
    from dsd.tracks import Folders

    def dataset(name: str) -> Details:
        folders = Folders(*(DATA / part / name for part in ("prepare", "cache", "train")))
        target = DATA / "score" / name
        counts = scoring.score(name, params, *folders, target, split="test")
        return counts | {"raced": scoring.score_raced(name, params, folders, DATA / "races", target, split="test")}

    prune(DATA / "score", params.datasets)
    return each(unit(dataset), params.datasets)


if __name__ == "__main__":
    main(score)
