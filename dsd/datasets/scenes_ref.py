"""scenes-ref: one image, several referring expressions; which one is true? Embedded counterpart of RefCOCOg (1 × 10).

The candidates are sampled uniformly from a small grid subjects × predicates × objects, and the true one uniformly
from them, before its scene is sampled. The texts alone therefore do not reveal the answer, and the false ones are
mutations of the true one, and of each other, in one to three slots.
"""

from __future__ import annotations

from itertools import product
from math import prod
from random import Random

from dsd.config import DrawnDataset
from dsd.data.splits import Split
from dsd.datasets.annotations import RawExample
from dsd.datasets.synthetic import Composed, arguable, distractors, image_name, rename, rivals, synthetic
from dsd.scenes.captions import REFERRING, referring
from dsd.scenes.mutation import hard_noun
from dsd.scenes.world import PREDICATES, Noun, Scene, Triplet, holds, random_noun, sample_scene

NAMED = 0.5  # probability that a further thing gets a noun of another candidate
ATTEMPTS = 100  # scenes sampled for a grid before another grid is sampled


def compose(name: str, index: int, split: Split, row: DrawnDataset) -> Composed:
    """Make an image with one example."""
    rng = Random(name)
    assert row.candidates is not None
    scene = None
    while scene is None:
        candidates = _candidates(rng, row.candidates)
        true = rng.randrange(len(candidates))
        scene = _scene(rng, name, candidates, candidates[true])
    template = rng.choice(REFERRING)
    texts = tuple(referring(triplet, template) for triplet in candidates)
    example = RawExample(name, split, (image_name(index),), texts, ((0, true),), candidates[true].predicate)
    return Composed({image_name(index): scene}, [example])


def _candidates(rng: Random, count: int) -> list[Triplet]:
    """Return `count` random cells of the smallest sufficient grid; no noun is both subject and object."""
    sides = [1, 1, 1]
    while prod(sides) < count:
        sides[rng.choice([i for i in range(3) if sides[i] == min(sides)])] += 1
    predicates = [rng.choice(list(PREDICATES))]
    while len(predicates) < sides[1]:
        allowed = [p for p in PREDICATES if all(p in rivals(other) for other in predicates)]
        predicates.append(rng.choice(allowed))
    nouns: set[Noun] = set()
    subjects, objects = _similar(rng, sides[0], nouns), _similar(rng, sides[2], nouns)
    return rng.sample([Triplet(*cell) for cell in product(subjects, predicates, objects)], count)


def _similar(rng: Random, count: int, taken: set[Noun]) -> list[Noun]:
    """Return `count` nouns that are mutations of one another and not in `taken`, and add them to `taken`."""
    nouns = [random_noun(rng, taken)]
    while len(nouns) < count:
        noun = hard_noun(rng.choice(nouns), rng)
        if noun not in taken and noun not in nouns:
            nouns.append(noun)
    taken.update(nouns)
    return nouns


def _scene(rng: Random, seed: str, candidates: list[Triplet], true: Triplet) -> Scene | None:
    """Sample three or four things of which `true` holds and no other candidate is arguable; None after `ATTEMPTS`."""
    nouns = {noun for triplet in candidates for noun in (triplet.subject, triplet.object)}
    for _ in range(ATTEMPTS):
        scene = sample_scene(rng, seed, true, distractors=rng.choice((1, 2)), exclude=nouns)
        named = sorted(nouns - {true.subject, true.object})
        rng.shuffle(named)
        further = distractors(scene, true)
        renamed = [pair for pair in zip(further, named, strict=False) if rng.random() < NAMED]
        scene = rename(scene, dict(renamed))
        false = (triplet for triplet in candidates if triplet != true)
        if further and holds(scene, true) and not any(arguable(scene, triplet) for triplet in false):
            return scene
    return None


BENCHMARK = synthetic(
    "scenes-ref",
    compose,
    metrics="recall",
    candidates=lambda row: (1, row.candidates or 0),
    citation="synthetic, after RefCOCOg: Mao et al., CVPR 2016; Yu et al., ECCV 2016",
)
