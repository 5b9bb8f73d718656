"""scenes-com: two images, one sentence; which image is it true of? Embedded counterpart of ComVG (2 × 1).

A sentence has one positive image and, for each slot, a negative one: a new layout of the triplet with that slot
mutated. Positive and negative images are sampled in the same way, so the image alone does not reveal the answer:

- every scene shows its own triplet, and the other predicate that the sentence is paired with is clearly false;
- the number of distractors, the sizes and the background do not depend on the triplet;
- a distractor often has the colour or the shape that the mutated noun lacks, so that each single word of the sentence
  is true of both images.

In the few-shot split an example also has the mutated sentence, which is true of the negative image (2 × 2). A prompt
that only learns which images score high does not improve the choice between the two sentences of one image.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from random import Random

from dsd.config import DrawnDataset
from dsd.data.splits import Split
from dsd.datasets.annotations import image_choice
from dsd.datasets.synthetic import Composed, arguable, distractors, image_name, rename, rivals, synthetic
from dsd.scenes.captions import TEMPLATES, sentence
from dsd.scenes.mutation import SLOTS, hard_noun, mutate, valid_negative
from dsd.scenes.world import PREDICATES, Noun, Scene, Triplet, holds, random_noun, sample_scene

DECOY = 0.75  # probability that a distractor gets an attribute of the missing noun


def compose(name: str, index: int, split: Split, row: DrawnDataset) -> Composed:
    """Make a sentence with four images and three examples."""
    rng = Random(name)
    original = _triplet(rng)
    others = rivals(original.predicate)
    mutated: dict[str, Triplet] = {
        slot: Triplet(*mutate(original, slot, nouns=hard_noun, predicates=others, rng=rng)) for slot in SLOTS
    }
    template = rng.choice(TEMPLATES)

    # (missing, shown) nouns of a negative image; reversed in an image with both nouns of the sentence.
    swaps = {
        "subject": (original.subject, mutated["subject"].subject),
        "object": (original.object, mutated["object"].object),
    }
    nouns = {noun for swap in swaps.values() for noun in swap}
    scenes: dict[str, Scene] = {}
    for role, triplet in {"positive": original, **mutated}.items():
        rival = (original if role == "predicate" else mutated["predicate"]).predicate
        missing, shown = swaps[role] if role in swaps else rng.choice(list(swaps.values()))[::-1]
        scene = _scene(rng, f"{name}/{role}", triplet, rival, exclude=nouns)
        scenes[role] = _with_decoys(scene, triplet, missing, shown, exclude=nouns, rng=rng)

    examples = []
    for slot in SLOTS:
        positive, negative = (partial(holds, scenes[role]) for role in ("positive", slot))
        assert valid_negative(original, mutated[slot], true_of_positive=positive, true_of_negative=negative)
        images = image_name(index, "positive"), image_name(index, slot)
        texts = sentence(original, template), sentence(mutated[slot], template)
        examples.append(image_choice(f"{name}/{slot}", split, images, texts, slot))
    return Composed({image_name(index, role): scene for role, scene in scenes.items()}, examples)


def _triplet(rng: Random) -> Triplet:
    """Sample a triplet; predicates are weighted by their rivals, so mutated triplets have the same frequencies."""
    subject, predicates = random_noun(rng), list(PREDICATES)
    predicate = rng.choices(predicates, weights=[len(rivals(predicate)) for predicate in predicates])[0]
    return Triplet(subject, predicate, random_noun(rng, {subject}))


def _scene(rng: Random, seed: str, triplet: Triplet, rival: str, exclude: set[Noun]) -> Scene:
    while True:
        scene = sample_scene(rng, seed, triplet, distractors=rng.randrange(3), exclude=exclude)
        if not arguable(scene, triplet._replace(predicate=rival)):
            return scene


def _with_decoys(
    scene: Scene, triplet: Triplet, missing: Noun, shown: Noun, *, exclude: Set[Noun], rng: Random
) -> Scene:
    """Give distractors the colour or shape that `missing` has and `shown`, which replaces it, has not."""
    differing = [name for name in ("colour", "shape") if getattr(missing, name) != getattr(shown, name)]
    rng.shuffle(differing)
    for noun, attribute in zip(distractors(scene, triplet), differing, strict=False):
        if rng.random() < DECOY:
            taken = exclude | {thing.noun for thing in scene.things}
            decoy = noun
            while decoy in taken:
                decoy = random_noun(rng)._replace(**{attribute: getattr(missing, attribute)})
            scene = rename(scene, {noun: decoy})
    return scene


BENCHMARK = synthetic(
    "scenes-com",
    compose,
    examples=len(SLOTS),
    metrics="slots",
    candidates=lambda row: (2, 1),
    citation="synthetic, after Compositional Visual Genome: Jiang et al., ComCLIP, 2022 (arXiv:2211.13854)",
)
