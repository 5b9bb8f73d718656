"""`make studies`, outside of the DAG: train and score variants of params.yaml. It takes some hours."""

from __future__ import annotations

import shutil
import sys

from prefect import flow

from dsd.config import load
from dsd.errors import DsdError, unknown
from flows import DATA
from flows.stages.common import Details, each, main, unit


@flow(name="studies", persist_result=False)
def run() -> None:
    """Run the missing variants of the studies in params.yaml, or of those named as arguments; resume a stopped run."""
    from dsd.experiments import studies

    params, names, target = load(), sys.argv[1:], DATA / "studies"
    for name in names:
        if name not in params.studies:
            raise DsdError(unknown("study", name, params.studies))
    missing = {
        f"{name}: {variant}, {dataset}": (name, variant, dataset)
        for name in names or params.studies
        for variant, dataset in studies.missing(name, params, target)
    }

    def piece(label: str) -> Details:
        name, variant, dataset = missing[label]
        studies.run(name, variant, dataset, params, target, DATA / "unfinished" / name)
        return {}

    each(unit(piece), missing)
    shutil.rmtree(DATA / "unfinished", ignore_errors=True)


if __name__ == "__main__":
    main(run)
