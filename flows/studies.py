"""Beside the stages: searches, other few-shot samples and shares, and what changes the forward pass. Some hours."""

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
    """Runs what is missing of the studies of params.yaml, or of those named as arguments; goes on where it stopped."""
    from dsd.experiments import studies as study

    params, asked, target = load(), sys.argv[1:], DATA / "studies"
    for name in asked:
        if name not in params.studies:
            raise DsdError(unknown("study", name, params.studies))
    pieces = {
        f"{name}: {variant}, {dataset}": (name, variant, dataset)
        for name in asked or params.studies
        for variant, dataset in study.missing(name, params, target)
    }

    def piece(label: str) -> Details:
        name, variant, dataset = pieces[label]
        study.run(name, variant, dataset, params, target, DATA / "unfinished" / name)
        return {}

    each(unit(piece), pieces)
    shutil.rmtree(DATA / "unfinished", ignore_errors=True)


if __name__ == "__main__":
    main(run)
