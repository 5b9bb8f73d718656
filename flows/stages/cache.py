"""Stage cache: every picture through the autoencoder and every text through the text encoder, once."""

from __future__ import annotations

from functools import partial

from dsd.config import Params
from flows import DATA
from flows.stages.common import Details, each, main, prune, stage, unit


@stage
def cache(params: Params) -> dict[str, Details]:
    from dsd.engine import encodings as encoding
    from flows.executors import ahead

    def dataset(name: str) -> Details:
        folders = (DATA / "prepare" / name, DATA / "cache" / name)
        if params.runtime.executor == "ray":
            opened = partial(encoding.Worker, params, *folders)
            ahead(encoding.missing(params, *folders), opened, params.runtime, f"encode {name}")
        return {**encoding.encode(name, params, *folders)}

    prune(DATA / "cache", params.datasets)
    return each(unit(dataset), params.datasets)


if __name__ == "__main__":
    main(cache)
