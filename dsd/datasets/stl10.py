"""STL-10: 96 × 96 images of ten classes."""

from __future__ import annotations

from dsd.datasets.classification import PARQUET, classification

BENCHMARK = classification(
    "stl10",
    PARQUET,
    citation="Coates et al., An Analysis of Single-Layer Networks in Unsupervised Feature Learning, AISTATS 2011",
    licence="images from ImageNet, under its terms: non-commercial research and education",
    training=5_000,
    testing=8_000,
    classes=10,
)
