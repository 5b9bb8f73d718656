"""`make races`, not a stage: compare schedules on evidence at every draw, and measure how racing scales. Some hours."""

from __future__ import annotations

from prefect import flow

from dsd.config import load
from flows import DATA
from flows.stages.common import Details, each, main


@flow(name="races", persist_result=False)
def races() -> None:
    """Run what is missing of races.yaml; resumable."""
    from dsd.engine.session import Folders, Session
    from dsd.experiments.scaling import measure_scaling
    from dsd.experiments.schedule_comparison import compare_schedules

    params = load()

    def dataset(name: str) -> Details:
        session = Session(name, params, Folders.of(DATA, name))
        return compare_schedules(session, DATA / "draws" / name, DATA / "races")

    def growth(name: str) -> Details:
        measure_scaling(params.races, params.evaluate, params.seed, DATA / "races")
        return {}

    each(dataset, params.races.datasets)
    each(growth, ["growth"])


if __name__ == "__main__":
    main(races)
