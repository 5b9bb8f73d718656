"""`make studies`, not a stage: searches, other few-shot samples, sizes and noise, other forward passes. Some hours."""

from __future__ import annotations

import shutil
import sys

from prefect import flow

from dsd.config import load
from dsd.errors import DsdError, unknown
from flows import DATA
from flows.stages.common import Details, each, main


@flow(name="studies", persist_result=False)
def studies() -> None:
    """Run what is missing of studies.yaml, or of those named as arguments; resumable."""
    from dsd.experiments.studies import missing_pieces, run_piece
    from dsd.experiments.variants import Study

    params, names, target = load(), sys.argv[1:], DATA / "studies"
    for name in names:
        if name not in params.studies:
            raise DsdError(unknown("study", name, params.studies))
    pieces = {
        f"{study.name}: {variant}, {dataset}: {', '.join(methods)}": (study, variant, dataset, methods)
        for study in (Study(name, params) for name in names or params.studies)
        for (variant, dataset), methods in missing_pieces(study, target).items()
    }

    def piece(label: str) -> Details:
        study, variant, dataset, methods = pieces[label]
        run_piece(study, variant, dataset, methods, target, DATA / "unfinished" / study.name, DATA / "train")
        return {}

    each(piece, pieces)
    for name in names or params.studies:
        shutil.rmtree(DATA / "unfinished" / name, ignore_errors=True)


if __name__ == "__main__":
    main(studies)
