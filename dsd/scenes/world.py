"""Scenes: their things, the relations that hold in them, and how they are sampled.

Coordinates: the canvas is the unit square, x to the right, y downwards; `size` is the radius of a thing's bounding
circle. `holds` decides every relation from positions, sizes and paint order, so captions, mutations and answers are
exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import NamedTuple

SHAPES = (
    "circle", "square", "triangle", "star", "heart", "cross",
    "ring", "crescent", "diamond", "arrow", "flower", "bolt",
)  # fmt: skip
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
BACKGROUNDS = ("sand", "sky", "mint", "lilac", "stone", "paper")


class Noun(NamedTuple):
    """The name of a thing, unique in its scene."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


class Triplet(NamedTuple):
    """Subject, predicate, object: "a red circle left of a blue square"."""

    subject: Noun
    predicate: str
    object: Noun


@dataclass(frozen=True)
class Thing:
    noun: Noun
    x: float
    y: float
    size: float
    angle: float


@dataclass(frozen=True)
class Scene:
    """Things in paint order (later ones cover earlier ones) on a background; `seed` selects its texture."""

    things: tuple[Thing, ...]
    background: str
    seed: str

    def thing(self, noun: Noun) -> Thing | None:
        return next((thing for thing in self.things if thing.noun == noun), None)


def _distance(a: Thing, b: Thing) -> float:
    return math.hypot(a.x - b.x, a.y - b.y)


def _apart(a: Thing, b: Thing) -> bool:
    return _distance(a, b) > 0.95 * (a.size + b.size)


def _beside(offset: float, across: float) -> bool:
    return offset >= 0.2 and abs(across) <= 0.5 * offset


def _inside(a: Thing, b: Thing) -> bool:
    return a.size <= 0.5 * b.size and _distance(a, b) <= 0.35 * b.size


def _overlapping(a: Thing, b: Thing) -> bool:
    reach = a.size + b.size
    return 0.4 * reach <= _distance(a, b) <= 0.85 * reach and max(a.size, b.size) < 1.5 * min(a.size, b.size)


Test = Callable[[Thing, Thing, bool], bool]  # of (subject, object, subject is painted later)

PREDICATES: dict[str, Test] = {
    "left of": lambda a, b, later: _apart(a, b) and _beside(b.x - a.x, b.y - a.y),
    "right of": lambda a, b, later: _apart(a, b) and _beside(a.x - b.x, b.y - a.y),
    "above": lambda a, b, later: _apart(a, b) and _beside(b.y - a.y, b.x - a.x),
    "below": lambda a, b, later: _apart(a, b) and _beside(a.y - b.y, b.x - a.x),
    "inside": lambda a, b, later: later and _inside(a, b),
    "in front of": lambda a, b, later: later and _overlapping(a, b),
    "larger than": lambda a, b, later: a.size >= 1.6 * b.size,
}


def holds(scene: Scene, triplet: Triplet, tests: Mapping[str, Test] = PREDICATES) -> bool:
    """Whether both things are in the scene and their geometry satisfies the relation."""
    subject, obj = scene.thing(triplet.subject), scene.thing(triplet.object)
    if subject is None or obj is None or subject is obj:
        return False
    later = scene.things.index(subject) > scene.things.index(obj)
    return tests[triplet.predicate](subject, obj, later)


@lru_cache(maxsize=16)
def facts(scene: Scene) -> tuple[Triplet, ...]:
    """Return all triplets that hold in the scene, in a fixed order."""
    nouns = [thing.noun for thing in scene.things]
    candidates = (Triplet(a, predicate, b) for a in nouns for predicate in PREDICATES for b in nouns if a != b)
    return tuple(triplet for triplet in candidates if holds(scene, triplet))


def random_noun(rng: Random, exclude: set[Noun] | frozenset[Noun] = frozenset()) -> Noun:
    while True:
        noun = Noun(rng.choice(COLOURS), rng.choice(SHAPES))
        if noun not in exclude:
            return noun


