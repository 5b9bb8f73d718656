"""Stage download: fetch or draw the images and annotations of every dataset."""

from __future__ import annotations

import sys
from typing import Any

from dsd.config import Params
from dsd.errors import DsdError
from flows import DATA
from flows.stages.common import Details, each, main, prune, stage


def is_transient(task: Any, run: Any, state: Any) -> bool:
    """Whether a failed download is retried: a user error is final, any other error may be temporary."""
    error = state.result(raise_on_failure=False)
    print(f"download: {run.name}: {error}", file=sys.stderr)
    return not isinstance(error, DsdError)


@stage
def download(params: Params) -> dict[str, Details]:
    from dsd.datasets import benchmark

    def dataset(name: str) -> Details:
        row = params.datasets[name]
        folder = DATA / "download" / name
        benchmark(row.kind).download(row, seed=params.seed, folder=folder, workers=params.runtime.workers)
        return {}

    prune(DATA / "download", params.datasets)
    options = {"retries": 3, "retry_delay_seconds": [2, 10, 60], "retry_condition_fn": is_transient}
    return each(dataset, params.datasets, **options)


if __name__ == "__main__":
    main(download)
