"""Benchmarks, one module each, and the table DATASETS of them by `kind`.

A module of this package adds a benchmark to the table by a constant BENCHMARK. The other
modules hold what benchmarks share: `protocol` (start here to add one), `annotations`, `published` (real images),
`classification`, `synthetic`, `relations` (Visual Genome), and the readers `parquet`, `webdataset` and `raw_files`.
"""

from __future__ import annotations

from typing import Any

from dsd.config.base import constants
from dsd.datasets.annotations import RawExample
from dsd.datasets.protocol import Benchmark
from dsd.errors import DataError, unknown

__all__ = ["DATASETS", "Benchmark", "RawExample", "benchmark", "discover"]


def benchmark(kind: str) -> Benchmark[Any]:
    """Return the benchmark of a kind.

    Raises:
        DataError: there is no such kind; lists the kinds.
    """
    if kind not in DATASETS:
        raise DataError(unknown("kind of dataset", kind, DATASETS))
    return DATASETS[kind]


def discover() -> dict[str, Benchmark[Any]]:
    """Import every module of this package and return their benchmarks by kind."""
    return {entry.kind: entry for entry in constants(__name__, __path__, "BENCHMARK")}


DATASETS = discover()  # last: modules of this package import the names above