def _sizes(rng: Random, predicate: str) -> tuple[float, float]:
    """Sample radii (subject, object) that suit the relation and stay legible after resizing to parity."""
    if predicate == "inside":
        return rng.uniform(0.11, 0.13), rng.uniform(0.28, 0.34)
    if predicate == "larger than":
        return rng.uniform(0.22, 0.27), rng.uniform(0.11, 0.13)
    size = rng.uniform(0.13, 0.2)
    return size, size * rng.uniform(0.8, 1.25)


def _offset(rng: Random, predicate: str, sizes: tuple[float, float]) -> tuple[float, float]:
    """Sample the position of the subject relative to the object."""
    reach = sizes[0] + sizes[1]
    if predicate == "inside":
        return rng.uniform(-0.04, 0.04), rng.uniform(-0.04, 0.04)
    if predicate == "in front of":
        distance, angle = rng.uniform(0.5, 0.75) * reach, rng.uniform(0, 2 * math.pi)
        return distance * math.cos(angle), distance * math.sin(angle)
    along = rng.uniform(1.0, 1.5) * max(reach, 0.21)
    across = rng.uniform(-0.35, 0.35) * along
    directions = {
        "left of": (-along, across),
        "right of": (along, across),
        "above": (across, -along),
        "below": (across, along),
    }
    return directions[predicate if predicate in directions else rng.choice(list(directions))]


def _fits(thing: Thing) -> bool:
    margin = 0.95 * thing.size
    return margin <= thing.x <= 1 - margin and margin <= thing.y <= 1 - margin


def _pair(rng: Random, triplet: Triplet) -> list[Thing] | None:
    """Sample subject and object, in paint order, or None if they do not fit the canvas."""
    sizes = _sizes(rng, triplet.predicate)
    dx, dy = _offset(rng, triplet.predicate, sizes)
    x, y = rng.uniform(0.12, 0.88), rng.uniform(0.12, 0.88)
    obj = Thing(triplet.object, x, y, sizes[1], rng.uniform(-25, 25))
    subject = Thing(triplet.subject, x + dx, y + dy, sizes[0], rng.uniform(-25, 25))
    return [obj, subject] if _fits(obj) and _fits(subject) else None


def _distractor(rng: Random, things: list[Thing], exclude: set[Noun]) -> Thing | None:
    noun = random_noun(rng, exclude | {thing.noun for thing in things})
    thing = Thing(noun, rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.11, 0.16), rng.uniform(-25, 25))
    return thing if _fits(thing) and all(_apart(thing, other) for other in things) else None


def sample_scene(rng: Random, seed: str, triplet: Triplet, distractors: int, exclude: set[Noun] | None = None) -> Scene:
    """Sample a scene in which the triplet holds, with up to `distractors` further things, none of them in `exclude`.

    A distractor that does not fit the canvas is left out, so a scene has two to 2 + `distractors` things.
    """
    while True:
        things = _pair(rng, triplet)
        if things is None:
            continue
        for _ in range(distractors):
            attempts = (_distractor(rng, things, exclude or set()) for _ in range(30))
            extra = next((thing for thing in attempts if thing is not None), None)
            if extra is not None:
                things.insert(rng.randrange(len(things) + 1), extra)
        scene = Scene(tuple(things), rng.choice(BACKGROUNDS), seed)
        if holds(scene, triplet):
            return scene


def sample_single(rng: Random, seed: str, noun: Noun | None = None) -> Scene:
    """Sample a scene with one thing, for classification."""
    while True:
        size = rng.uniform(0.13, 0.34)
        name = noun or random_noun(rng)
        thing = Thing(name, rng.uniform(0.12, 0.88), rng.uniform(0.12, 0.88), size, rng.uniform(-25, 25))
        if _fits(thing):
            return Scene((thing,), rng.choice(BACKGROUNDS), seed)


def random_triplet(rng: Random) -> Triplet:
    subject = random_noun(rng)
    return Triplet(subject, rng.choice(list(PREDICATES)), random_noun(rng, {subject}))
