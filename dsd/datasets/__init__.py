"""The benchmarks, one file each, and the table of them by `kind`."""

from __future__ import annotations

from typing import Any

from dsd.datasets import comvg, scenes_cls, scenes_com, scenes_ref, scenes_vqa, visual_genome
from dsd.datasets.raw import Benchmark, RawExample
from dsd.errors import DataError, unknown

__all__ = ["DATASETS", "Benchmark", "RawExample", "benchmark"]

DATASETS: dict[str, Benchmark[Any]] = {
    "scenes-com": scenes_com.BENCHMARK,
    "scenes-ref": scenes_ref.BENCHMARK,
    "scenes-vqa": scenes_vqa.BENCHMARK,
    "scenes-cls": scenes_cls.BENCHMARK,
    "comvg": comvg.BENCHMARK,
    "visual-genome": visual_genome.BENCHMARK,
}


def benchmark(kind: str) -> Benchmark[Any]:
    """The benchmark of a kind.

    Raises:
        DataError: no such kind; says which there are.
    """
    if kind not in DATASETS:
        raise DataError(unknown("kind of dataset", kind, DATASETS))
    return DATASETS[kind]
