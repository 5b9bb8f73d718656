"""`make races`, outside of the DAG: compare the schedules on evidence at every draw. It takes some hours."""

from __future__ import annotations

from prefect import flow

from dsd.config import load
from flows import DATA
from flows.stages.common import Details, each, main, unit


@flow(name="races", persist_result=False)
def run() -> None:
    """Run the missing races of params.yaml; a stopped run is resumed."""
    from dsd.engine.tracks import Folders
    from dsd.experiments import races, scaling

    params = load()

    def dataset(name: str) -> Details:
        folders = Folders(*(DATA / stage / name for stage in ("prepare", "cache", "train")))
        return races.run(name, params, folders, DATA / "draws" / name, DATA / "races")

    each(unit(dataset), params.races.datasets)
    scaling.grow(params, DATA / "races")


if __name__ == "__main__":
    main(run)
