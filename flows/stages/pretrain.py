"""Stage pretrain (frozen): train the embedded checkpoints from scratch on drawn scenes."""

from __future__ import annotations

from pathlib import Path

from dsd.config import Params
from flows import DATA
from flows.stages.common import Details, each, main, stage


@stage
def pretrain(params: Params) -> dict[str, Details]:
    from dsd.pretraining import recipe as pretraining

    def models(name: str) -> Details:
        *_, last = pretraining.pretrain(params, DATA / "pretrain", Path(name))
        return dict(last)

    return each(models, ["models"])


if __name__ == "__main__":
    main(pretrain)
