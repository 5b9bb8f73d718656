"""Stage score: one U-Net pass per (pair, draw), kept as evidence."""

from __future__ import annotations

from dsd.params import Params
from flows import DATA
from flows.stage import Details, each, main, prune, stage, unit


@stage
def score(params: Params) -> dict[str, Details]:
    from dsd import engine

    def dataset(name: str) -> Details:
        stages = ("prepare", "cache", "train", "score")
        return engine.score(name, params, *(DATA / stage / name for stage in stages), split="test")

    prune(DATA / "score", params.datasets)
    return each(unit(dataset), params.datasets)


if __name__ == "__main__":
    main(score)
