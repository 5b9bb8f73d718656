"""The synthetic world: texts are true, images show them, and the pretraining scenes do not change."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from random import Random

import numpy as np
import pytest

from dsd.scenes.captions import (
    NUMBERS,
    REFERRING,
    TEMPLATES,
    Question,
    binary_question,
    caption,
    class_text,
    open_question,
    pretraining_scene,
    referring,
    sentence,
    vocabulary,
    with_article,
)
from dsd.scenes.render import render
from dsd.scenes.world import (
    COLOURS,
    PREDICATES,
    SHAPES,
    Noun,
    Scene,
    Thing,
    Triplet,
    facts,
    holds,
    random_triplet,
    sample_scene,
    sample_single,
)

CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RED, BLUE = Noun("red", "circle"), Noun("blue", "square")


@cache
def world(count: int = 300) -> tuple[Scene, ...]:
    return tuple(pretraining_scene(0, index)[0] for index in range(count))


def pair(x: float, y: float, size: float = 0.15, other: float = 0.15) -> Scene:
    """A red circle at (x, y), painted after a blue square in the middle."""
    things = Thing(BLUE, 0.5, 0.5, other, 0.0), Thing(RED, x, y, size, 0.0)
    return Scene(things, "sand", "")


def answer(scene: Scene, question: str) -> str:
    """Answer a question by its words."""
    words = question.split()
    nouns = [thing.noun for thing in scene.things]
    if question == "how many things are there ?":
        return NUMBERS[len(nouns) - 1]
    if found := re.fullmatch(r"what colour is the (\w+) \?", question):
        (noun,) = [noun for noun in nouns if noun.shape == found[1]]
        return noun.colour
    if found := re.fullmatch(r"what shape is the (\w+) thing \?", question):
        (noun,) = [noun for noun in nouns if noun.colour == found[1]]
        return noun.shape
    if found := re.fullmatch(r"is there an? (\w+) (\w+) \?", question):
        return "yes" if Noun(found[1], found[2]) in nouns else "no"
    triplet = Triplet(Noun(*words[2:4]), " ".join(words[4:-4]), Noun(*words[-3:-1]))
    return "yes" if holds(scene, triplet) else "no"


@pytest.mark.parametrize(
    ("scene", "true"),
    [
        (pair(0.1, 0.5), {"left of"}),
        (pair(0.9, 0.55), {"right of"}),
        (pair(0.5, 0.1), {"above"}),  # y grows downwards
        (pair(0.5, 0.9), {"below"}),
        (pair(0.1, 0.1), set()),  # a diagonal is neither
        (pair(0.62, 0.62), {"in front of"}),
        (pair(0.51, 0.5, 0.12, 0.3), {"inside"}),
        (pair(0.1, 0.5, 0.24, 0.12), {"left of", "larger than"}),
    ],
)
def test_relations_by_hand(scene: Scene, true: set[str]) -> None:
    assert {p for p in PREDICATES if holds(scene, Triplet(RED, p, BLUE))} == true


def test_in_front_is_painted_later() -> None:
    scene = pair(0.62, 0.62)
    behind = Scene(scene.things[::-1], scene.background, scene.seed)
    assert holds(scene, Triplet(RED, "in front of", BLUE))
    assert not holds(behind, Triplet(RED, "in front of", BLUE))
    assert holds(behind, Triplet(BLUE, "in front of", RED))


def test_nothing_holds_for_missing_things() -> None:
    scene = pair(0.1, 0.5)
    assert not any(holds(scene, Triplet(RED, p, Noun("red", "square"))) for p in PREDICATES)
    assert not any(holds(scene, Triplet(RED, p, RED)) for p in PREDICATES)


def test_facts_are_what_holds_and_directions_are_mutual() -> None:
    for scene in world():
        nouns = [thing.noun for thing in scene.things]
        true = set(facts(scene))
        assert true == {t for x in nouns for p in PREDICATES for y in nouns if holds(scene, t := Triplet(x, p, y))}
        for subject, predicate, obj in true:
            converse = Triplet(obj, CONVERSE.get(predicate, predicate), subject)
            assert (converse in true) == (predicate in CONVERSE)


def test_scenes_are_legible() -> None:
    for scene in world():
        nouns = [thing.noun for thing in scene.things]
        assert 1 <= len(nouns) == len(set(nouns)) <= 4
        for thing in scene.things:
            assert thing.size >= 0.11  # 5 pixels across the radius at a parity of 48
            assert 0.95 * thing.size <= min(thing.x, thing.y, 1 - thing.x, 1 - thing.y)


@pytest.mark.parametrize("predicate", PREDICATES)
def test_sampled_scenes(predicate: str) -> None:
    rng = Random(predicate)
    exclude = {Noun(colour, shape) for colour in COLOURS for shape in SHAPES[:6]}
    for distractors in (0, 1, 2):
        triplet = random_triplet(rng)._replace(predicate=predicate)
        scene = sample_scene(rng, "", triplet, distractors, exclude)
        assert holds(scene, triplet)
        assert len(scene.things) <= 2 + distractors
        assert not exclude & {t.noun for t in scene.things} - {triplet.subject, triplet.object}


def test_captions_are_true() -> None:
    kinds: set[str] = set()
    for index in range(300):
        scene, rng = pretraining_scene(0, index)
        nouns = [thing.noun for thing in scene.things]
        statements = {sentence(t, template) for t in facts(scene) for template in TEMPLATES}
        statements |= {referring(t, template) for t in facts(scene) for template in REFERRING}
        for text in (caption(scene, rng) for _ in range(3)):
            question, mark, reply = text.partition("? ")
            if mark:
                kinds.add("question")
                assert reply == answer(scene, question + "?"), text
            elif text in statements:
                kinds.add("statement")
            elif len(nouns) == 1:
                kinds.add("class")
                assert text == class_text(nouns[0])
            else:
                kinds.add("list")
                listed = text.removeprefix("a picture of ").split(" and ")
                assert sorted(listed) == sorted(with_article(noun) for noun in nouns)
    assert kinds == {"question", "statement", "class", "list"}


def test_questions_are_answered_right() -> None:
    rng, kinds = Random(0), set()
    for scene in world():
        question = open_question(scene, rng)
        questions = [Question(*question)] if question else []
        questions += [binary_question(scene, rng, wanted) for wanted in ("yes", "no")]
        assert [q.answer for q in questions[-2:]] == ["yes", "no"]
        for q in questions:
            kinds.add((q.category, q.answer if q.category == "binary" else ""))
            assert q.answer == answer(scene, q.question), q.question
    assert kinds == {("binary", "yes"), ("binary", "no"), ("colour", ""), ("shape", ""), ("number", "")}


def test_the_vocabulary_covers_the_captions() -> None:
    known = set(vocabulary())
    for index in range(300):
        scene, rng = pretraining_scene(1, index)
        assert set(caption(scene, rng).split()) <= known


def test_articles() -> None:
    assert (
        sentence(Triplet(Noun("orange", "ring"), "above", BLUE), TEMPLATES[0]) == "an orange ring above a blue square"
    )
    assert class_text(RED) == "a photo of a red circle"


def test_the_pretraining_scenes_do_not_change() -> None:
    """The checkpoints are trained on these scenes and captions: another digest needs new checkpoints."""
    state = hashlib.sha256()
    for index in range(200):
        scene, rng = pretraining_scene(0, index)
        for thing in scene.things:
            state.update(f"{thing.noun} {thing.x:.6f} {thing.y:.6f} {thing.size:.6f} {thing.angle:.4f}\n".encode())
        state.update(f"{scene.background} {scene.seed} {[caption(scene, rng) for _ in range(6)]}\n".encode())
    assert state.hexdigest()[:16] == "46b3e5ac774cbb11"


def test_rendering_is_deterministic() -> None:
    scene, other = world()[0], world()[1]
    first = np.asarray(render(scene, 64))
    assert first.shape == (64, 64, 3)
    assert np.array_equal(first, np.asarray(render(scene, 64)))
    assert not np.array_equal(first, np.asarray(render(other, 64)))
    # The seed draws texture and shading, nothing else.
    again = np.asarray(render(Scene(scene.things, scene.background, "another"), 64))
    difference = np.abs(first.astype(int) - again)
    assert 0 < difference.mean() < 40


@pytest.mark.parametrize("colour", COLOURS)
def test_things_have_the_colour_of_their_noun(colour: str) -> None:
    rng = Random(colour)
    hues = {}
    for other in COLOURS:
        scene = sample_single(rng, f"{other}", Noun(other, "circle"))
        pixels = np.asarray(render(scene, 64), int)
        (thing,) = scene.things
        hues[other] = pixels[int(thing.y * 64), int(thing.x * 64)]
    scene = sample_single(rng, "seen", Noun(colour, "square"))
    (thing,) = scene.things
    seen = np.asarray(render(scene, 64), int)[int(thing.y * 64), int(thing.x * 64)]
    assert min(hues, key=lambda other: float(np.square(hues[other] - seen).sum())) == colour


def test_shapes_look_different() -> None:
    """No two shapes of one colour, size and place share nine tenths of their pixels."""
    masks = {}
    for shape in SHAPES:
        scene = Scene((Thing(Noun("blue", shape), 0.5, 0.5, 0.3, 0.0),), "paper", "")
        pixels = np.asarray(render(scene, 48), int)
        masks[shape] = pixels[..., 0] < 120
    for shape, mask in masks.items():
        assert mask.sum() > 40
        for other in SHAPES:
            if other != shape:
                assert (mask & masks[other]).sum() / (mask | masks[other]).sum() < 0.9, (shape, other)


def test_things_in_front_cover_others() -> None:
    pixels = np.asarray(render(pair(0.6, 0.6), 64), int)
    red, blue = pixels[int(0.55 * 64), int(0.55 * 64)], pixels[int(0.42 * 64), int(0.42 * 64)]
    assert red[0] > red[2] + 60
    assert blue[2] > blue[0] + 60
