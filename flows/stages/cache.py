"""Stage cache: encode every image and text, once."""

from __future__ import annotations

from dsd.config import Params
from flows import DATA, executors
from flows.stages.common import Details, each, main, prune, stage


@stage
def cache(params: Params) -> dict[str, Details]:
    from dsd.engine import cache
    from dsd.engine.session import Folders, Session

    def dataset(name: str) -> Details:
        def session() -> Session:
            return Session(name, params, Folders.of(DATA, name))

        if params.runtime.executor == "ray":
            missing = cache.missing(session())
            executors.compute(missing, lambda: cache.Worker(session()), params.runtime, f"encode {name}")
        return {**cache.encode(session())}

    prune(DATA / "cache", params.datasets)
    return each(dataset, params.datasets)


if __name__ == "__main__":
    main(cache)
