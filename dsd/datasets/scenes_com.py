"""scenes-com: two images, one sentence; which image is it true of? Stands in for ComVG (2 × 1).

A sentence has one positive image and, for each slot, a negative one: a fresh layout of the triplet with that
slot mutated. Positive and negative images are sampled alike, so that no image gives itself away:

- every scene shows its own triplet and is clearly none of the other predicate that the sentence comes with;
- the number of distractors, the sizes and the background do not depend on the triplet;
- a distractor often has the colour or the shape that is missing from the mutated noun, so that the words of
  the sentence, looked for one at a time, are found in both images.

In the few-shot split an example also has the mutated sentence, which is true of the negative image (2 × 2): a prompt
that only learned which images score high would gain nothing between the two sentences of one image.
"""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from random import Random

from dsd.config import DrawnDataset
from dsd.data.splits import Split
from dsd.datasets.drawn import Item, arguable, distractors, embedded, picture, rename, rivals
from dsd.datasets.raw import RawExample
from dsd.scenes.captions import TEMPLATES, sentence
from dsd.scenes.mutation import SLOTS, hard_noun, mutate, valid_negative
from dsd.scenes.world import PREDICATES, Noun, Scene, Triplet, holds, random_noun, sample_scene

DECOY = 0.75  # how often a distractor that is there takes on what is missing


def compose(name: str, index: int, split: Split, row: DrawnDataset) -> Item:
    """A sentence: four pictures and three examples."""
    rng = Random(name)
    original = _triplet(rng)
    others = rivals(original.predicate)
    mutated: dict[str, Triplet] = {
        slot: Triplet(*mutate(original, slot, nouns=hard_noun, predicates=others, rng=rng)) for slot in SLOTS
    }
    template = rng.choice(TEMPLATES)

    # (missing, shown) of a negative image; the other way round in an image with both nouns of the sentence.
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
        images = picture(index, "positive"), picture(index, slot)
        true = Random(f"{name}/{slot}").randrange(2)
        texts: tuple[str, ...] = (sentence(original, template),)
        answer: tuple[tuple[int, int], ...] = ((true, 0),)
        if split == "train":
            texts, answer = (*texts, sentence(mutated[slot], template)), (*answer, (1 - true, 1))
        examples.append(RawExample(f"{name}/{slot}", split, images[::-1] if true else images, texts, answer, slot))
    return Item({picture(index, role): scene for role, scene in scenes.items()}, examples)


def _triplet(rng: Random) -> Triplet:
    """Predicates are as frequent here as among the mutated triplets: each counts by the rivals it has."""
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
    """Gives distractors the colour or the shape that `missing` has and `shown`, in its place, has not."""
    lost = [name for name in ("colour", "shape") if getattr(missing, name) != getattr(shown, name)]
    rng.shuffle(lost)
    for noun, attribute in zip(distractors(scene, triplet), lost, strict=False):
        if rng.random() < DECOY:
            taken = exclude | {thing.noun for thing in scene.things}
            decoy = noun
            while decoy in taken:
                decoy = random_noun(rng)._replace(**{attribute: getattr(missing, attribute)})
            scene = rename(scene, {noun: decoy})
    return scene


BENCHMARK = embedded(
    compose,
    examples=len(SLOTS),
    metrics="slots",
    candidates=lambda row: (2, 1),
    citation="drawn, after Compositional Visual Genome: Jiang et al., ComCLIP, 2022 (arXiv:2211.13854)",
)
