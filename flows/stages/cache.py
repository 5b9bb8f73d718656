"""Stage cache: encode every image and every text once."""

from __future__ import annotations

from functools import partial

from dsd.config import Params
from flows import DATA, executors
from flows.stages.common import Details, each, main, prune, stage, unit


@stage
def cache(params: Params) -> dict[str, Details]:
    from dsd.engine import encodings as encoding

    def dataset(name: str) -> Details:
        folders = (DATA / "prepare" / name, DATA / "cache" / name)
        if params.runtime.executor == "ray":
            opened = partial(encoding.Worker, params, *folders)
            missing = encoding.missing(params, *folders)
            executors.compute(missing, opened, params.runtime, f"encode {name}")
        return {**encoding.encode(name, params, *folders)}

    prune(DATA / "cache", params.datasets)
    return each(unit(dataset), params.datasets)


if __name__ == "__main__":
    main(cache)
