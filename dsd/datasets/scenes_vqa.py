"""scenes-vqa: one image, one question with thirteen candidate answers. Stands in for VQAv2 (1 × answers).

Which kind of question is asked, and what its answer is, is drawn first and evenly; scenes and questions of
the pretraining world are then sampled until one has that answer. The candidates are made up in the same way
whatever the question: yes, no, four colours, four shapes, three numbers. So neither the question's wording
nor the set of candidates gives the answer away.
"""

from __future__ import annotations

from random import Random

from dsd.datasets.raw import RawExample
from dsd.datasets.scenes import Item, arguable, embedded, picture
from dsd.fewshot import Split
from dsd.params import DatasetParams
from dsd.scenes.captions import NUMBERS, Question, answered, binary_question, open_question, referring
from dsd.scenes.world import COLOURS, PREDICATES, SHAPES, Scene, Triplet, random_triplet, sample_scene

COUNTS = NUMBERS[1:]  # things in a scene: two to four
OPEN = {"colour": COLOURS, "shape": SHAPES, "number": COUNTS}
RELATION = "is the {s} {p} the {o} ?"  # as `binary_question` asks it
CHOICES = 4  # colours, and shapes, among the candidates


def compose(name: str, index: int, split: Split, row: DatasetParams) -> Item:
    """A picture with one example."""
    rng = Random(name)
    assert row.binary is not None
    scene, question = _binary(rng, name) if rng.random() < row.binary else _open(rng, name)
    answers = _answers(rng, scene, question.category)
    true = answers.index(question.answer)
    texts = tuple(answered(question.question, answer) for answer in answers)
    example = RawExample(name, split, (picture(index),), texts, ((0, true),), question.category)
    return Item({picture(index): scene}, [example])


def _binary(rng: Random, seed: str) -> tuple[Scene, Question]:
    """Half relations, each predicate as often as another, half presence; of each, as many yes as no."""
    answer = rng.choice(("yes", "no"))
    predicate = rng.choice(list(PREDICATES)) if rng.random() < 0.5 else None
    while True:
        triplet = random_triplet(rng)
        # A relation that is asked for is somewhere in the scene, so that it being there is no answer yet.
        scene = _sample(rng, seed, triplet if predicate is None else triplet._replace(predicate=predicate))
        question = binary_question(scene, rng, answer)
        asked = _relation(scene, question)
        if predicate != (asked and asked.predicate):
            continue
        if answer == "yes" or asked is None or not arguable(scene, asked):
            return scene, question


def _relation(scene: Scene, question: Question) -> Triplet | None:
    """The triplet that the question asks about, None where it asks whether a thing is there."""
    nouns = [thing.noun for thing in scene.things]
    triplets = (Triplet(a, predicate, b) for a in nouns for predicate in PREDICATES for b in nouns)
    return next((triplet for triplet in triplets if referring(triplet, RELATION) == question.question), None)


def _open(rng: Random, seed: str) -> tuple[Scene, Question]:
    category = rng.choice(list(OPEN))
    answer = rng.choice(OPEN[category])
    while True:
        things = NUMBERS.index(answer) + 1 if category == "number" else None
        scene = _sample(rng, seed, random_triplet(rng), things)
        question = open_question(scene, rng)
        if question is not None and (question.category, question.answer) == (category, answer):
            return scene, question


def _sample(rng: Random, seed: str, triplet: Triplet, things: int | None = None) -> Scene:
    distractors = rng.randrange(len(COUNTS)) if things is None else things - 2
    return sample_scene(rng, seed, triplet, distractors)


def _answers(rng: Random, scene: Scene, category: str) -> list[str]:
    """The candidates, in random order.

    Only the kind that is asked for looks at the scene: its other colours (or shapes) are the hardest to tell
    from the right one. In a yes-or-no question they would say what is there.
    """
    answers = ["yes", "no", *COUNTS]
    for kind in ("colour", "shape"):
        things = scene.things if kind == category else ()
        shown = list(dict.fromkeys(getattr(thing.noun, kind) for thing in things))
        answers += [*shown, *rng.sample([v for v in OPEN[kind] if v not in shown], CHOICES - len(shown))]
    rng.shuffle(answers)
    return answers


BENCHMARK = embedded(
    compose,
    requires={"binary": (0, 1)},
    metrics="answers",
    citation="drawn, after VQAv2: Goyal et al., Making the V in VQA Matter, CVPR 2017",
)
