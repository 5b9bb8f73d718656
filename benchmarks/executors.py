"""Evidence computed by actors of a Ray cluster on this machine, and by this process on the same cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch

from benchmarks.setting import PREPARED
from dsd.config import load
from dsd.engine import score
from dsd.engine.session import Folders, Session
from flows.executors import cluster, compute

NAME = PREPARED.name
ROWS = 384  # of a shard here: four full batches
FEW, MANY = 4, 24  # shards: after these both actors are computing, and after these they are done
TURNS = 3


class Measured(NamedTuple):
    passes: float  # of the U-Net per second, by this process
    share: float  # speed of the actors over that
    start: float  # seconds until the cluster and its actors can compute


def measure(data: Path) -> Measured:
    """Medians of measurements in turns, so that a noisy machine affects both; `data` is that of a reproduction."""
    params = load()
    methods = {name: method for name, method in params.methods.items() if name == "dsd-zero-shot"}
    evidence = params.evidence.model_copy(update={"shard": ROWS})
    params = params.model_copy(update={"methods": methods, "training": {}, "evidence": evidence})
    folders = Folders.of(data, NAME)
    cores = torch.get_num_threads()
    runtime = params.runtime.model_copy(update={"executor": "ray", "actors": cores})

    def opened(target: Path) -> Callable[[], score.Worker]:
        return lambda: score.Worker(Session(NAME, params, folders, cores=cores), target, split="test")

    def alone(count: int) -> float:
        """Seconds of this process for this number of shards."""
        with TemporaryDirectory() as folder:
            worker = opened(Path(folder))()
            start = time.perf_counter()
            for key in islice(worker.shards, count):
                worker(key)
            return time.perf_counter() - start

    def together() -> tuple[float, float]:
        """Seconds of the actors for the first shards, with their start, and for the shards after them."""
        with TemporaryDirectory() as folder:
            missing = score.missing(Session(NAME, params, folders), Path(folder), split="test")
            start = time.time()
            compute(dict(islice(missing.items(), MANY)), opened(Path(folder)), runtime, "bench")
            written = sorted(path.stat().st_mtime for path in Path(folder).glob("*.json"))
            return written[FEW - 1] - start, written[-1] - written[FEW - 1]

    start = time.perf_counter()
    ray = cluster()
    first, starts, shares, rates = time.perf_counter() - start, [], [], []
    alone(1)  # warm up
    more = MANY - FEW
    for _ in range(TURNS):
        before, (few, many), after = alone(more), together(), alone(more)
        shares.append((before + after) / 2 / many)
        starts.append(first + few - many * FEW / more)
        rates.append(ROWS * more / min(before, after))
    ray.shutdown()
    return Measured(*map(statistics.median, (rates, shares, starts)))
