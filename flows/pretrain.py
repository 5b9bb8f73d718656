"""Stage pretrain (frozen): the embedded checkpoints, from nothing but drawn scenes; about an hour on two cores."""

from __future__ import annotations

from pathlib import Path

from dsd.params import Params
from flows.stage import DATA, Details, each, main, stage, unit


@stage
def pretrain(params: Params) -> dict[str, Details]:
    from dsd import pretraining

    def models(name: str) -> Details:
        row = Details()
        for row in pretraining.pretrain(params, DATA / "pretrain", Path(name)):
            pass
        return dict(row)

    return each(unit(models), ["models"])


if __name__ == "__main__":
    main(pretrain)
