"""`torchrun -m tests.together SETTINGS METHOD PREPARED CACHED TARGET`: a training on scenes-com; prints in how many
processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import PartialState

from dsd.params import Params
from dsd.training import train


def main() -> None:
    settings, method, prepared, cached, target = sys.argv[1:]
    params = Params.model_validate(json.loads(Path(settings).read_text()))
    print(PartialState(cpu=True).num_processes, flush=True)  # noqa: T201
    list(train("scenes-com", method, params, Path(prepared), Path(cached), Path(target)))


if __name__ == "__main__":
    main()
