"""Splits: whole groups, in an order that depends only on the seed and the group's name."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsd.data.splits import SPLITS, split_groups
from dsd.errors import DataError

GROUPS = st.dictionaries(st.text("ab/1", max_size=6), st.integers(1, 4), min_size=1, max_size=40)
SEEDS = st.integers(0, 2**32)


def rows_of(groups: dict[str, int]) -> list[str]:
    return [group for group, count in groups.items() for _ in range(count)]


def sizes(rows: list[str], found: dict[str, str]) -> Counter[str]:
    return Counter(found[group] for group in rows if group in found)


@settings(deadline=None, max_examples=50)
@given(GROUPS, SEEDS, st.data())
def test_splits_are_filled_in_whole_groups(groups: dict[str, int], seed: int, data: st.DataObject) -> None:
    rows, largest = rows_of(groups), max(groups.values())
    # Each split can run over by less than its last group.
    room = max(0, len(rows) - 3 * (largest - 1))
    few_shot = data.draw(st.integers(0, room))
    validation = data.draw(st.integers(0, room - few_shot))
    test = data.draw(st.integers(0, room - few_shot - validation))
    found = split_groups(rows, few_shot=few_shot, validation=validation, test=test, seed=seed, sample=0)
    assert set(found) <= set(groups)
    assert set(found.values()) <= set(SPLITS)
    for name, wanted in zip(SPLITS, (few_shot, validation, test), strict=True):
        filled = sizes(rows, found)[name]
        assert wanted <= filled < wanted + largest
        assert filled > 0 or wanted == 0


@settings(deadline=None, max_examples=50)
@given(GROUPS, SEEDS, st.integers(0))
def test_the_order_of_rows_does_not_matter(groups: dict[str, int], seed: int, order: int) -> None:
    rows = rows_of(groups)
    shuffled = Random(order).sample(rows, len(rows))
    wanted = dict(few_shot=len(rows) // 4, validation=0, test=len(rows) // 4, seed=seed, sample=0)
    try:
        expected = split_groups(rows, **wanted)
    except DataError:
        with pytest.raises(DataError):
            split_groups(shuffled, **wanted)
    else:
        assert split_groups(shuffled, **wanted) == expected


@settings(deadline=None, max_examples=50)
@given(GROUPS, SEEDS, st.text("ab/1", min_size=7, max_size=9))
def test_a_new_group_does_not_reorder_the_others(groups: dict[str, int], seed: int, new: str) -> None:
    """At most one group leaves train: the one that the new group replaces."""
    singles = list(groups)
    half = len(singles) // 2
    before = split_groups(singles, few_shot=half, validation=0, test=0, seed=seed, sample=0)
    after = split_groups([*singles, new], few_shot=half, validation=0, test=0, seed=seed, sample=0)
    assert len(set(before) - set(after)) <= 1
    assert len(set(after) - set(before) - {new}) == 0


def only(found: dict[str, str], *names: str) -> dict[str, str]:
    return {group: name for group, name in found.items() if name in names}


@settings(deadline=None, max_examples=50)
@given(GROUPS, SEEDS, st.integers(0, 9))
def test_a_larger_few_shot_share_contains_the_smaller(groups: dict[str, int], seed: int, sample: int) -> None:
    singles = list(groups)
    third = len(singles) // 3
    small = split_groups(singles, few_shot=third // 2, validation=third, test=third, seed=seed, sample=sample)
    large = split_groups(singles, few_shot=third, validation=third, test=third, seed=seed, sample=sample)
    assert small.items() <= large.items()


@settings(deadline=None, max_examples=50)
@given(GROUPS, SEEDS, st.integers(0, 9), st.integers(0, 9))
def test_few_shot_samples_share_validation_and_test(groups: dict[str, int], seed: int, one: int, other: int) -> None:
    singles = list(groups)
    third = len(singles) // 3
    a, b = (
        split_groups(singles, few_shot=third, validation=third, test=third, seed=seed, sample=s) for s in (one, other)
    )
    assert only(a, "validation", "test") == only(b, "validation", "test")


def test_few_shot_samples_differ() -> None:
    groups = [f"scenes/{index}" for index in range(2000)]
    a, b = (split_groups(groups, few_shot=900, validation=100, test=100, seed=0, sample=sample) for sample in (0, 1))
    assert 400 < len(only(a, "train").keys() & only(b, "train").keys()) < 500


def test_seeds_differ_and_the_split_is_even() -> None:
    groups = [f"scenes/{index}" for index in range(2000)]
    trains = []
    for seed in range(3):
        found = split_groups(groups, few_shot=1000, validation=0, test=1000, seed=seed, sample=0)
        train = {group for group, name in found.items() if name == "train"}
        assert 400 < sum(int(group.split("/")[1]) < 1000 for group in train) < 600
        trains.append(train)
    assert all(400 < len(a & b) < 600 for a, b in [(trains[0], trains[1]), (trains[1], trains[2])])


def test_known_split() -> None:
    """Another hash or separator would change every split, and with it every published number."""
    found = split_groups(["a", "b", "b", "c", "d", "e"], few_shot=1, validation=1, test=2, seed=0, sample=0)
    assert found == {"e": "train", "c": "validation", "d": "test", "a": "test"}


def test_too_few_rows() -> None:
    with pytest.raises(
        DataError, match=r"^3 rows in whole groups are too few for 2 few-shot, 1 validation and 1 test examples$"
    ):
        split_groups(["a", "b", "c"], few_shot=2, validation=1, test=1, seed=0, sample=0)
