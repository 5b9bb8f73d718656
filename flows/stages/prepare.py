"""Stage prepare: split the examples, and resize the images to the resolution of the models."""

from __future__ import annotations

from dsd.config import Params
from flows import DATA
from flows.stages.common import Details, each, main, stage


@stage
def prepare(params: Params) -> dict[str, Details]:
    from dsd.datasets import preparation

    def dataset(name: str) -> Details:
        source, target, workers = DATA / "download" / name, DATA / "prepare" / name, params.runtime.workers
        row, images = params.datasets[name], params.images
        return {**preparation.prepare(name, row, source, target, images=images, seed=params.seed, workers=workers)}

    return each(dataset, params.datasets)


if __name__ == "__main__":
    main(prepare)
