"""Mutation changes exactly one slot, to a hard negative."""

from __future__ import annotations

from collections import Counter
from functools import partial
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsd.errors import DataError
from dsd.scenes.captions import NUMBERS
from dsd.scenes.mutation import HARD, SLOTS, Slot, hard_noun, mutate, valid_negative
from dsd.scenes.world import COLOURS, PREDICATES, SHAPES, Noun, Triplet, holds, random_triplet, sample_scene

NOUNS = st.builds(Noun, st.sampled_from(COLOURS), st.sampled_from(SHAPES))


@settings(deadline=None, max_examples=50)
@given(NOUNS, NOUNS, st.sampled_from(list(PREDICATES)), st.sampled_from(SLOTS), st.integers(0))
def test_exactly_one_slot_changes(a: Noun, b: Noun, predicate: str, slot: Slot, seed: int) -> None:
    assume(a != b)
    original = Triplet(a, predicate, b)
    mutated = Triplet(*mutate(original, slot, nouns=hard_noun, predicates=list(PREDICATES), rng=Random(seed)))
    assert [name for name in SLOTS if getattr(mutated, name) != getattr(original, name)] == [slot]
    assert mutated.subject != mutated.object
    assert mutated.predicate in PREDICATES


def test_real_annotations_are_strings() -> None:
    words = ["dog", "cat", "man"]
    triplet = ("dog", "chases", "cat")
    pick = partial(
        mutate,
        triplet,
        nouns=lambda noun, rng: rng.choice(words),
        predicates=["chases", "sees"],
        rng=Random(0),
    )
    assert pick("subject") == ("man", "chases", "cat")
    assert pick("object") == ("dog", "chases", "man")
    assert pick("predicate") == ("dog", "sees", "cat")


def test_no_other_value() -> None:
    triplet = ("dog", "chases", "cat")
    pick = partial(
        mutate,
        triplet,
        nouns=lambda noun, rng: rng.choice(["dog", "cat"]),
        predicates=["chases"],
        rng=Random(0),
    )
    with pytest.raises(DataError, match="no predicate other than 'chases'"):
        pick("predicate")
    with pytest.raises(DataError, match="no noun other than dog and cat to mutate the object"):
        pick("object")


def test_hard_nouns_mostly_share_a_colour_or_a_shape() -> None:
    rng, original, count = Random(0), Noun("red", "ring"), 4000
    found: Counter[tuple[str, ...]] = Counter()
    for _ in range(count):
        noun = hard_noun(original, rng)
        found[tuple(name for name in ("colour", "shape") if getattr(noun, name) != getattr(original, name))] += 1
    assert set(found) == set(HARD)
    for changed, weight in HARD.items():
        assert found[changed] / count == pytest.approx(weight, abs=0.03)


@pytest.mark.parametrize(
    ("positive", "negative", "valid"),
    [
        ({"original"}, {"mutated"}, True),
        ({"original", "other"}, {"mutated", "other"}, True),
        ({"original", "mutated"}, {"mutated"}, False),
        ({"original"}, {"mutated", "original"}, False),
        ({"other"}, {"mutated"}, False),
        ({"original"}, {"other"}, False),
    ],
)
def test_valid_negative(positive: set[str], negative: set[str], valid: bool) -> None:
    truth = dict(true_of_positive=positive.__contains__, true_of_negative=negative.__contains__)
    assert valid_negative("original", "mutated", **truth) is valid


def test_valid_negative_on_scenes() -> None:
    rng, valid = Random(0), 0
    for number in range(60):
        original = random_triplet(rng)
        mutated = Triplet(*mutate(original, SLOTS[number % 3], nouns=hard_noun, predicates=list(PREDICATES), rng=rng))
        positive, negative = (
            sample_scene(rng, "", triplet, rng.randrange(len(NUMBERS) - 1)) for triplet in (original, mutated)
        )
        found = valid_negative(
            original,
            mutated,
            true_of_positive=partial(holds, positive),
            true_of_negative=partial(holds, negative),
        )
        assert found == (not holds(positive, mutated) and not holds(negative, original))
        valid += found
    assert 45 <= valid <= 60
