"""Stage train: what each method learns of every dataset, from its few-shot split; curves live in MLflow."""

from __future__ import annotations

import os
import sys

from dsd.config import Params, trained
from dsd.errors import DsdError
from flows import DATA
from flows.stages.common import Details, each, main, prune, stage, unit
from flows.stages.common import params as params_of


@stage
def train(params: Params) -> dict[str, Details]:
    from dsd.engine.session import Folders, Session
    from dsd.training import loop
    from flows.tracking import Live, Runs

    runs = Runs()  # here, so that opening the database does not count as training

    def learn(name: str, method: str) -> Details:
        session = Session(name, params, Folders.of(DATA, name))
        row: dict[str, float] = {}
        with Live(name, method, loop.training_key(session, method), params, runs) as live:
            for row in loop.train(session, method, DATA / "train" / name / method):
                live.log(row)
        return dict(row)

    def dataset(name: str) -> Details:
        (DATA / "train" / name).mkdir(parents=True, exist_ok=True)  # also where nothing learns: DVC looks for it
        prune(DATA / "train" / name, trained(params))
        return {method: learn(name, method) for method in trained(params)}

    prune(DATA / "train", params.datasets)
    return each(unit(dataset), params.datasets)


def follow() -> None:
    """Takes part in every step, in a process that `accelerate launch` has started beside the one that is the stage."""
    from dsd.engine.session import Folders, Session
    from dsd.training.loop import train

    params = params_of("train")
    for name in params.datasets:
        for method in trained(params):
            list(train(Session(name, params, Folders.of(DATA, name)), method, DATA / "train" / name / method))


if __name__ == "__main__":
    if (number := os.environ.get("RANK", "0")) == "0":
        main(train)
    else:
        try:
            follow()
        except DsdError as error:
            sys.exit(f"train, process {number}: {error}")
