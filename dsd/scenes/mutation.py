"""Negatives by mutation of one slot of a triplet, as in ComVG (first paper, section 5.1).

A triplet is any (subject, predicate, object); its nouns are strings in real annotations and `Noun` in synthetic scenes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Literal, TypeVar

from dsd.errors import DataError
from dsd.scenes.world import COLOURS, SHAPES, Noun

Slot = Literal["subject", "predicate", "object"]
SLOTS: tuple[Slot, ...] = ("subject", "predicate", "object")  # in the order of a triplet

# Probabilities that a synthetic noun changes its colour only, its shape only, or both.
HARD: dict[tuple[str, ...], float] = {("colour",): 0.4, ("shape",): 0.4, ("colour", "shape"): 0.2}
ATTEMPTS = 1000

N = TypeVar("N")
T = TypeVar("T")


def mutate(
    triplet: tuple[N, str, N],
    slot: Slot,
    *,
    nouns: Callable[[N, Random], N],
    predicates: Sequence[str],
    rng: Random,
) -> tuple[N, str, N]:
    """Replace the value of one slot.

    Args:
        nouns: proposes another noun for the given one; proposals that equal either noun of the triplet are rejected.
        predicates: candidates for the predicate, sampled uniformly without the triplet's own.

    Raises:
        DataError: there is no other value.
    """
    subject, predicate, obj = triplet
    if slot == "predicate":
        others = [other for other in predicates if other != predicate]
        if not others:
            raise DataError(f"no predicate other than {predicate!r} to mutate {triplet} to")
        return subject, rng.choice(others), obj
    original = subject if slot == "subject" else obj
    for _ in range(ATTEMPTS):
        noun = nouns(original, rng)
        if noun not in (subject, obj):
            return (noun, predicate, obj) if slot == "subject" else (subject, predicate, noun)
    raise DataError(f"no noun other than {subject} and {obj} to mutate the {slot} of {triplet} to")


def hard_noun(noun: Noun, rng: Random) -> Noun:
    """Return another synthetic noun, with the colour, the shape or (less often) both changed."""
    changed = rng.choices(list(HARD), weights=list(HARD.values()))[0]
    colour = rng.choice([colour for colour in COLOURS if colour != noun.colour])
    shape = rng.choice([shape for shape in SHAPES if shape != noun.shape])
    return Noun(colour if "colour" in changed else noun.colour, shape if "shape" in changed else noun.shape)


def valid_negative(
    original: T, mutated: T, *, true_of_positive: Callable[[T], bool], true_of_negative: Callable[[T], bool]
) -> bool:
    """Whether each of the two triplets is true of its own image only.

    The original must be true of the positive image and false of the negative one, and the mutated triplet the reverse.
    For annotated images, "true" is that an annotation may mean the triplet.
    """
    positive = true_of_positive(original) and not true_of_positive(mutated)
    return positive and true_of_negative(mutated) and not true_of_negative(original)
