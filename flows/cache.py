"""Stage cache: every picture through the autoencoder and every text through the text encoder, once."""

from __future__ import annotations

from dsd.params import Params
from flows import DATA
from flows.stage import Details, each, main, prune, stage, unit


@stage
def cache(params: Params) -> dict[str, Details]:
    from dsd.encoding import encode

    def dataset(name: str) -> Details:
        return {**encode(name, params, DATA / "prepare" / name, DATA / "cache" / name)}

    prune(DATA / "cache", params.datasets)
    return each(unit(dataset), params.datasets)


if __name__ == "__main__":
    main(cache)
