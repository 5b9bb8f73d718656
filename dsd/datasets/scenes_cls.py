"""scenes-cls: one thing; which of 96 classes of colour and shape? Embedded counterpart of CIFAR-10 (1 × classes)."""

from __future__ import annotations

from itertools import product
from random import Random

from dsd.config import DrawnDataset
from dsd.data.splits import Split
from dsd.datasets.annotations import RawExample
from dsd.datasets.synthetic import Composed, image_name, synthetic
from dsd.scenes.captions import with_article
from dsd.scenes.world import COLOURS, SHAPES, Noun, sample_single

CLASSES = [Noun(colour, shape) for colour, shape in product(COLOURS, SHAPES)]


def compose(name: str, index: int, split: Split, row: DrawnDataset) -> Composed:
    """Make an image with one example; the class follows from the index, so all classes are equally frequent."""
    true = index % len(CLASSES)
    scene = sample_single(Random(name), name, CLASSES[true])
    assert row.template is not None
    texts = tuple(row.template.format(with_article(noun)) for noun in CLASSES)
    example = RawExample(name, split, (image_name(index),), texts, ((0, true),), CLASSES[true].shape)
    return Composed({image_name(index): scene}, [example])


BENCHMARK = synthetic(
    "scenes-cls",
    compose,
    metrics="recall",
    candidates=lambda row: (1, len(CLASSES)),
    citation="synthetic, after CIFAR-10: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
)
