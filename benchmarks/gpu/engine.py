"""The whole engine on a synthetic ComVG: from prepared images to stored evidence, by the stages' own code."""

from __future__ import annotations

import time
from functools import partial

from benchmarks.gpu.bench import Bench, Sizes
from benchmarks.gpu.device import spread
from benchmarks.gpu.records import Case, Result
from dsd.engine import score
from dsd.engine.cache import encode

METHODS = ("denoising", "dsd-zero-shot")  # those that need no training
BOX = 25.0  # seconds, after which no further shard is computed


def cases(sizes: Sizes) -> list[Case]:
    """Return a case per checkpoint."""
    return [
        Case(
            model,
            {"model": model, "batch": batches[0], "dtype": "bfloat16", "pairs": sizes.pairs, "shard": sizes.shard,
             "tiny": sizes.tiny},
            BOX + 15,
            partial(measure, model),
            model,
        )
        for model, batches in sizes.batches.items()
    ]  # fmt: skip


def measure(model: str, bench: Bench) -> Result:
    """Return the seconds of the stage `cache`, and the rate of rows of the stage `score` over its shards."""
    session = bench.comvg(model, *METHODS)
    session.backbone.open()
    bench.machine.synchronize()
    start = time.perf_counter()
    encoded = encode(session)
    encoding = time.perf_counter() - start
    worker = score.Worker(session, bench.folder / f"score-{model}", split="test")
    sizes = {key: len(shard.rows) for key, (_, shard) in worker.shards.items()}
    first = next(iter(worker.shards.values()))[1]
    session.engine("none").compute(first.rows[: session.params.runtime.batch_size])  # warm up
    rates = []
    start = time.perf_counter()
    for key, rows in sizes.items():
        before = time.perf_counter()
        if before - start > BOX:
            break
        worker(key)
        rates.append(rows / (time.perf_counter() - before))
    return {
        "passes_per_second": spread(rates),
        "seconds": time.perf_counter() - start,
        "rows": sum(list(sizes.values())[: len(rates)]),
        "planned_rows": sum(sizes.values()),
        "batch": session.engine("none").batch_size,  # halved if memory was too small
        "encoding_seconds": encoding,
        "images": encoded["images"],
        "texts": encoded["texts"],
    }
