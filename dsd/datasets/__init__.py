"""The benchmarks, one file each, and the table of them by `kind`."""

from __future__ import annotations

from typing import Any

from dsd.datasets import (
    cifar10,
    comvg,
    fgvc_aircraft,
    folder,
    refcocog,
    scenes_cls,
    scenes_com,
    scenes_ref,
    scenes_vqa,
    stl10,
    visual_genome,
    vqav2,
    winoground,
)
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
    "refcocog": refcocog.BENCHMARK,
    "vqav2": vqav2.BENCHMARK,
    "winoground": winoground.BENCHMARK,
    "cifar10": cifar10.BENCHMARK,
    "stl10": stl10.BENCHMARK,
    "fgvc-aircraft": fgvc_aircraft.BENCHMARK,
    "folder": folder.BENCHMARK,
}


def benchmark(kind: str) -> Benchmark[Any]:
    """The benchmark of a kind.

    Raises:
        DataError: no such kind; says which there are.
    """
    if kind not in DATASETS:
        raise DataError(unknown("kind of dataset", kind, DATASETS))
    return DATASETS[kind]
