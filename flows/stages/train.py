"""Stage train: train each method on the few-shot split of every dataset, and log the curves to MLflow."""

from __future__ import annotations

import os
import sys

from dsd.config import Params
from dsd.errors import DsdError
from flows import DATA
from flows.stages.common import Details, each, main, prune, stage, stage_params


@stage
def train(params: Params) -> dict[str, Details]:
    from dsd.engine.session import Folders, Session
    from dsd.training import loop
    from flows.tracking import Runs, TrainingRun, training_settings, training_tags

    runs = Runs()  # opening the database does not count as training time
    tags = {method: training_tags(params, method) for method in params.trained}

    def fit(name: str, training: loop.Training) -> Details:
        session = Session(name, params, Folders.of(DATA, name))
        key, settings = loop.training_key(session, training), training_settings(params, name, training.method)
        row: dict[str, float] = {}
        with TrainingRun(name, training.folder, key, settings, tags[training.method], runs) as run:
            for row in loop.train(session, training):
                run.log(row)
        return dict(row)

    def dataset(name: str) -> Details:
        (DATA / "train" / name).mkdir(parents=True, exist_ok=True)  # DVC expects it even if no method is trained
        prune(DATA / "train" / name, params.trained)
        return {training.folder: fit(name, training) for training in loop.trainings(params)}

    prune(DATA / "train", params.datasets)
    return each(dataset, params.datasets)


def follow() -> None:
    """Take part in every training step, in a process of `accelerate launch` that is not the first, the stage itself."""
    from dsd.engine.session import Folders, Session
    from dsd.training.loop import train, trainings

    params = stage_params("train")
    for name in params.datasets:
        for training in trainings(params):
            list(train(Session(name, params, Folders.of(DATA, name)), training))


if __name__ == "__main__":
    if (number := os.environ.get("RANK", "0")) == "0":
        main(train)
    else:
        try:
            follow()
        except DsdError as error:
            sys.exit(f"train, process {number}: {error}")
