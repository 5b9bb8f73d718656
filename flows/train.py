"""Stage train: the attention prompt of every dataset, from its few-shot split; curves live in MLflow."""

from __future__ import annotations

from dsd.params import Params
from flows import DATA
from flows.stage import Details, each, main, prune, stage, unit


@stage
def train(params: Params) -> dict[str, Details]:
    from dsd import training
    from dsd.backbones.checkpoint import locate
    from flows.tracking import Live, Runs

    runs = Runs()  # here, so that opening the database does not count as training
    _, backbone = locate(params.backbones[params.backbone])

    def dataset(name: str) -> Details:
        prepared = DATA / "prepare" / name
        row: dict[str, float] = {}
        with Live(name, training.training_key(name, params, prepared, backbone), params, runs) as live:
            for row in training.train(name, params, prepared, DATA / "cache" / name, DATA / "train" / name):
                live.log(row)
        return dict(row)

    prune(DATA / "train", params.datasets)
    return each(unit(dataset), params.datasets)


if __name__ == "__main__":
    main(train)
