"""Beside the stages: searches, other few-shot samples and shares, and what changes the forward pass. Some hours."""

from __future__ import annotations

import shutil
import sys

from prefect import flow

from dsd.errors import DsdError, unknown
from dsd.params import load
from flows import DATA
from flows.stage import Details, each, main, unit


@flow(name="studies", persist_result=False)
def run() -> None:
    """Runs what is missing of the studies of params.yaml, or of those named as arguments; goes on where it stopped."""
    from dsd import study

    params, asked, target = load(), sys.argv[1:], DATA / "studies"
    for name in asked:
        if name not in params.studies:
            raise DsdError(unknown("study", name, params.studies))

    def piece(name: str) -> Details:
        of, variant, dataset = name.split("/")
        study.run(of, variant, dataset, params, target, DATA / "work" / of)
        return {}

    for name in asked or params.studies:
        each(unit(piece), ["/".join((name, *parts)) for parts in study.missing(name, params, target)])
        shutil.rmtree(DATA / "work" / name, ignore_errors=True)


if __name__ == "__main__":
    main(run)
