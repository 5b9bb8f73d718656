"""CIFAR-10: 32 × 32 images of ten classes."""

from __future__ import annotations

from dsd.datasets.classification import PARQUET, classification

BENCHMARK = classification(
    "cifar10",
    PARQUET,
    citation="Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
    licence="none stated by its authors",
    training=50_000,
    testing=10_000,
    classes=10,
)
