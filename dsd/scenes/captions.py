"""Texts about scenes: captions, referring expressions, questions with answers; and the scenes of pretraining."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from dsd.scenes.world import (
    COLOURS,
    SHAPES,
    Noun,
    Scene,
    Triplet,
    facts,
    holds,
    random_noun,
    random_triplet,
    sample_scene,
    sample_single,
)

NUMBERS = ("one", "two", "three", "four")

# {s} and {o} are nouns, with an article unless it is in the template; {p} is the predicate.
TEMPLATES = ("{s} {p} {o}", "{s} is {p} {o}", "a picture of {s} {p} {o}", "there is {s} {p} {o}")
REFERRING = ("the {s} {p} the {o}", "the {s} that is {p} the {o}")
CLASS_TEMPLATE = "a photo of {s}"


class Question(NamedTuple):
    question: str
    answer: str
    category: str  # binary, colour, shape or number

    @property
    def text(self) -> str:
        return answered(self.question, self.answer)


def answered(question: str, answer: str) -> str:
    """Join a question and a candidate answer to the text that is matched with the image."""
    return f"{question} {answer}"


def with_article(noun: Noun | str) -> str:
    return f"{'an' if str(noun)[0] in 'aeiou' else 'a'} {noun}"


def sentence(triplet: Triplet, template: str) -> str:
    return template.format(s=with_article(triplet.subject), p=triplet.predicate, o=with_article(triplet.object))


def referring(triplet: Triplet, template: str) -> str:
    return template.format(s=triplet.subject, p=triplet.predicate, o=triplet.object)


def class_text(noun: Noun) -> str:
    return CLASS_TEMPLATE.format(s=with_article(noun))


def _unique(scene: Scene, attribute: str) -> list[Noun]:
    """Return the nouns whose colour (or shape) is unique in the scene: a question may ask about them."""
    values = [getattr(thing.noun, attribute) for thing in scene.things]
    return [thing.noun for thing in scene.things if values.count(getattr(thing.noun, attribute)) == 1]


def open_question(scene: Scene, rng: Random) -> Question | None:
    """Sample a question for a colour, a shape or a number; None if the scene allows none of the sampled kind."""
    kind = rng.choice(("colour", "shape", "number"))
    if kind == "number":
        return Question("how many things are there ?", NUMBERS[len(scene.things) - 1], kind)
    if kind == "colour":
        if not (nouns := _unique(scene, "shape")):
            return None
        noun = rng.choice(nouns)
        return Question(f"what colour is the {noun.shape} ?", noun.colour, kind)
    if not (nouns := _unique(scene, "colour")):
        return None
    noun = rng.choice(nouns)
    return Question(f"what shape is the {noun.colour} thing ?", noun.shape, kind)


def binary_question(scene: Scene, rng: Random, answer: str) -> Question:
    """Sample a yes-or-no question with the given answer, about a relation or the presence of a thing."""
    true = facts(scene)
    if true and rng.random() < 0.5:
        triplet = rng.choice(true)
        while answer == "no" and holds(scene, triplet):
            triplet = triplet._replace(predicate=random_triplet(rng).predicate)
        return Question(f"is the {triplet.subject} {triplet.predicate} the {triplet.object} ?", answer, "binary")
    nouns = {thing.noun for thing in scene.things}
    noun = rng.choice(sorted(nouns)) if answer == "yes" else random_noun(rng, nouns)
    return Question(f"is there {with_article(noun)} ?", answer, "binary")


def caption(scene: Scene, rng: Random) -> str:
    """Sample a true text about the scene, from the mixture that the embedded checkpoints are pretrained on."""
    if len(scene.things) == 1:
        return class_text(scene.things[0].noun)
    roll, true = rng.random(), facts(scene)
    if true and roll < 0.5:
        return sentence(rng.choice(true), rng.choice(TEMPLATES))
    if true and roll < 0.75:
        return referring(rng.choice(true), rng.choice(REFERRING))
    if roll < 0.85:
        is_open = rng.random() < 0.6
        question = open_question(scene, rng) if is_open else binary_question(scene, rng, rng.choice(("yes", "no")))
        if question is not None:
            return question.text
    nouns = [with_article(thing.noun) for thing in scene.things]
    rng.shuffle(nouns)
    return f"a picture of {' and '.join(nouns)}"


def pretraining_scene(seed: int, index: int) -> tuple[Scene, Random]:
    """Sample scene number `index` of pretraining; the returned generator is to be used for its captions."""
    name = f"pretrain/{seed}/{index}"
    rng = Random(name)
    if rng.random() < 0.2:
        return sample_single(rng, name), rng
    return sample_scene(rng, name, random_triplet(rng), distractors=rng.randrange(3)), rng


def vocabulary() -> list[str]:
    """Return all words of the texts of this module."""
    words = {"thing", "things", "yes", "no", "?", *COLOURS, *SHAPES, *NUMBERS}
    for text in (*TEMPLATES, *REFERRING, CLASS_TEMPLATE, "an", "left right of above below inside in front larger than",
                 "how many are there", "what colour is the", "what shape", "and"):  # fmt: skip
        words.update(word for word in text.split() if not word.startswith("{"))
    return sorted(words)
