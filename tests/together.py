"""`torchrun -m tests.together STEPS SETTINGS METHOD PREPARED CACHED TRAINED`: train on scenes-com for at most this many
steps; prints the number of processes."""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

from accelerate import PartialState

from dsd.config import Params
from dsd.engine.session import Folders, Session
from dsd.training.loop import Training, train


def main() -> None:
    steps, settings, method, prepared, cached, trained = sys.argv[1:]
    params = Params.model_validate(json.loads(Path(settings).read_text()))
    print(PartialState(cpu=True).num_processes, flush=True)  # noqa: T201
    session = Session("scenes-com", params, Folders(Path(prepared), Path(cached), Path(trained)))
    list(islice(train(session, Training(method)), int(steps)))


if __name__ == "__main__":
    main()
