"""scenes-vqa: one image, one question with thirteen candidate answers. Embedded counterpart of VQAv2 (1 × answers).

The type of question and its answer are sampled first, uniformly; scenes and questions of the pretraining distribution
are then sampled until one has that answer. The candidates are the same mixture for every question: yes, no, four
colours, four shapes, three numbers. Neither the wording nor the candidates therefore reveal the answer.
"""

from __future__ import annotations

from itertools import permutations
from random import Random

from dsd.config import DrawnDataset
from dsd.data.examples import MatchingExample
from dsd.data.splits import Split
from dsd.datasets.annotations import RawExample
from dsd.datasets.synthetic import Composed, arguable, image_name, synthetic
from dsd.scenes.captions import NUMBERS, Question, answered, open_question, referring, with_article
from dsd.scenes.mutation import hard_noun
from dsd.scenes.world import COLOURS, SHAPES, Scene, Triplet, holds, random_triplet, sample_scene

COUNTS = NUMBERS[1:]  # things in a scene: two to four
OPEN = {"colour": COLOURS, "shape": SHAPES, "number": COUNTS}
ANSWERS = {"binary": ("yes", "no"), **OPEN}  # by kind of question
RELATION = "is the {s} {p} the {o} ?"
CHOICES = 4  # colours, and shapes, among the candidates


def compose(name: str, index: int, split: Split, row: DrawnDataset) -> Composed:
    """Make an image with one example."""
    rng = Random(name)
    assert row.binary is not None
    scene, question = _binary(rng, name) if rng.random() < row.binary else _open(rng, name)
    answers = _answers(rng, scene, question.category)
    true = answers.index(question.answer)
    texts = tuple(answered(question.question, answer) for answer in answers)
    example = RawExample(name, split, (image_name(index),), texts, ((0, true),), question.category)
    return Composed({image_name(index): scene}, [example])


def _binary(rng: Random, seed: str) -> tuple[Scene, Question]:
    """Sample a question about a relation or the presence of a thing; the scene is independent of the answer."""
    answer = rng.choice(("yes", "no"))
    triplet = random_triplet(rng)
    scene = _sample(rng, seed, triplet)
    nouns = [thing.noun for thing in scene.things]
    if rng.random() < 0.5:
        # Some pair has this relation whatever the answer is.
        pairs = [Triplet(subject, triplet.predicate, obj) for subject, obj in permutations(nouns, 2)]
        yes, no = [t for t in pairs if holds(scene, t)], [t for t in pairs if not arguable(scene, t)]
        return scene, Question(referring(rng.choice(yes if answer == "yes" else no), RELATION), answer, "binary")
    noun = rng.choice(nouns)
    while answer == "no" and noun in nouns:
        noun = hard_noun(noun, rng)
    return scene, Question(f"is there {with_article(noun)} ?", answer, "binary")


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
    """Return the candidates, in random order.

    The colours (or shapes) of the scene are candidates only if the question asks for a colour (or shape): they are the
    hardest to tell from the right one. In a yes-or-no question they would reveal what is there.
    """
    answers = [*ANSWERS["binary"], *COUNTS]
    for kind in ("colour", "shape"):
        things = scene.things if kind == category else ()
        shown = list(dict.fromkeys(getattr(thing.noun, kind) for thing in things))
        answers += [*shown, *rng.sample([v for v in OPEN[kind] if v not in shown], CHOICES - len(shown))]
    rng.shuffle(answers)
    return answers


def own_kind(example: MatchingExample) -> list[int]:
    """Return the indices of the texts whose answer is of the kind that the question asks for."""
    return [n for n, text in enumerate(example.texts) if text.split()[-1] in ANSWERS[example.category]]


BENCHMARK = synthetic(
    "scenes-vqa",
    compose,
    metrics="answers",
    candidates=lambda row: (1, 2 + len(COUNTS) + 2 * CHOICES),
    own_kind=own_kind,
    citation="synthetic, after VQAv2: Goyal et al., Making the V in VQA Matter, CVPR 2017",
)
