"""What is said of a scene: captions, referring expressions, questions with answers; and the corpus of pretraining."""

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

# {s} and {o} stand for a noun with its article, {p} for the predicate.
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
    """Question and candidate answer as the one text that is matched with the image."""
    return f"{question} {answer}"


def a(noun: Noun) -> str:
    return f"{'an' if noun.colour[0] in 'aeiou' else 'a'} {noun}"


def sentence(triplet: Triplet, template: str) -> str:
    return template.format(s=a(triplet.subject), p=triplet.predicate, o=a(triplet.object))


def referring(triplet: Triplet, template: str) -> str:
    return template.format(s=triplet.subject, p=triplet.predicate, o=triplet.object)


def class_text(noun: Noun) -> str:
    return CLASS_TEMPLATE.format(s=a(noun))


def _only(scene: Scene, attribute: str) -> list[Noun]:
    """The nouns whose colour (or shape) no other thing in the scene has: what a question may ask about."""
    values = [getattr(thing.noun, attribute) for thing in scene.things]
    return [thing.noun for thing in scene.things if values.count(getattr(thing.noun, attribute)) == 1]


def open_question(scene: Scene, rng: Random) -> Question | None:
    """A question whose answer is a colour, a shape or a number; None where the scene allows none of the kind drawn."""
    kind = rng.choice(("colour", "shape", "number"))
    if kind == "number":
        return Question("how many things are there ?", NUMBERS[len(scene.things) - 1], kind)
    if kind == "colour":
        nouns = _only(scene, "shape")
        return (
            Question(f"what colour is the {(noun := rng.choice(nouns)).shape} ?", noun.colour, kind) if nouns else None
        )
    nouns = _only(scene, "colour")
    return (
        Question(f"what shape is the {(noun := rng.choice(nouns)).colour} thing ?", noun.shape, kind) if nouns else None
    )


def binary_question(scene: Scene, rng: Random, answer: str) -> Question:
    """A yes-or-no question with the asked-for answer: a relation, or whether a thing is there."""
    true = facts(scene)
    if true and rng.random() < 0.5:
        triplet = rng.choice(true)
        while answer == "no" and holds(scene, triplet):
            triplet = triplet._replace(predicate=random_triplet(rng).predicate)
        return Question(f"is the {triplet.subject} {triplet.predicate} the {triplet.object} ?", answer, "binary")
    nouns = {thing.noun for thing in scene.things}
    noun = rng.choice(sorted(nouns)) if answer == "yes" else random_noun(rng, nouns)
    return Question(f"is there {a(noun)} ?", answer, "binary")


def caption(scene: Scene, rng: Random) -> str:
    """One true text about the scene, in the mixture that the embedded checkpoints are pretrained on."""
    if len(scene.things) == 1:
        return class_text(scene.things[0].noun)
    roll, true = rng.random(), facts(scene)
    if true and roll < 0.5:
        return sentence(rng.choice(true), rng.choice(TEMPLATES))
    if true and roll < 0.75:
        return referring(rng.choice(true), rng.choice(REFERRING))
    if roll < 0.85:
        question = (
            open_question(scene, rng) if rng.random() < 0.6 else binary_question(scene, rng, rng.choice(("yes", "no")))
        )
        if question is not None:
            return question.text
    nouns = [a(thing.noun) for thing in scene.things]
    rng.shuffle(nouns)
    return f"a picture of {' and '.join(nouns)}"


def pretraining_scene(seed: int, index: int) -> tuple[Scene, Random]:
    """Scene number `index` of the pretraining world and the generator that goes on to caption it."""
    name = f"pretrain/{seed}/{index}"
    rng = Random(name)
    if rng.random() < 0.2:
        return sample_single(rng, name), rng
    return sample_scene(rng, name, random_triplet(rng), distractors=rng.randrange(3)), rng


def vocabulary() -> list[str]:
    """Every word that a text of this world can hold."""
    words = {"thing", "things", "yes", "no", "?", *COLOURS, *SHAPES, *NUMBERS}
    for text in (*TEMPLATES, *REFERRING, CLASS_TEMPLATE, "an", "left right of above below inside in front larger than",
                 "how many are there", "what colour is the", "what shape", "and"):  # fmt: skip
        words.update(word for word in text.split() if not word.startswith("{"))
    return sorted(words)
