"""Beside the stages: evidence at every draw, and what each schedule would have asked for of it. Some hours."""

from __future__ import annotations

from prefect import flow

from dsd.config import load
from flows import DATA
from flows.stages.common import Details, each, main, unit


@flow(name="races", persist_result=False)
def run() -> None:
    """Runs what is missing of the races of params.yaml; goes on where it was stopped."""
    from dsd.engine.tracks import Folders
    from dsd.experiments import races
    from dsd.experiments import scaling as growth

    params = load()

    def dataset(name: str) -> Details:
        folders = Folders(*(DATA / stage / name for stage in ("prepare", "cache", "train")))
        return races.run(name, params, folders, DATA / "draws" / name, DATA / "races")

    each(unit(dataset), params.races.datasets)
    growth.grow(params, DATA / "races")


if __name__ == "__main__":
    main(run)
