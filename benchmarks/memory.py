"""`python -m benchmarks.memory N`: print the peak memory in MiB of scoring N examples of scenes-com."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.setting import PREPARED, engine_over
from dsd.config import load
from dsd.data.examples import read_examples
from dsd.scorers.evidence import plan, requests
from dsd.store import Store


def main() -> None:
    params = load()
    noise = params.noise.model_copy(update={"levels": params.noise.levels[:1]})
    examples = read_examples(PREPARED / "examples.parquet", "test")[: int(sys.argv[1])]
    engine = engine_over(params, Path("data/cache/scenes-com"))
    with TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for shard in plan(requests(examples, noise, params.seed, compares=True), "memory", 128):
            store.write(shard.key, engine.compute(shard.rows))
    sys.stdout.write(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.1f}\n")


if __name__ == "__main__":
    main()
