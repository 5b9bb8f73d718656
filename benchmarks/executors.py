"""Evidence by actors of a Ray cluster on this machine, against evidence by this process on the same cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from benchmarks.setting import PREPARED
from dsd import scoring
from dsd.params import load
from dsd.tracks import Folders
from flows.executors import ahead, cluster

NAME = PREPARED.name
ROWS = 384  # of a shard here: four full batches
FEW, MANY = 4, 16  # shards
TURNS = 3


class Measured(NamedTuple):
    passes: float  # of the U-Net a second, by this process
    share: float  # speed of the actors over that
    start: float  # seconds until a cluster and its actors are ready to compute


def measure(data: Path) -> Measured:
    """In turns, so that a noisy machine moves both sides; medians. `data` is what a reproduction has left.

    The seconds that actors take to start are those that many shards and few have in common.
    """
    params = load()
    methods = {name: method for name, method in params.methods.items() if name == "dsd-zero-shot"}
    evidence = params.evidence.model_copy(update={"shard": ROWS})
    params = params.model_copy(update={"methods": methods, "training": {}, "evidence": evidence})
    folders = Folders(*(data / stage / NAME for stage in ("prepare", "cache", "train")))
    cores = torch.get_num_threads()
    runtime = params.runtime.model_copy(update={"executor": "ray", "actors": cores})

    def opened(target: Path) -> Callable[[], scoring.Worker]:
        return partial(scoring.Worker, NAME, params, folders, target, split="test", cores=cores)

    def by_this_process(count: int, target: Path, worker: scoring.Worker) -> None:
        for key in islice(worker.asked, count):
            worker(key)

    def by_actors(count: int, target: Path, worker: scoring.Worker) -> None:
        ahead(dict.fromkeys(islice(worker.asked, count), ROWS), opened(target), runtime, "bench")

    def seconds(work: Callable[[int, Path, scoring.Worker], None], count: int) -> float:
        with TemporaryDirectory() as folder:
            worker = opened(Path(folder))()
            start = time.perf_counter()
            work(count, Path(folder), worker)
            return time.perf_counter() - start

    start = time.perf_counter()
    cluster()
    first, starts, shares, rates = time.perf_counter() - start, [], [], []
    seconds(by_this_process, 1)  # warm
    for _ in range(TURNS):
        few, alone, many = seconds(by_actors, FEW), seconds(by_this_process, MANY - FEW), seconds(by_actors, MANY)
        shares.append(alone / (many - few))
        starts.append(first + few - (many - few) * FEW / (MANY - FEW))
        rates.append(ROWS * (MANY - FEW) / alone)
    return Measured(*map(statistics.median, (rates, shares, starts)))
