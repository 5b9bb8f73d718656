"""`torchrun -m tests.together STEPS SETTINGS METHOD PREPARED CACHED TARGET`: so many steps at most of a training on
scenes-com; prints in how many processes."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from accelerate import PartialState

from dsd.config import Params
from dsd.training.loop import train


def main() -> None:
    steps, settings, method, prepared, cached, target = sys.argv[1:]
    params = Params.model_validate(json.loads(Path(settings).read_text()))
    print(PartialState(cpu=True).num_processes, flush=True)  # noqa: T201
    rows = train("scenes-com", method, params, Path(prepared), Path(cached), Path(target))
    list(islice(rows, int(steps)))


if __name__ == "__main__":
    main()
