"""Stage prepare: examples with their splits, and images at the parity resolution."""

from __future__ import annotations

from dsd.config import Params
from flows import DATA
from flows.stages.common import Details, each, main, stage, unit


@stage
def prepare(params: Params) -> dict[str, Details]:
    from dsd.datasets import preparation

    def dataset(name: str) -> Details:
        row, source, target = params.datasets[name], DATA / "download" / name, DATA / "prepare" / name
        workers = params.runtime.workers
        return {
            **preparation.prepare(name, row, source, target, images=params.images, seed=params.seed, workers=workers)
        }

    return each(unit(dataset), params.datasets)


if __name__ == "__main__":
    main(prepare)
